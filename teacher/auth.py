"""Bearer keys in front of the teacher: who may ask it, decided before a body is read."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from teacher.api import ErrorBody, ErrorDetail

OPEN_PATHS = frozenset({"/health"})  # load balancers have no keys


class InsecureAddress(ValueError):
    """The teacher would listen to other machines without asking for a key."""


class KeyRing:
    """The API keys that are accepted, several at once so that one can be replaced without a
    pause. Only their SHA-256 digests are held: a replica's memory or log can leak no key."""

    def __init__(self, keys: Iterable[str]) -> None:
        """
        Raises:
            ValueError: a key is empty, which an unset variable easily becomes, or holds
                characters that do not survive an HTTP header.
        """
        kept = list(keys)
        if not all(key.isascii() and key.isprintable() and key and " " not in key for key in kept):
            raise ValueError("an API key must be printable ASCII without spaces, and not empty")
        self._digests = tuple(_digest(key) for key in kept)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"KeyRing({len(self._digests)} keys)"

    def accepts(self, key: str) -> bool:
        """Whether `key` is one of them, in a time that depends on neither."""
        given = _digest(key)
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def require_keys(host: str, keys: KeyRing) -> None:
    """Refuses to open the teacher to other machines without a key.

    Raises:
        InsecureAddress: `host` is not loopback and `keys` is empty.
    """
    if not keys and not _is_loopback(host):
        raise InsecureAddress(
            f"the teacher needs at least one API key to listen on {host}: without a key it "
            f"listens on loopback only (127.0.0.1)"
        )


class BearerAuth:
    """ASGI middleware: 401 unless the request carries an accepted key. It stands in front of
    the whole application, so that strangers learn nothing from validation errors."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _path(scope) in OPEN_PATHS or self._allows(scope):
            await self._app(scope, receive, send)
            return
        detail = ErrorDetail(
            type="unauthorized",
            message="a valid API key is needed: send the header 'Authorization: Bearer KEY'",
        )
        refusal = JSONResponse(
            ErrorBody(error=detail).model_dump(), 401, headers={"WWW-Authenticate": "Bearer"}
        )
        await refusal(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._keys.accepts(key.strip())


def _path(scope: Scope) -> str:
    """The path within this application; Serve puts its route prefix into `root_path`."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: whatever it resolves to today, it may be public tomorrow
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

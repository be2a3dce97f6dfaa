"""Bearer keys in front of the teacher: who may ask it, decided before a body is read."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from teacher.api import ErrorBody, ErrorDetail

OPEN_PATHS = frozenset({"/health", "/ready"})  # load balancers have no keys
KEYS_VARIABLE = "SCOPE_TEACHER_KEYS"
_HASHED = "sha256:"


class InsecureAddress(ValueError):
    """The teacher would listen to other machines without asking for a key."""


class KeyRing:
    """The API keys that are accepted, several at once so that one can be replaced without a
    pause. Only their SHA-256 digests are held: a replica's memory or log can leak no key."""

    def __init__(self, keys: Iterable[str]) -> None:
        """
        Args:
            keys: each a key itself, or `sha256:` and its digest in hexadecimal, so that whoever
                deploys the server need not know it. Keys are random: they need no salt.

        Raises:
            ValueError: a key is empty, which an unset variable easily becomes, or holds
                characters that do not survive an HTTP header; or a digest is not one.
        """
        self._digests = tuple(_parse(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"KeyRing({len(self._digests)} keys)"

    def identify(self, key: str) -> str | None:
        """A name for `key` that does not give it away, or None if it is not accepted; in a time
        that depends on neither."""
        given = _digest(key)
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given.hex()[:16] if any(matches) else None


def environment_keys(environment: Mapping[str, str]) -> list[str]:
    """The keys in SCOPE_TEACHER_KEYS, separated by commas."""
    return [key for key in environment.get(KEYS_VARIABLE, "").split(",") if key]


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
        """Answers strangers itself and passes everybody else on."""
        if scope["type"] != "http" or _path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        caller = self._caller(scope)
        if caller is not None:
            scope.setdefault("state", {})["caller"] = caller
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

    def _caller(self, scope: Scope) -> str | None:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return self._keys.identify(key.strip()) if scheme.lower() == "bearer" else None


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


def _parse(key: str) -> bytes:
    """The digest that stands for one configured key."""
    if key.startswith(_HASHED):
        digest = bytes.fromhex(key.removeprefix(_HASHED))
        if len(digest) != hashlib.sha256().digest_size:
            raise ValueError("a hashed API key is 'sha256:' and 64 hexadecimal digits")
        return digest
    if not (key.isascii() and key.isprintable() and key and " " not in key):
        raise ValueError("an API key must be printable ASCII without spaces, and not empty")
    return _digest(key)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

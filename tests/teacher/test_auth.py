from __future__ import annotations

import hashlib
import hmac
import types

import pytest

from teacher.auth import InsecureAddress, KeyRing, require_keys


def test_any_of_several_keys_is_accepted_and_nothing_else() -> None:
    ring = KeyRing(["old-key", "new-key"])
    assert ring.identify("old-key")
    assert ring.identify("new-key")
    assert not ring.identify("old-key ")
    assert not ring.identify("")


def test_a_key_is_compared_with_all_and_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However early one matches: what is counted here is what an attacker could time."""
    compared: list[tuple[int, int]] = []

    def constant_time(given: bytes, known: bytes) -> bool:
        compared.append((len(given), len(known)))
        return hmac.compare_digest(given, known)

    monkeypatch.setattr("teacher.auth.hmac", types.SimpleNamespace(compare_digest=constant_time))
    ring = KeyRing(["first", "second", "third"])
    for key, accepted in (("first", True), ("third", True), ("f", False), ("x" * 1000, False)):
        compared.clear()
        assert bool(ring.identify(key)) == accepted
        assert compared == [(32, 32)] * 3, key


def test_an_empty_ring_accepts_nothing() -> None:
    assert not KeyRing([])
    assert not KeyRing([]).identify("")


def test_no_key_can_be_read_from_a_ring() -> None:
    ring = KeyRing(["secret-key"])
    assert "secret-key" not in repr(ring) + repr(vars(ring))


@pytest.mark.parametrize("key", ["", " ", "two words", "naïve", "line\n"])
def test_a_key_that_cannot_be_sent_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        KeyRing(["good", key])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    require_keys(host, KeyRing([]))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "teacher.example"])
def test_any_other_address_does(host: str) -> None:
    require_keys(host, KeyRing(["key"]))
    with pytest.raises(InsecureAddress, match=host):
        require_keys(host, KeyRing([]))


def test_a_key_may_be_given_as_its_digest() -> None:
    digest = hashlib.sha256(b"secret-key").hexdigest()
    ring = KeyRing([f"sha256:{digest}"])
    assert ring.identify("secret-key")
    assert not ring.identify(f"sha256:{digest}")
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        KeyRing(["sha256:abcd"])


def test_callers_are_told_apart_without_their_keys() -> None:
    ring = KeyRing(["one", "two"])
    assert ring.identify("one") != ring.identify("two")
    assert "one" not in str(ring.identify("one"))

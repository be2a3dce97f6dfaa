from __future__ import annotations

import pytest

from teacher.auth import InsecureAddress, KeyRing, require_keys


def test_any_of_several_keys_is_accepted_and_nothing_else() -> None:
    ring = KeyRing(["old-key", "new-key"])
    assert ring.accepts("old-key")
    assert ring.accepts("new-key")
    assert not ring.accepts("old-key ")
    assert not ring.accepts("")


def test_an_empty_ring_accepts_nothing() -> None:
    assert not KeyRing([])
    assert not KeyRing([]).accepts("")


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

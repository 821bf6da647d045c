"""API keys and addresses, as they are configured."""

from __future__ import annotations

import pytest

from gateway.auth import ApiKeys, refuse_open_address
from pipeline.errors import ConfigError
from pipeline.settings import GatewaySettings


@pytest.mark.parametrize(
    "pair", ["nokey", ":key", "name:", "a b:key", "na/me:key", "x" * 65 + ":key", "name:two words", "name:k\u00e9y"]
)
def test_a_malformed_pair_is_a_config_error_that_does_not_show_the_key(pair: str) -> None:
    """The operator reads which pair it is; a log must not learn the key."""
    with pytest.raises(ConfigError, match="PENSTOCK_API_KEYS: pair 2") as raised:
        ApiKeys(["good:secret-one", pair])
    key = pair.partition(":")[2]
    assert "secret-one" not in str(raised.value)
    assert not key or key not in str(raised.value).replace("name:key", "")


def test_every_malformed_pair_is_named_at_once() -> None:
    """One start, all that is wrong."""
    with pytest.raises(ConfigError, match=r"pair 1.*pair 3.*pair 4"):
        ApiKeys(["bad", "a:key", "b:", "c:key"])


def test_a_key_may_hold_a_colon() -> None:
    """Only the first one parts name and key."""
    assert ApiKeys(["a:b:c"]).owner_of(b"b:c") == "a"


def test_the_keys_show_their_tenants_and_nothing_else() -> None:
    """A snapshot for logs."""
    assert repr(ApiKeys(["b:secret", "a:other"])) == "<ApiKeys tenants=['a', 'b']>"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    """Only this machine can ask."""
    refuse_open_address(GatewaySettings(host=host), ApiKeys([]))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "127.0.0.1.example.org"])
def test_an_open_address_needs_a_key_or_a_clear_word(host: str) -> None:
    """Refused without, served with a key or with `insecure`."""
    with pytest.raises(ConfigError, match="PENSTOCK_API_KEYS"):
        refuse_open_address(GatewaySettings(host=host), ApiKeys([]))
    refuse_open_address(GatewaySettings(host=host), ApiKeys(["a:key"]))
    refuse_open_address(GatewaySettings(host=host, insecure=True), ApiKeys([]))
    refuse_open_address(GatewaySettings(host=host, require_key=True), ApiKeys([]))

"""Keys, spelled once; replica addresses, one spelling each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import keys, scripts
from pipeline.job import PRIORITIES

hosts = st.from_regex(r"[a-zA-Z]([a-zA-Z0-9-]{0,8}[a-zA-Z0-9])?(\.[a-zA-Z]{2,5})?", fullmatch=True)
paths = st.from_regex(r"(/[a-z0-9._~-]{1,5}){0,3}/?", fullmatch=True)
addresses = st.builds(
    lambda scheme, host, port, path: f"{scheme}://{host}{'' if port is None else f':{port}'}{path}",
    st.sampled_from(["http", "https", "HTTP", "Https"]),
    hosts | st.just("[2001:DB8::1]") | st.just("127.0.0.1"),
    st.none() | st.integers(1, 65_535),
    paths,
)


@given(addresses)
def test_normalising_twice_changes_nothing(address: str) -> None:
    """The spelling is a fixed point."""
    once, slots = keys.normalise_replica_url(address)
    assert keys.normalise_replica_url(once) == (once, None)
    assert slots is None
    assert not once.endswith("/")


@given(addresses, st.integers(1, 4096))
def test_spellings_of_one_address_are_one_replica(address: str, slots: int) -> None:
    """Case of scheme and host, slash at the end, spaces around; slots are told apart."""
    once, _ = keys.normalise_replica_url(address)
    scheme, rest = address.split("://")
    host, slash, path = rest.partition("/")
    loud = f"  {scheme.upper()}://{host.upper()}{slash}{path.rstrip('/')}/?slots={slots} "
    assert keys.normalise_replica_url(loud) == (once, slots)


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("http://llm:80/v1/", "http://llm/v1"),
        ("https://llm:443", "https://llm"),
        ("https://llm:80", "https://llm:80"),
        ("http://LLM:8080/V1", "http://llm:8080/V1"),
        ("http://[::1]:11434/v1", "http://[::1]:11434/v1"),
    ],
)
def test_examples(address: str, wanted: str) -> None:
    """What people write."""
    assert keys.normalise_replica_url(address) == (wanted, None)


@pytest.mark.parametrize(
    "address",
    [
        "", "llm:8000", "ftp://llm", "http://", "http:///v1", "http://u:p@llm", "http://u@llm", "http://llm?model=x",
        "http://llm?slots=", "http://llm?slots=0", "http://llm?slots=4097", "http://llm?slots=many", "http://llm?slots=²",
        "http://llm?slots=1&x=2", "http://llm#x", "http://llm:99999", "http://llm:x", "http://[::1", "http://a b/",
        "http://llm/a b",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    """With a ValueError, which settings turn into a line for the operator."""
    with pytest.raises(ValueError):
        keys.normalise_replica_url(address)


def test_streams_are_named_after_stage_and_priority() -> None:
    """Normal bears no mark."""
    assert [keys.stream("llm", priority) for priority in PRIORITIES] == [
        "job:llm_in:high",
        "job:llm_in",
        "job:llm_in:low",
    ]


def test_scripts_spell_no_key() -> None:
    """They know them as KEY; a spelling in two places would part one day."""
    spellings = [re.escape(spelling) for spelling in keys.LUA_KEYS.values()]
    for path in Path(scripts.__path__[0]).glob("*.lua"):
        code = "\n".join(line.split("--")[0] for line in path.read_text().splitlines())
        assert not re.search(rf"'({'|'.join(spellings)})", code), path.name


def test_script_brings_the_shared_functions_that_it_uses_and_no_others() -> None:
    """A missing one would be found when a rare branch runs in Redis; one too many costs every call."""
    prelude = (Path(scripts.__path__[0]) / "_prelude.lua").read_text()
    shared = re.findall(r"^local function (\w+)", prelude, re.MULTILINE)
    assert len(shared) > 10
    for script in (value for value in vars(scripts).values() if isinstance(value, scripts.Script)):
        code = "\n".join(line.split("--")[0] for line in script.text.splitlines())
        assert "KEY." not in code
        for name in shared:
            first_use = re.search(rf"(?<!function )\b{name}\(", code)
            if first_use is not None:
                assert f"local function {name}(" in code[: first_use.start()], (script.name, name)
    assert "local function finish(" in scripts.SETTLE.text
    assert "local function finish(" not in scripts.SUBMIT.text


def test_every_key_of_the_table_is_spelled_in_the_module() -> None:
    """And every endless one stands on the bounded list."""
    table = (keys.__doc__ or "").split("written by")[1]
    names = re.findall(r"^`([^`]+)`", table, re.MULTILINE)
    spelled = {value for value in vars(keys).values() if isinstance(value, str)}
    for name in names:
        plain = re.split(r"[<\[]", name)[0]
        assert plain == "job:" or plain in spelled, name

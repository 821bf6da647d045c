"""The receiving servers as processes of their own: what a provider makes of a failure agrees with their record."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InDoubt, Reject, RetryLater
from pipeline.settings import load
from stages import providers
from stages.providers import Outgoing, Provider
from tests.deliveries import ledger
from tests.deliveries.ledger import Entry, Faults
from tests.deliveries.letters import an_email, an_sms
from tests.deliveries.twilio import Options, Twilio

MESSAGES = 100


@asynccontextmanager
async def server(module: str, options: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Run one, yield what it says when it listens, and let it go."""
    command = (sys.executable, "-m", f"tests.deliveries.{module}", json.dumps(options))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield json.loads(await process.stdout.readline())
    finally:
        process.terminate()
        assert await process.wait() == 0


async def what_became_of(provider: Provider, messages: list[Outgoing]) -> dict[str, str]:
    """Send each one once; return by id what the provider says of it."""

    async def one(message: Outgoing) -> str:
        try:
            await provider.send(message)
        except (RetryLater, Reject) as error:  # InDoubt is a Reject
            return type(error).__name__
        return "Sent"

    await provider.start()
    try:
        found = await asyncio.gather(*(one(message) for message in messages))
    finally:
        await provider.stop()
    return {message.id: outcome for message, outcome in zip(messages, found, strict=True)}


def assert_true(outcomes: dict[str, str], entries: list[Entry]) -> None:
    """Sent was taken, a retry and a refusal were not, and only those are in doubt that nobody can know of."""
    assert max(Counter(entry.delivery for entry in entries).values()) == 1
    known = {entry.delivery: entry for entry in entries}
    for delivery, outcome in outcomes.items():
        entry = known.get(delivery)
        is_taken = entry is not None and entry.taken
        assert is_taken is {"Sent": True, "RetryLater": False, "Reject": False}.get(outcome, is_taken)
        if outcome == "InDoubt":
            assert entry is not None
            assert entry.answered in {0, 500}


async def test_what_smtp_says_agrees_with_the_mail_servers_record(tmp_path: Path) -> None:
    """Of each kind of failure some happen; none is taken for another."""
    record = tmp_path / "record.jsonl"
    names = ["deferred_rcpt", "deferred", "unavailable", "refused", "drop_rcpt", "drop_read", "drop_taken"]
    options = {"ledger": str(record), "faults": dict.fromkeys(names, 0.08), "seed": 3}
    messages = [an_email(id=f"{number:032x}") for number in range(MESSAGES)]
    async with server("smtp", options) as at:
        environ = {
            "PENSTOCK_SMTP__HOST": at["host"],
            "PENSTOCK_SMTP__PORT": str(at["port"]),
            "PENSTOCK_SMTP__TLS": "none",
        }
        outcomes = await what_became_of(providers.build("smtp", load(environ)), messages)
    assert set(outcomes.values()) == {"Sent", "RetryLater", "Reject", "InDoubt"}
    assert_true(outcomes, ledger.read(record))


async def test_what_twilio_says_agrees_with_the_local_twilios_record(tmp_path: Path) -> None:
    """Here a 500 is in doubt, too, as Twilio's own pages say."""
    record = tmp_path / "record.jsonl"
    names = ["too_many", "unavailable", "unavailable_for", "internal", "internal_taken", "drop_read", "drop_taken"]
    options = {"ledger": str(record), "faults": dict.fromkeys(names, 0.08), "seed": 4, "callbacks": "none"}
    messages = [an_sms(id=f"{number:032x}") for number in range(MESSAGES - 1)]
    messages.append(an_sms(id="f" * 32, to="+15005550001"))
    async with server("twilio", options) as at:
        given = {"API_URL": at["url"], "ACCOUNT_SID": at["account_sid"], "AUTH_TOKEN": at["auth_token"]}
        settings = load({f"PENSTOCK_TWILIO__{name}": value for name, value in given.items()})
        outcomes = await what_became_of(providers.build("twilio", settings), messages)
    assert set(outcomes.values()) == {"Sent", "RetryLater", "Reject", "InDoubt"}
    assert_true(outcomes, ledger.read(record))


def test_a_fault_that_a_server_does_not_have_is_refused() -> None:
    """A scenario with a misspelt fault would harm nobody and prove nothing."""
    with pytest.raises(ValueError, match="no such faults: dropp"):
        Twilio(Options(faults={"dropp": 0.1}))
    with pytest.raises(ValueError, match="more than 1"):
        Twilio(Options(faults={"drop_read": 0.6, "drop_taken": 0.6}))


def test_faults_happen_as_often_as_they_are_to() -> None:
    """After the script, by chance."""
    faults = Faults({"a": 0.1, "b": 0.2}, ["x", ""])
    drawn = [faults.draw() for _ in range(10_002)]
    assert drawn[:2] == ["x", ""]
    share = Counter(drawn[2:])
    assert 900 < share["a"] < 1_100
    assert 1_800 < share["b"] < 2_200


def test_a_doubt_is_a_refusal_to_go_on() -> None:
    """Who knows nothing of it buries the job, and does not try again."""
    assert isinstance(InDoubt(), Reject)
    assert InDoubt().code == "outcome_unknown"
    assert "never sent again by itself" in str(InDoubt())

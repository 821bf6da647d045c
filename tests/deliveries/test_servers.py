"""The receiving servers as processes of their own: what a provider makes of a failure agrees with their record."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InDoubt, Reject, RetryLater
from pipeline.settings import load
from stages import providers
from stages.providers import Outgoing, Provider
from tests.conftest import wait_until
from tests.deliveries import ledger
from tests.deliveries.ledger import UNREAD, Entry, Faults
from tests.deliveries.letters import an_email, an_sms
from tests.deliveries.smtp import mail_server
from tests.deliveries.twilio import ACCOUNT_SID, AUTH_TOKEN, Options, Told, Twilio, twilio
from tests.ports import take_port

MESSAGES = 100
THINKS_MS = 200.0


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


async def leave(provider: Provider, message: Outgoing, has_arrived: Callable[[], bool]) -> None:
    """Send a message, and be gone before its answer."""
    await provider.start()
    try:
        sending = asyncio.create_task(provider.send(message), name="send")
        await wait_until(has_arrived)
        sending.cancel()
        await asyncio.wait([sending])
        assert sending.cancelled()
    finally:
        await provider.stop()


async def test_an_answer_that_nobody_waits_for_is_none_in_the_record() -> None:
    """The message is taken all the same: its sender was killed while the server thought."""
    async with twilio(Options(delay_ms=THINKS_MS, callbacks="none")) as shop, mail_server(delay_ms=THINKS_MS) as post:
        environ = {
            "PENSTOCK_TWILIO__API_URL": shop.url,
            "PENSTOCK_TWILIO__ACCOUNT_SID": ACCOUNT_SID,
            "PENSTOCK_TWILIO__AUTH_TOKEN": AUTH_TOKEN,
            "PENSTOCK_SMTP__HOST": "127.0.0.1",
            "PENSTOCK_SMTP__PORT": str(post.port),
            "PENSTOCK_SMTP__TLS": "none",
        }
        settings = load(environ)
        await leave(providers.build("twilio", settings), an_sms(), lambda: bool(shop.requests))
        await leave(providers.build("smtp", settings), an_email(), lambda: bool(post.arrived))
        for record in (shop.ledger, post.ledger):
            await wait_until(lambda record=record: bool(record.entries))  # type: ignore[misc]
            assert [(entry.taken, entry.answered) for entry in record.entries] == [(True, 0)]


async def test_a_mail_server_refuses_the_mailboxes_that_it_is_told_to() -> None:
    """For good, and only these."""
    async with mail_server(refuses=["nobody@refused.example"]) as post:
        environ = {"HOST": "127.0.0.1", "PORT": str(post.port), "TLS": "none"}
        settings = load({f"PENSTOCK_SMTP__{name}": value for name, value in environ.items()})
        messages = [an_email(id="a" * 32, to="nobody@refused.example"), an_email(id="b" * 32)]
        outcomes = await what_became_of(providers.build("smtp", settings), messages)
    assert outcomes == {"a" * 32: "Reject", "b" * 32: "Sent"}


async def test_callbacks_are_written_down_and_may_come_in_every_way(tmp_path: Path) -> None:
    """One message after the other in another way, by chance; nobody listens here."""
    told = tmp_path / "told.jsonl"
    async with twilio(Options(callbacks="mixed", late_s=0.0, told=str(told), seed=2)) as shop:
        given = {"API_URL": shop.url, "ACCOUNT_SID": ACCOUNT_SID, "AUTH_TOKEN": AUTH_TOKEN}
        settings = load({f"PENSTOCK_TWILIO__{name}": value for name, value in given.items()})
        url = f"http://127.0.0.1:{take_port()}/told?delivery="
        messages = [an_sms(id=f"{number:032x}", callback_url=f"{url}{number}") for number in range(20)]
        await what_became_of(providers.build("twilio", settings), messages)
        await shop.settled()
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert [Told(**line) for line in lines] == shop.told
    assert {line["answered"] for line in lines} == {0}
    ways: dict[str, list[str]] = {}
    for line in lines:
        ways.setdefault(line["url"], []).append(line["status"])
    assert len(ways) == len(messages)
    assert {len(statuses) for statuses in ways.values()} == {2, 4}
    assert any("queued" in statuses for statuses in ways.values())
    assert any(statuses == ["sent", "sent", "delivered", "delivered"] for statuses in ways.values())


async def test_a_connection_that_was_dropped_unread_stands_in_the_record() -> None:
    """As nobody's: a doubt that only a count accounts for."""
    async with twilio(script=["drop_unread"]) as shop:
        given = {"API_URL": shop.url, "ACCOUNT_SID": ACCOUNT_SID, "AUTH_TOKEN": AUTH_TOKEN}
        settings = load({f"PENSTOCK_TWILIO__{name}": value for name, value in given.items()})
        outcomes = await what_became_of(providers.build("twilio", settings), [an_sms()])
    assert (list(outcomes.values()), shop.ledger.entries) == (["InDoubt"], [UNREAD])


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

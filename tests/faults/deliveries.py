"""Clients that send messages to people, the servers that receive these, and what is known of each in the end.

Each message is sent under an Idempotency-Key, again and again until its client hears a decision. Every fiftieth goes
to a number, or a mailbox, that its provider refuses for good. The servers are processes of their own that fail as they
are told, and write down what they had whole (`tests.deliveries.ledger`), and what they have told of it: a line of JSON
for each status callback, with what that was answered.

One line of JSON each in the clients' file:

    {"event": "sent", "n", "type", "sender", "to", "body", "is_bad"}
    {"event": "accepted", "n", "id"}                      once for every time that the client heard so
    {"event": "unheard", "n", "code"}                     the client heard something else, and sends again
    {"event": "client_crashed", "n", "code"}              what it heard, the client could not make sense of
    {"event": "seen", "n", "status", "history", "code", "attempts"}    what the gateway says of it when all is quiet
    {"event": "recorded", "n", "status", "history"}       its row of the database

`history` is a list of pairs, status and instant (ms). A status of null: nothing is known of the message.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Final

import aiohttp
import orjson

from pipeline import keys
from tests.cli.conftest import clean_environment
from tests.conftest import wait_until
from tests.deliveries.twilio import ACCOUNT_SID, AUTH_TOKEN
from tests.faults.cluster import READY_S, Cluster, Part
from tests.faults.history import Json, Writer, read
from tests.ports import take_port

TYPES: Final = ("sms", "mms", "email")
BAD_EVERY: Final = 50
BAD_NUMBER: Final = "+15005550009"
"""Twilio's own for a number that is not a mobile one."""
BAD_MAILBOX: Final = "nobody@refused.example"
PUBLIC_URL: Final = "https://penstock.example"
"""Callbacks are signed for this address, and reach the gateway at another, as behind a proxy."""
PATIENCE_S: Final = 300.0
"""How long a client goes on sending."""
AGAIN_S: Final = 0.2
LOOK_AT_ONCE: Final = 20
QUIET_S: Final = 300.0
"""How long the last messages and the last of history are waited for when nothing is harmed any more."""

TWILIO_FAILS: Final = {
    "unavailable": 0.06, "internal": 0.02, "internal_taken": 0.02, "too_many": 0.03, "drop_unread": 0.02,
    "drop_read": 0.02, "drop_taken": 0.02,
}  # fmt: skip
SMTP_FAILS: Final = {
    "deferred": 0.04, "deferred_rcpt": 0.03, "unavailable": 0.03, "drop_rcpt": 0.02, "drop_read": 0.02,
    "drop_taken": 0.02,
}  # fmt: skip
"""A tenth fails at each. Besides, Twilio asks for patience, and both drop connections, before and after reading."""


class Receivers:
    """The two servers, on ports that are known before they listen.

    Args:
        folder: where they write.
        delay_ms: how long they take with a message before they answer.
    """

    def __init__(self, folder: Path, rng: Random, delay_ms: float) -> None:
        self._folder = folder
        self._seed = rng.randrange(1 << 30)
        self._delay_ms = delay_ms
        self._ports = {"twilio": take_port(), "smtp": take_port()}

    @property
    def environ(self) -> Mapping[str, str]:
        """Settings of those who send by them."""
        return {
            "PENSTOCK_DELIVERIES__SMS": "twilio",
            "PENSTOCK_DELIVERIES__MMS": "twilio",
            "PENSTOCK_DELIVERIES__EMAIL": "smtp",
            "PENSTOCK_DELIVERIES__PUBLIC_URL": PUBLIC_URL,
            "PENSTOCK_TWILIO__API_URL": f"http://127.0.0.1:{self._ports['twilio']}",
            "PENSTOCK_TWILIO__ACCOUNT_SID": ACCOUNT_SID,
            "PENSTOCK_TWILIO__AUTH_TOKEN": AUTH_TOKEN,
            "PENSTOCK_SMTP__HOST": "127.0.0.1",
            "PENSTOCK_SMTP__PORT": f"{self._ports['smtp']}",
            "PENSTOCK_SMTP__TLS": "none",
            "PENSTOCK_SMTP__DEFERRED_S": "0.5",
        }

    @asynccontextmanager
    async def listening(self, cluster: Cluster) -> AsyncIterator[None]:
        """Let them listen, as processes of the cluster; on leaving, Twilio tells what it has not told yet."""
        common = {"delay_ms": self._delay_ms, "seed": self._seed}
        parts = [
            self._part("smtp", common | {"faults": SMTP_FAILS, "refuses": [BAD_MAILBOX]}),
            self._part(
                "twilio",
                common
                | {"faults": TWILIO_FAILS, "callbacks": "mixed", "undelivered": 0.1}
                | {"callback_base": cluster.gateway_urls[0], "told": str(callbacks(self._folder))},
            ),
        ]
        for part in parts:
            cluster.parts[part.name] = part
            await part.start()
            log = _log(self._folder, part.stage)
            await wait_until(lambda log=log: b"}" in log.read_bytes(), timeout_s=READY_S)  # type: ignore[misc]
        yield
        for part in parts:
            await part.stop()

    def _part(self, name: str, options: Json) -> Part:
        options |= {"port": self._ports[name], "ledger": str(self._folder / f"receiver-{name}.jsonl")}
        command = [sys.executable, "-P", "-m", f"tests.deliveries.{name}", orjson.dumps(options).decode()]
        return Part(f"{name}-1", command, clean_environment(), _log(self._folder, name))


def _log(folder: Path, name: str) -> Path:
    return folder / f"receiver-{name}.log"


def ledgers(folder: Path) -> list[Path]:
    """Return the files in which the receivers have written what they had."""
    return sorted(folder.glob("receiver-*.jsonl"))


def callbacks(folder: Path) -> Path:
    """Return the file in which Twilio writes what it has told."""
    return folder / "callbacks.jsonl"


class Senders:
    """Clients of one cluster.

    Args:
        path: the file that they write.
    """

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self._cluster = cluster
        self._path = path
        self._writer = Writer(path)

    async def run(self, messages: int, rate: float, enough: asyncio.Event) -> None:
        """Send messages in open loop, *rate* per second, more of them until it is *enough*.

        Returns when each was accepted, or given up.
        """
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in count(1):
                if number > messages and enough.is_set():
                    break
                await asyncio.sleep(max(0.0, began_s + (number - 1) / rate - time.monotonic()))
                group.create_task(self._live(number), name=f"message {number}")

    async def _live(self, number: int) -> None:
        body = message(number)
        told = {"type": body["type"], "sender": body["from"], "to": body["to"], "body": body["body"]}
        self._writer.write("sent", n=number, **told, is_bad=is_bad(number))
        give_up_s = time.monotonic() + PATIENCE_S
        try:
            while not await self._post(number, body) and time.monotonic() < give_up_s:
                await asyncio.sleep(AGAIN_S)
        except Exception as error:  # noqa: BLE001 - a client's outermost edge: the judge reads it
            self._writer.write("client_crashed", n=number, code=f"{type(error).__name__}: {error}"[:200])

    async def _post(self, number: int, body: Json) -> bool:
        url = f"{self._cluster.gateway_urls[0]}/api/v1/messages/send"
        try:
            async with self._cluster.http.post(url, json=body, headers={"idempotency-key": f"m-{number}"}) as answer:
                said = await answer.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._writer.write("unheard", n=number, code=type(error).__name__)
            return False
        if answer.status != 202:
            self._writer.write("unheard", n=number, code=said["error"]["code"])
            return False
        self._writer.write("accepted", n=number, id=said["id"])
        return True

    async def are_done(self) -> bool:
        """Say whether no message is on its way any more."""
        return await self._cluster.live_jobs() == 0

    async def are_recorded(self) -> bool:
        """Say whether history was told of all."""
        return await self.are_done() and int(await self._cluster.redis.xlen(keys.EVENTS)) == 0

    async def look(self) -> None:
        """Write down what the gateway says of every message."""
        at_once = asyncio.Semaphore(LOOK_AT_ONCE)

        async def look(number: int, delivery_id: str) -> None:
            url = f"{self._cluster.gateway_urls[0]}/api/v1/messages/{delivery_id}"
            async with at_once, self._cluster.http.get(url) as answer:
                said = await answer.json() if answer.status == 200 else {}
            self._writer.write(
                "seen",
                n=number,
                status=said.get("status"),
                history=[[step["status"], step["at_ms"]] for step in said.get("history", ())],
                code=said.get("error", {}).get("code"),
                attempts=said.get("attempts", 0),
            )

        async with asyncio.TaskGroup() as group:
            for one in piece_together(self._path):
                if one.ids:
                    group.create_task(look(one.n, one.ids[0]), name=f"look {one.n}")

    def read_history(self, database: Path) -> None:
        """Write down the rows that the database has of every message."""
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        try:
            rows = connection.execute("SELECT delivery_id, status, history FROM deliveries").fetchall()
        finally:
            connection.close()
        known = {delivery_id: (status, orjson.loads(history or "[]")) for delivery_id, status, history in rows}
        for one in piece_together(self._path):
            if one.ids:
                status, history = known.get(one.ids[0], (None, []))
                self._writer.write("recorded", n=one.n, status=status, history=history)

    def close(self) -> None:
        """Close the file."""
        self._writer.__exit__(None, None, None)


def is_bad(number: int) -> bool:
    """Say whether the provider refuses message *number* for good."""
    return number % BAD_EVERY == 0


def message(number: int) -> Json:
    """Return message *number*, each type in turn."""
    kind = TYPES[number % len(TYPES)]
    body: Json = {"type": kind, "body": f"Message {number}."}
    if kind == "email":
        to = BAD_MAILBOX if is_bad(number) else f"reader{number}@example.com"
        return body | {"from": "shop@example.com", "to": to, "subject": f"Number {number}"}
    body |= {"from": "+15005550006", "to": BAD_NUMBER if is_bad(number) else f"+1415{number:07}"}
    return body | ({"attachments": [{"url": "https://example.com/cat.png"}]} if kind == "mms" else {})


# --- what the file says --------------------------------------------------------------------------


@dataclass(slots=True)
class Message:
    """What is known of one message, pieced together from the file.

    Attributes:
        ids: every id that it was accepted under; more than one is a fault.
        seen, recorded: what the gateway said when all was quiet, and the database; None when nobody looked.
    """

    n: int
    type: str
    sender: str
    to: str
    body: str
    is_bad: bool
    ids: list[str] = field(default_factory=list)
    seen: Json | None = None
    recorded: Json | None = None
    crashed: str | None = None


def piece_together(path: Path) -> list[Message]:
    """Return every message in a file, in the order of sending."""
    found: dict[int, Message] = {}
    for line in read(path):
        number = line["n"]
        match line["event"]:
            case "sent":
                told = (line["type"], line["sender"], line["to"], line["body"], line["is_bad"])
                found[number] = Message(number, *told)
            case "accepted":
                if line["id"] not in found[number].ids:
                    found[number].ids.append(line["id"])
            case "client_crashed":
                found[number].crashed = line["code"]
            case "seen":
                found[number].seen = line
            case "recorded":
                found[number].recorded = line
    return list(found.values())

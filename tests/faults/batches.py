"""Clients that send batches of messages, and what they saw, Redis holds and the history has in the end.

Each batch is sent under an Idempotency-Key, again and again until its client hears a decision. That it is closed is
seen in `batch:<id>`, as another program would see it (its completion may be gone when a client hears at last of being
accepted); then its results are read over HTTP, and once more when all is quiet: neither they nor its standing ever
change. Every fifth batch is to be answered from the documents. A batch of one is sent as a single message every other
time.

One line of JSON each:

    {"event": "sent", "n", "queue", "kind": "messages" | "retrieve" | "single", "size", "subject"}
    {"event": "accepted", "n", "batch_id", "ids"}         once for every time that a client heard so
    {"event": "refused" | "unknown" | "client_crashed", "n", "code"}
    {"event": "seen", "n", "standing", "results", "digest"}         what a client read of a closed batch
    {"event": "kept", "n", "batch", "messages", "digest"}           what Redis holds of it when all is quiet
    {"event": "recorded", "n", "batch", "messages", "webhooks"}     the rows of the database

A message is shown as `{"id", "status", "code", "answer", "worker", "replica", "attempts"}`, wherever it was read.
`digest` is that of all that the results, or the one result of a single message, say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import aiohttp
import asyncpg
import orjson
from redis.exceptions import RedisError

from pipeline import keys
from tests.faults.cluster import Cluster
from tests.faults.history import Json, Writer, read
from tests.faults.load import KEPT_BY, LOOK_AT_ONCE, LOOK_EVERY_S
from tests.faults.receiver import Receiver, digest

MOST: Final = 60
"""Messages of one batch: from 1 to so many. Some are more than one script takes at once, and are staged before."""
QUEUES: Final = ("letters", "labels", "notes")
PATIENCE_S: Final = 120.0
"""How long a client goes on sending."""
QUIET_S: Final = 300.0
"""How long the last batches, and the news of them, are waited for when nothing is harmed any more."""


class Senders:
    """Clients of one cluster.

    Args:
        path: the file that they write.
        rng: who sends what.

    Attributes:
        sent, closed: batches so far.
    """

    def __init__(self, cluster: Cluster, receiver: Receiver, path: Path, rng: Random) -> None:
        self.sent = 0
        self.closed = 0
        self._cluster = cluster
        self._receiver = receiver
        self._path = path
        self._writer = Writer(path)
        self._rng = rng
        self._open: dict[str, int] = {}  # accepted, not seen closed: batch id and number
        self._single: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def prepare(self) -> None:
        """Set up the queues, so that their news go to the receiver, who learns the secrets."""
        for queue in QUEUES:
            url = f"{self._cluster.gateway_urls[0]}/queue/{queue}"
            async with self._cluster.http.put(url, json={"webhook_url": self._receiver.url(queue)}) as answer:
                answer.raise_for_status()
                self._receiver.secrets[queue] = (await answer.json())["webhook_secret"]

    # --- sending ---------------------------------------------------------------------------------

    async def run(self, batches: int, rate: float | None) -> None:
        """Send batches in open loop, *rate* per second, or all at once; return when the last is on its way."""
        began_s = time.monotonic()
        for number in range(batches):
            if rate is not None and (delay_s := began_s + number / rate - time.monotonic()) > 0:
                await asyncio.sleep(delay_s)
            self.send()

    def send(self, size: int | None = None) -> int:
        """Send one batch now, of *size* messages or as many as chance has it; return its number."""
        self.sent += 1
        number, size = self.sent, size or self._rng.randint(1, MOST)
        kind = "retrieve" if number % 5 == 0 else "single" if size == 1 and number % 2 else "messages"
        subject, queue = self._rng.choice(list(KEPT_BY)), self._rng.choice(QUEUES)
        self._writer.write("sent", n=number, queue=queue, kind=kind, size=size, subject=subject)
        prompts = [f"{_question(subject)} {mark(number, position)}" for position in range(size)]
        body: Json = {"queue_id": queue, "retrieve": kind == "retrieve"}
        if kind == "single":
            self._single.add(number)
            body["prompt"] = prompts[0]
        else:
            body["messages"] = [{"prompt": prompt} for prompt in prompts]
        task = asyncio.create_task(self._live(number, body), name=f"batch {number}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return number

    async def _live(self, number: int, body: Json) -> None:
        give_up_s = time.monotonic() + PATIENCE_S
        try:
            while not await self._post(number, body) and time.monotonic() < give_up_s:
                await asyncio.sleep(self._rng.uniform(0.1, 0.5))
        except Exception as error:  # noqa: BLE001 - a client's outermost edge: the history tells, and the judge reads it
            self._writer.write("client_crashed", n=number, code=f"{type(error).__name__}: {error}"[:200])

    async def _post(self, number: int, body: Json) -> bool:
        """Send a batch, note what was heard, and say whether that was a decision."""
        url = f"{self._cluster.gateway_urls[0]}/message/create"
        try:
            headers = {"idempotency-key": f"batch-{number}"}
            async with self._cluster.http.post(url, json=body, headers=headers) as answer:
                reply = await answer.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._writer.write("unknown", n=number, code=type(error).__name__)
            return False
        if answer.status != 200:
            code = reply["error"]["code"]
            self._writer.write("unknown" if code == "redis_unavailable" else "refused", n=number, code=code)
            return answer.status not in {429, 503}
        ids = reply["message_ids"] if "message_ids" in reply else [reply["message_id"]]
        self._writer.write("accepted", n=number, batch_id=reply["batch_id"], ids=ids)
        self._open[reply["batch_id"]] = number
        return True

    # --- looking ---------------------------------------------------------------------------------

    async def look_forever(self) -> None:
        """Look for batches that are closed, and read their results; until cancelled."""
        while True:
            with suppress(RedisError):
                ids = list(self._open)
                for i in range(0, len(ids), LOOK_AT_ONCE):
                    some = ids[i : i + LOOK_AT_ONCE]
                    async with self._cluster.redis.pipeline(transaction=False) as asked:
                        for batch_id in some:
                            asked.hexists(keys.BATCH + batch_id, "closed_ms")
                        closed = await asked.execute()
                    for batch_id, is_closed in zip(some, closed, strict=True):
                        if is_closed:
                            await self._see(batch_id, self._open[batch_id])
                            self._open.pop(batch_id)
                            self.closed += 1
            await asyncio.sleep(LOOK_EVERY_S)

    async def _see(self, batch_id: str, number: int) -> None:
        url = f"{self._cluster.gateway_urls[0]}/batch/{batch_id}"
        async with self._cluster.http.get(url) as answer:
            standing = await answer.json()
        async with self._cluster.http.get(f"{url}/results") as answer:
            body = await answer.json()
        results = body["results"]
        said = results[0] if number in self._single else body
        self._writer.write(
            "seen", n=number, standing=standing, results=[_shown(one) for one in results], digest=digest(said)
        )

    async def quiet(self, patience_s: float = QUIET_S) -> None:
        """Wait until every batch is closed and the receiver was told of it and nothing is left to record; look again.

        What is not so in time is missing from the file: the judge will find it.
        """
        give_up_s = time.monotonic() + patience_s
        while time.monotonic() < give_up_s and (self._tasks or self._open or await self._is_busy()):
            await asyncio.sleep(LOOK_EVERY_S)
        for batch in piece_together(self._path):
            if batch.seen:
                await self._see(batch.batch_id, batch.n)

    async def _is_busy(self) -> bool:
        return bool(await self._cluster.live_jobs() or await self._cluster.redis.xlen(keys.EVENTS))

    async def read_redis(self) -> None:
        """Write down what Redis holds of every batch."""
        redis = self._cluster.redis
        for batch in piece_together(self._path):
            if not batch.batch_id:
                continue
            fields = await redis.hgetall(keys.BATCH + batch.batch_id)
            texts = await redis.mget([keys.MESSAGE + message_id for message_id in batch.ids])
            kept = await redis.get(keys.BATCH_RESULTS + batch.batch_id)
            body = orjson.loads(kept) if kept else {"results": [None]}
            self._writer.write(
                "kept",
                n=batch.n,
                batch={name.decode(): value.decode() for name, value in fields.items()},
                messages=[_shown(orjson.loads(text)) if text else None for text in texts],
                digest=digest(body["results"][0] if batch.kind == "single" else body),
            )

    async def read_history(self, url: str) -> None:
        """Write down the rows that a PostgreSQL has of every batch."""
        connection = await asyncpg.connect(url)
        try:
            messages = _by(await connection.fetch("SELECT * FROM messages ORDER BY position"), "batch_id")
            webhooks = _by(await connection.fetch("SELECT * FROM webhooks"), "batch_id")
            batches = _by(await connection.fetch("SELECT * FROM batches"), "batch_id")
        finally:
            await connection.close()
        for batch in piece_together(self._path):
            self._writer.write(
                "recorded",
                n=batch.n,
                batch=batches.get(batch.batch_id, [None])[0],
                messages=[_shown(row) for row in messages.get(batch.batch_id, [])],
                webhooks=[
                    {name: row[name] for name in ("job_id", "webhook_id", "status", "finished_ms")}
                    for row in webhooks.get(batch.batch_id, [])
                ],
            )

    async def close(self) -> None:
        """Stop all clients."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writer.__exit__(None, None, None)

    def __repr__(self) -> str:
        return f"<Senders sent={self.sent} closed={self.closed} open={len(self._open)}>"


def mark(number: int, position: int) -> str:
    """Return what the prompt of a message ends with: the replicas know whose it is, whatever the job is called."""
    return f"Batch {number}, message {position}."


def _question(subject: str) -> str:
    return f"Which key does the {subject} keep?"


def _by(rows: Iterable[Any], name: str) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for row in rows:
        plain = dict(row)
        for column in ("result", "error"):
            if isinstance(plain.get(column), str):
                plain[column] = orjson.loads(plain[column])
        plain.pop("timings_ms", None)
        found.setdefault(plain[name], []).append(plain)
    return found


def _shown(said: Json) -> Json:
    """Return what matters of a message: of an outcome, of one of the results of its batch, or of a row."""
    result, error = said.get("result") or {}, said.get("error") or {}
    named = {"id": said.get("message_id") or said.get("id"), "status": said["status"]}
    about = {name: said.get(name) for name in ("worker", "replica", "attempts")}
    return named | {"code": error.get("code"), "answer": result.get("answer")} | about


# --- what the file says --------------------------------------------------------------------------


@dataclass(slots=True)
class Batch:
    """What is known of one batch, pieced together from the file.

    Attributes:
        batches: every id that it was accepted under, each with the ids of its messages; more than one is a fault.
        seen: what a client read of it, closed, in order: `standing`, `results`, `digest`.
        kept, recorded: what Redis and the history have in the end; None when they were not read.
        refusals, unknowns: what clients heard otherwise.
    """

    n: int
    queue: str
    kind: str
    size: int
    subject: str
    batches: dict[str, Sequence[str]] = field(default_factory=dict)
    seen: list[Json] = field(default_factory=list)
    kept: Json | None = None
    recorded: Json | None = None
    refusals: list[str] = field(default_factory=list)
    unknowns: list[str] = field(default_factory=list)
    crashed: str | None = None

    @property
    def batch_id(self) -> str:
        """The id it was accepted under first; "" when it was not accepted."""
        return next(iter(self.batches), "")

    @property
    def ids(self) -> Sequence[str]:
        """Its messages, in the order given."""
        return self.batches.get(self.batch_id, ())


def piece_together(path: Path) -> list[Batch]:
    """Return every batch in a file, in the order of sending."""
    found: dict[int, Batch] = {}
    for line in read(path):
        number = line["n"]
        match line["event"]:
            case "sent":
                found[number] = Batch(number, line["queue"], line["kind"], line["size"], line["subject"])
            case "accepted":
                found[number].batches.setdefault(line["batch_id"], line["ids"])
            case "refused":
                found[number].refusals.append(line["code"])
            case "unknown":
                found[number].unknowns.append(line["code"])
            case "client_crashed":
                found[number].crashed = line["code"]
            case "seen":
                found[number].seen.append(line)
            case "kept":
                found[number].kept = line
            case "recorded":
                found[number].recorded = line
    return list(found.values())

"""Clients in open loop: each request is sent at its planned instant, however the earlier ones fare.

Several kinds of clients, since each learns of its job in another way:

- `ask` waits for its answer on the open connection;
- `background` takes a job id and looks for the outcome later;
- `keyed` does so too, with an Idempotency-Key: whenever it hears nothing it sends again, and so always learns the id;
- `foreign` is another program: it puts a question on `job:encoder_in` under an id of its own;
- `prompt` likewise, on `job:llm_in`;
- `edit` sends the next version of one document, each after the one before was accepted; `consult` asks what it says.

A `foreign` or `prompt` client may also send an entry once more under an id that has had its outcome (`again`), as a
sender that crashed would: nothing may come of it.

Outcomes are read where the contract says they stand, in `job:completion:<id>`, read a second time a while later, and
once more when all is quiet, as far as they are kept so long: an outcome never changes. Every question has one right
answer, so one that went to somebody else is noticed.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, deque
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from itertools import takewhile
from random import Random
from typing import Any, Final

import aiohttp
import orjson
from redis.exceptions import RedisError

from pipeline import keys
from tests.faults.cluster import LEASE_S, Cluster
from tests.faults.history import Json, Writer

LOOK_EVERY_S: Final = 0.05
LOOK_AT_ONCE: Final = 500
AGAIN_AFTER_S: Final = 2 * LEASE_S
"""When an outcome is read for the second time: after any frozen worker has woken up and tried its worst."""
PATIENCE_S: Final = 45.0
"""How long a keyed client goes on sending."""
QUIET_S: Final = 150.0
"""How long the quiet phase waits for what is still missing: longer than a question lives (60 s) and than a call for a
prompt may hang (120 s), so that everybody has heard something, be it that the deadline is over."""

KEPT_BY: Final = {
    "heron": "amber", "otter": "bronze", "lynx": "copper", "raven": "crimson", "badger": "ivory", "falcon": "jade",
    "marten": "obsidian", "stork": "pearl", "viper": "ruby", "walrus": "silver", "yak": "topaz", "zebra": "violet",
}  # fmt: skip
"""What the documents say: `The heron keeps the amber key.`"""

Mix = Mapping[str, float]
EVERYBODY: Final[Mix] = {"ask": 3, "background": 2, "keyed": 2, "foreign": 2, "prompt": 1, "edit": 0.2, "consult": 0.4}


class Load:
    """Clients of one cluster.

    Args:
        rng: who asks what.
        clients: what depends on when an answer comes: how long clients wait, and which of them send again.
        mix: kinds of clients and how many of each there are, in proportion.
        again: share of foreign entries that are sent once more after their outcome.
        fields: further fields of every query (`priority`, `timeout_s`).
        first: how many requests the same file holds already.
        padding: characters by which every question is longer than it need be.

    Attributes:
        sent, answered: requests so far, and outcomes heard.
        lost: outcomes that were a loss, by the code with which the clients heard of it.
        refused: refusals, by their code; one client may hear several.
        waiting: clients with an open connection, by their gateway's address.
    """

    def __init__(
        self,
        cluster: Cluster,
        writer: Writer,
        rng: Random,
        clients: Random,
        mix: Mix = EVERYBODY,
        *,
        again: float = 0.1,
        fields: Mapping[str, Any] | None = None,
        first: int = 0,
        padding: int = 0,
    ) -> None:
        self.sent = first
        self.answered = 0
        self.lost: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self._first = first
        self._padding = " Please." * (padding // 8)
        self._cluster = cluster
        self._writer = writer
        self._rng = rng
        self._clients = clients
        self._kinds, self._weights = list(mix), list(mix.values())
        self._again = again
        self._fields = dict(fields or {})
        self._open: dict[str, int] = {}  # accepted, not ended: job id and number
        self._once_more: deque[tuple[float, str, int, str]] = deque()  # due, id, number, kind
        self._seen: dict[str, int] = {}  # outcomes seen a second time: job id and number
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = 0
        self._editing = asyncio.Lock()
        self._edits: dict[str, int] = {}  # versions under way: job id and page
        self._page = 0  # of the newest version that is done
        self._is_quiet = False  # all was waited for: whoever has heard nothing now will hear nothing

    @property
    def numbers(self) -> range:
        """The requests sent so far."""
        return range(self._first + 1, self.sent + 1)

    @property
    def open(self) -> frozenset[str]:
        """Jobs whose acceptance the clients heard of and whose outcome they did not."""
        return frozenset(self._open)

    async def prepare(self) -> None:
        """Index the documents that the questions are about, and a first version of the one that is edited."""
        texts = {animal: f"The {animal} keeps the {stone} key." for animal, stone in KEPT_BY.items()}
        if "consult" in self._kinds:
            self._page = self._first + 1  # no edit can be of an earlier page
            texts["ledger"] = f"The ledger stands at page {self._page}."
        for name, text in texts.items():
            body = {"id": name, "text": text}
            url = f"{self._cluster.gateway_urls[0]}/documents"
            async with self._cluster.http.post(url, json=body, headers={"idempotency-key": f"doc-{name}"}) as answer:
                answer.raise_for_status()
        while await self._cluster.live_jobs():
            await asyncio.sleep(LOOK_EVERY_S)

    # --- sending ---------------------------------------------------------------------------------

    async def run(self, jobs: int, rate: float) -> None:
        """Send *jobs* requests, *rate* per second; return when the last is on its way."""
        began_s = time.monotonic()
        for number in range(jobs):
            delay_s = began_s + number / rate - time.monotonic()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            self.send(self._rng.choices(self._kinds, self._weights)[0])

    def send(self, kind: str, suffix: str = "", **fields: Any) -> int:
        """Send one request of a kind now, its question followed by *suffix*; return its number.

        Args:
            fields: of the query's body; `key` is the Idempotency-Key of an `ask`.
        """
        self.sent += 1
        self._is_quiet = False
        number = self.sent
        subject = str(self._page) if kind in {"edit", "consult"} else self._rng.choice(list(KEPT_BY))
        self._writer.write("submitted", n=number, kind=kind, subject=subject)
        kinds = {
            "ask": self._ask, "background": self._background, "keyed": self._keyed, "consult": self._ask,
            "edit": self._edit,
        }  # fmt: skip
        work = kinds.get(kind, self._add)
        text = question(number, subject) + self._padding + suffix
        self._spawn(work(number, kind, text, self._fields | fields), number)
        return number

    def _spawn(self, work: Awaitable[object], number: int, name: str = "client") -> None:
        task = asyncio.create_task(self._live(work, number), name=f"{name} {number}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, work: Awaitable[object], number: int) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - a client's outermost edge: the history tells, and the judge reads it
            self._writer.write("client_crashed", n=number, code=f"{type(error).__name__}: {error}"[:200])

    def chorus(self, voices: int, key: str, heard: list[Json]) -> int:
        """Ask one question *voices* times at once under one Idempotency-Key, each voice until it hears an answer.

        Args:
            heard: every answer is put there as it comes.
        Returns:
            The number of all of it: in the history it is one request.
        """
        self.sent += 1
        number, subject = self.sent, self._rng.choice(list(KEPT_BY))
        self._writer.write("submitted", n=number, kind="chorus", subject=subject)
        body = {"query": question(number, subject), **self._fields}

        async def voice() -> None:
            while not await self._post(number, body, key, heard):
                await asyncio.sleep(self._clients.uniform(0.1, 0.5))

        for _ in range(voices):
            self._spawn(voice(), number, "voice")
        return number

    def leave(self, number: int, job_id: str) -> None:
        """Have the client of a request hang up; its outcome is looked for under *job_id*, which it never heard."""
        for task in self._tasks:
            if task.get_name() == f"client {number}":
                task.cancel()
        self._writer.write("accepted", n=number, id=job_id)
        self._open[job_id] = number

    async def _ask(self, number: int, kind: str, text: str, fields: Json) -> None:
        key = fields.pop("key", "")
        await self._post(number, {"query": text, **fields}, key)

    async def _background(self, number: int, kind: str, text: str, fields: Json) -> None:
        await self._post(number, {"query": text, "background": True, **fields})

    async def _keyed(self, number: int, kind: str, text: str, fields: Json) -> None:
        body = {"query": text, "background": True, **fields}
        give_up_s = time.monotonic() + PATIENCE_S
        while not await self._post(number, body, key=f"request-{number}") and time.monotonic() < give_up_s:
            await asyncio.sleep(self._clients.uniform(0.1, 0.5))

    async def _edit(self, number: int, kind: str, text: str, fields: Json) -> None:
        body = {"id": "ledger", "text": f"The ledger stands at page {number}."}
        async with self._editing:
            give_up_s = time.monotonic() + PATIENCE_S
            while not await self._post(number, body, key=f"edit-{number}", path="/documents"):
                if time.monotonic() > give_up_s:
                    return
                await asyncio.sleep(self._clients.uniform(0.1, 0.5))

    async def _post(
        self, number: int, body: Json, key: str = "", heard: list[Json] | None = None, path: str = "/query"
    ) -> bool:
        """Send a query or a document, note what was heard (in *heard*, too), and say whether that was a decision."""
        headers = {"idempotency-key": key} if key else {}
        urls = self._cluster.gateway_urls
        self._turn += 1
        for attempt in range(len(urls)):  # as a load balancer would: the next one, when nobody listens here
            url = urls[(self._turn + attempt) % len(urls)]
            self.waiting[url] += 1
            try:
                async with self._cluster.http.post(url + path, json=body, headers=headers) as answer:
                    text = await answer.read()
                    try:
                        reply = orjson.loads(text)
                    except orjson.JSONDecodeError:
                        raise ValueError(f"HTTP {answer.status} with {text[:80]!r}") from None
                    is_decided = self._heard(number, answer.status, reply)
                    if is_decided and heard is not None:
                        heard.append(reply)
                    return is_decided
            except aiohttp.ClientConnectorError as error:
                if attempt == len(urls) - 1:
                    self._writer.write("refused", n=number, code=type(error).__name__)
            except (aiohttp.ClientError, TimeoutError) as error:
                self._writer.write("unknown", n=number, code=type(error).__name__)
                return False
            finally:
                self.waiting[url] -= 1
        return False

    def _heard(self, number: int, status: int, body: Json) -> bool:
        job_id = body.get("job_id")
        code = body.get("error", {}).get("code", "")
        if job_id is not None:
            self._writer.write("accepted", n=number, id=job_id)
            if status == 200:
                outcome = {name: body.get(name) for name in ("worker", "replica", "answer")}
                self._ended(number, job_id, "ask", {"status": "completed", **outcome})
                self._writer.write("spans", n=number, spans=body["timings_ms"])
            elif code == "job_lost":
                self._ended(number, job_id, "ask", {"status": "lost", "code": code})
            else:  # accepted, or ended otherwise than well: the completion says how
                if status == 500:
                    self._writer.write("client_crashed", n=number, code=f"HTTP 500 {code}")
                if "id" in body:
                    self._edits[job_id] = number
                self._open[job_id] = number
            return True
        if code in {"redis_unavailable", "maybe_accepted"}:
            self._writer.write("unknown", n=number, code=code)
            return False
        self.refused[code] += 1
        self._writer.write("refused", n=number, code=code)
        return status not in {429, 503}

    async def _add(self, number: int, kind: str, text: str, fields: Json) -> None:
        job_id = f"{kind}-{number}"
        stage, name = ("llm", "prompt") if kind == "prompt" else ("encoder", "query")
        body = {name: text}
        wish = {name: fields[name] for name in ("priority", "timeout_s") if name in fields}
        entry = {"data": orjson.dumps({"id": job_id, **body, **wish})}
        try:
            await self._cluster.redis.xadd(keys.stream(stage), entry)
        except RedisError as error:
            self._writer.write("unknown", n=number, code=type(error).__name__)
            return
        self._writer.write("accepted", n=number, id=job_id)
        self._open[job_id] = number

    # --- looking ---------------------------------------------------------------------------------

    async def look_forever(self) -> None:
        """Look for outcomes, and for those found once more a while later; until cancelled."""
        while True:
            now_s = time.monotonic()
            with suppress(RedisError):  # away: nothing is known, and nothing is noted
                await self._look({job_id: (number, "") for job_id, number in list(self._open.items())})
                due = list(takewhile(lambda look: look[0] <= now_s, self._once_more))  # noqa: B023
                await self._look({job_id: (number, kind) for _, job_id, number, kind in due})
                for look in due:  # only now: until it was read again, the quiet phase waits for it
                    if self._once_more and self._once_more[0] == look:
                        self._once_more.popleft()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, wanted: Mapping[str, tuple[int, str]]) -> None:
        """Read outcomes: for the first time, `again`, or `last`, when it may be forgotten by now."""
        ids = list(wanted)
        for i in range(0, len(ids), LOOK_AT_ONCE):
            some = ids[i : i + LOOK_AT_ONCE]
            values = await self._cluster.redis.mget([keys.COMPLETION + job_id for job_id in some])
            for job_id, value in zip(some, values, strict=True):
                number, seen_by = wanted[job_id]
                if value is not None:
                    self._ended(number, job_id, seen_by, distil(orjson.loads(value)))
                elif seen_by == "again":
                    self._writer.write("outcome", n=number, id=job_id, outcome={"status": "vanished"})

    def _ended(self, number: int, job_id: str, seen_by: str, outcome: Json) -> None:
        self._writer.write("outcome", n=number, id=job_id, outcome=outcome)
        self._open.pop(job_id, None)
        page = self._edits.pop(job_id, 0)
        if outcome["status"] == "completed":
            self._page = max(self._page, page)
        if seen_by == "again":
            self._seen[job_id] = number
        if seen_by in {"again", "last"}:
            return
        self.answered += 1
        if outcome["status"] == "lost":
            self.lost[outcome["code"]] += 1
        else:
            self._once_more.append((time.monotonic() + AGAIN_AFTER_S, job_id, number, "again"))
        is_foreign = job_id.startswith(("foreign-", "prompt-"))
        if is_foreign and self._clients.random() < self._again:
            self._spawn(self._send_again(job_id), number, "sender")

    async def _send_again(self, job_id: str) -> None:
        stage, body = (
            ("encoder", {"query": "What is this?"}) if job_id.startswith("foreign") else ("llm", {"prompt": "?"})
        )
        try:
            await self._cluster.redis.xadd(keys.stream(stage), {"data": orjson.dumps({"id": job_id, **body})})
        except RedisError:
            return  # one sender less that repeats itself: nothing was promised

    async def ask_after(self) -> int:
        """Ask the gateway after every open job, as a client that waits in the background; note and count the unknown.

        To be called when nothing is on its way: a foreign job is unknown until the first worker has read it.
        """
        unknown = 0
        for job_id, number in list(self._open.items()):
            async with self._cluster.http.get(f"{self._cluster.gateway_urls[0]}/jobs/{job_id}") as answer:
                body = await answer.json()
            if answer.status == 404 and job_id in self._open:
                unknown += 1
                self._ended(number, job_id, "ask", {"status": "lost", "code": body["error"]["code"]})
        return unknown

    def forget(self) -> None:
        """Read no outcome seen so far another time: none of them is there any more."""
        self._once_more.clear()
        self._seen.clear()

    async def quiet(self, patience_s: float = QUIET_S) -> None:
        """Wait until every client has heard, at most *patience_s*, and every outcome was read twice; look again."""
        give_up_s = time.monotonic() + patience_s
        while (self._tasks or self._open) and time.monotonic() < give_up_s:
            await asyncio.sleep(LOOK_EVERY_S)
        while self._once_more and time.monotonic() < give_up_s + 2 * AGAIN_AFTER_S:
            await asyncio.sleep(LOOK_EVERY_S)
        await self._look({job_id: (number, "last") for job_id, number in self._seen.items()})
        self._is_quiet = True

    async def close(self) -> None:
        """Stop all clients; those that still wait for something give up."""
        for task in list(self._tasks):
            name, _, number = task.get_name().partition(" ")
            if name != "sender":
                self._writer.write("gave_up", n=int(number), is_quiet=self._is_quiet)
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __repr__(self) -> str:
        return f"<Load sent={self.sent} answered={self.answered} open={len(self._open)} at_work={len(self._tasks)}>"


def question(number: int, subject: str) -> str:
    """Return what client *number* asks; a number as subject is the page that the ledger stands at or beyond."""
    if subject.isdecimal():
        return f"At which page does the ledger stand? Request {number}."
    return f"Which key does the {subject} keep? Request {number}."


def is_right(kind: str, number: int, subject: str, answer: str) -> bool:
    """Say whether *answer* is the one to that question."""
    if kind == "prompt":
        return question(number, subject) in answer
    if kind == "consult":
        return page_in(answer) > 0 or subject == "0"  # before the first version there is nothing to tell
    return f"the {KEPT_BY[subject]} key" in answer


def page_in(answer: str) -> int:
    """Return the page that an answer says the ledger stands at, 0 when it says none."""
    found = re.search(r"The ledger stands at page (\d+)\.", answer)
    return int(found[1]) if found else 0


def distil(completion: Json) -> Json:
    """Return what of an outcome must never change, in few bytes."""
    outcome: Json = {name: completion.get(name) for name in ("status", "worker", "replica", "attempts", "finished_us")}
    if completion.get("result"):
        outcome["answer"] = completion["result"].get("answer")
    if completion.get("error"):
        outcome["code"] = completion["error"]["code"]
    spans_ms = completion.get("timings_ms", {}).values()
    outcome["shortest_ms"], outcome["longest_ms"] = min(spans_ms, default=0.0), max(spans_ms, default=0.0)
    return outcome

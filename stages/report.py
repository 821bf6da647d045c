"""Reports: the loop that takes requests from other back ends, and the stage that has them written.

A report's job comes to the stage twice. The first time passages of the knowledge base were found for it: then the
finished report of somebody who asked the same may serve; another job that is writing that very report is waited for; or
this job goes on to the llm stage with everything the model is to be told. The second time it brings the model's answer:
one that is no report is sent back once, with what is wrong with it.

Nothing here logs or counts what inputs and reports say, and what is said of wrong ones quotes none of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import orjson
import structlog
from prometheus_client import Counter

from pipeline import metrics, report_types
from pipeline.connection import Backoff, CommandRefused, Link, Outage
from pipeline.errors import MalformedEntry, PenstockError, Reject, RetryLater, WrongField
from pipeline.job import Done, Job, Json, is_valid_id
from pipeline.report_types import ReportType, Source, Written
from pipeline.reports import Reports, RequestStream, data_of, find_ids, hash_of
from pipeline.stage import Context, Loop, Stage, Stopped, unless

if TYPE_CHECKING:
    from pipeline.clock import Clock
    from pipeline.group_reader import Entry
    from pipeline.settings import Settings

AGAIN_S: Final = (0.5, 5.0)
"""Between looks for the report that another job is writing: a tenth of the time it has taken, within these bounds."""
FULL_AGAIN_S: Final = 1.0
"""Between tries to accept a request while there is too much unfinished work."""

REQUESTS = Counter(
    "penstock_report_requests_total", "Requests taken from the stream, by what became of them", ["outcome"]
)
LOOKUPS = Counter(
    "penstock_report_cache_lookups_total", "Looks for a finished report: hit, shared (being written), miss", ["outcome"]
)
OUTPUTS = Counter("penstock_report_outputs_total", "Answers of the model: valid, asked again, invalid", ["outcome"])
for _outcome in ("accepted", "refused", "repeated", "malformed", "poison", "lost", "stuck"):
    REQUESTS.labels(_outcome)  # a counter that begins at 1 shows no increase
for _outcome in ("hit", "shared", "miss"):
    LOOKUPS.labels(_outcome)
for _outcome in ("valid", "asked_again", "invalid"):
    OUTPUTS.labels(_outcome)

log = structlog.get_logger(__name__)


def build(settings: Settings) -> Sequence[Stage | Loop]:
    """Return the stage, and the loop that feeds it from the stream of requests."""
    return Report(settings), Requests(settings)


class Report(Stage):
    """Has a report written, or finds it."""

    name = "report"

    def __init__(self, settings: Settings) -> None:
        self.slots = settings.reports.prefetch
        self._model = settings.llm.model
        self._max_tokens = settings.reports.max_tokens
        self._context: Context

    async def start(self, context: Context) -> None:
        """Learn where finished reports are."""
        self._context = context

    async def handle(self, job: Job) -> Done:
        """Find the report, or ask for it; later on, read what the model wrote.

        Raises:
            Reject: there is no such type, or no such person (any more), or the model gave no report twice.
            RetryLater: another job is writing the same report; nothing is charged.
        """
        try:
            kind = report_types.find(job.payload["report_type"])
            inputs = kind.read_inputs(job.payload["inputs"])
        except WrongField as error:  # the type has changed since the request was accepted
            raise Reject(str(error), code="invalid_field") from None
        if job.route:
            return await self._ask(job, kind, inputs)
        return self._read(job, kind, inputs)

    async def _ask(self, job: Job, kind: ReportType[Any, Any], inputs: Any) -> Done:
        passages = job.state.get("sources", [])
        sources = [
            Source(number, one["title"], one["document"], one["text"]) for number, one in enumerate(passages, start=1)
        ]
        messages = kind.ask(inputs, sources, job.payload["language"])
        what = hash_of(job, messages, self._model)
        found = await self._context.reports.find(job, what)
        match found.word:
            case "cached":
                LOOKUPS.labels("hit").inc()
                return Done({"cached": True, "hash": what, "report": found.report}, route=())
            case "wait":
                LOOKUPS.labels("shared").inc()
                waited_s = self._context.clock.now_us() / 1e6 - job.accepted_us / 1e6
                after_s = min(max(AGAIN_S[0], waited_s / 10), AGAIN_S[1])
                message = "another job is writing this report"
                raise RetryLater(message, code="report_shared", after_s=after_s, charged=False)
            case "forgotten":  # the script that ends the job would say so, too, but the model need not be asked
                raise Reject("the data of this user were deleted", code="user_deleted")
        LOOKUPS.labels("miss").inc()
        named = [{"number": one.number, "title": one.title, "document": one.document} for one in sources]
        return Done(
            {
                "ask": {
                    "messages": messages,
                    "response_format": kind.response_format(len(sources)),
                    "max_tokens": self._max_tokens,
                },
                "sources": named,  # their texts stand in the prompt
                "hash": what,
            }
        )

    def _read(self, job: Job, kind: ReportType[Any, Any], inputs: Any) -> Done:
        state = job.state
        sources = [Source(**one) for one in state["sources"]]
        try:
            content = kind.read_answer(state["answer"], len(sources))
        except Reject as problem:
            if state.get("asked_again"):
                OUTPUTS.labels("invalid").inc()
                raise Reject(f"the model gave no valid report: {problem}", code="invalid_output") from None
            OUTPUTS.labels("asked_again").inc()
            again = [*state["ask"]["messages"], *_once_more(state["answer"], str(problem))]
            return Done({"asked_again": True, "ask": state["ask"] | {"messages": again}}, route=("llm", self.name))
        OUTPUTS.labels("valid").inc()
        written_at = datetime.fromtimestamp(self._context.clock.now_ms() // 1000, UTC)
        language = job.payload["language"]
        written = Written(inputs, content, sources, str(state.get("model")), f"{written_at:%Y-%m-%d}", language)
        report = {
            "report_type": kind.name,
            "version": kind.version,
            "language": language,
            "machine_written": True,
            "model": state.get("model"),
            "written_at": f"{written_at:%Y-%m-%dT%H:%M:%SZ}",
            "content": content.model_dump(mode="json"),
            "sources": state["sources"],
            "markdown": kind.markdown(written),
        }
        return Done({"cached": False, "report": report})


def _once_more(answer: str, problem: str) -> list[Json]:
    said = f"That is not what was asked for: {problem}. Answer again with the whole JSON object, and nothing else."
    return [{"role": "assistant", "content": answer or "(nothing)"}, {"role": "user", "content": said}]


# --- requests ----------------------------------------------------------------------------------


class Requests(Loop):
    """Makes jobs of the requests of other back ends; any number may run.

    An entry stays in the stream until the script that accepts or refuses its request takes it away. So whatever happens
    in between may happen again, here or in another process, and one answer comes of it.
    """

    name = "requests"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redis = Backoff(settings.redis.reconnect_cap_s, Outage(self.name))

    async def run(self, consumer: str, clock: Clock, stop: asyncio.Event) -> None:
        """Take requests until *stop*."""
        self._worker, self._stop = self._settings.worker.name or consumer.partition(":")[0], stop
        self._stream = RequestStream(self._settings, consumer, clock)
        self._reports = Reports(Link(self._settings.redis, "requests"), self._settings, clock)
        ready = metrics.READY.labels(self.name)
        try:
            while not stop.is_set():
                try:
                    entries = await unless(self._stream.take(), self._stop)
                    self.not_ready = None
                    ready.set(1)
                    for entry in entries:
                        await unless(self._take_or_leave(entry), self._stop)
                except PenstockError as error:  # Redis is away or full, or a key is of a wrong type: requests wait
                    self.not_ready = str(error)
                    ready.set(0)
                    self._stream.look_again()
                    await unless(self._redis.failed(error), self._stop)
                else:
                    self._redis.succeeded()
        except Stopped:
            return  # what is in hand is another's as soon as the lease is gone
        finally:
            ready.set(0)
            await self._stream.close()
            await self._reports.close()

    async def _take_or_leave(self, entry: Entry) -> None:
        """Have a request accepted or refused; one that Redis refuses stays, and others pass."""
        try:
            await self._take(entry)
        except CommandRefused as error:  # a key of a wrong type: an operator must act
            log.error("redis refuses a request; it stays", stage=self.name, error=str(error))  # noqa: TRY400 - no stack is needed
            REQUESTS.labels("stuck").inc()

    async def _take(self, entry: Entry) -> None:
        """Have a request accepted or refused."""
        if not entry.fields:  # deleted by hand
            await self._stream.drop(entry)
            return
        data = data_of(entry.fields)
        request_id = user_id = ""
        try:
            body = self._read(data, entry.deliveries)
            request_id = body.pop("request_id")
            if is_valid_id(body.get("user_id")):
                user_id = body["user_id"]
            word = await self._accept(entry, body, request_id)
        except MalformedEntry as error:
            word = await self._refuse(entry, error.job_id or "", error.code, str(error), bury=True)
            if word == "refused":
                word = "poison" if error.code == "poison" else "malformed"
        except WrongField as error:
            word = await self._refuse(entry, request_id, "invalid_field", str(error), bury=False, user_id=user_id)
        except PenstockError:
            raise
        except Exception as error:  # noqa: BLE001 - a kind of report has broken; what it says may quote somebody
            message = f"the request could not be read: {type(error).__name__}"
            word = await self._refuse(entry, request_id, "handler_error", message, bury=True, user_id=user_id)
        REQUESTS.labels(word).inc()

    def _read(self, data: bytes | None, deliveries: int) -> Json:
        """Return a request whose id can be an id.

        Raises:
            MalformedEntry: it cannot be read; `job_id` is the id of the request, where one was found.
        """
        if data is None:
            raise MalformedEntry("the entry has no field `data`", code="no_data")
        if deliveries > self._settings.worker.max_deliveries:
            message = f"{deliveries - 1} consumers died with this entry in hand"
            raise MalformedEntry(message, code="poison", job_id=find_ids(data)[0])
        if len(data) > self._settings.reports.max_request_bytes:
            most = self._settings.reports.max_request_bytes
            raise MalformedEntry(f"a request has at most {most} bytes", code="too_large", job_id=find_ids(data)[0])
        try:
            body = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            message = f"the entry's `data` is not JSON: {error.msg}"
            raise MalformedEntry(message, code="not_json", job_id=find_ids(data)[0]) from None
        if not isinstance(body, dict):
            raise MalformedEntry("the entry's `data` is JSON, but no object", code="not_a_request")
        if not is_valid_id(body.get("request_id")):
            message = "request_id: 1 to 128 characters out of A-Z a-z 0-9 . _ : -"
            raise MalformedEntry(message, code="bad_request_id")
        return body

    async def _accept(self, entry: Entry, body: Json, request_id: str) -> str:
        while await self._stream.holds(entry):  # else it was withdrawn, and who it was about is not to be made known
            # With a new job each time: its life begins when there is room for it.
            word = await self._stream.accept(entry, await self._reports.job(body, request_id=request_id))
            if word not in {"overloaded", "backlog"}:
                return word
            self.not_ready = "there is too much unfinished work; requests wait"
            await asyncio.sleep(FULL_AGAIN_S)
        return "lost"

    async def _refuse(
        self, entry: Entry, request_id: str, code: str, message: str, *, bury: bool, user_id: str = ""
    ) -> str:
        word = await self._stream.refuse(entry, request_id, code, message, self._worker, bury=bury, user_id=user_id)
        if word == "refused":
            log.warning("a request was refused", stage=self.name, worker=self._worker, code=code)
            if bury:
                metrics.DEAD_LETTERS.labels(Report.name, code).inc()
        return word

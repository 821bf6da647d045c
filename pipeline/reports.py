"""Reports: a request becomes a job, a finished report is found again, a person is forgotten.

A request comes from the stream `report_generation_requests` (`RequestStream`) or over HTTP; both make the job by
`Reports.job`. What a request means is decided here. That it becomes one job and has one response is decided by
scripts: `request.lua` takes the entry away as it accepts or refuses, and the script that ends a job (`end_report` in
the prelude) writes response, cache and the event for the history in one step.

A person has an epoch, a random name that lasts until they are erased. Whatever is made of what they sent carries it,
and is stored nowhere once it is nobody's any more. docs/REPORTS.md tells the whole life of a report.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import orjson
from pydantic import ConfigDict, Field, StringConstraints, ValidationError

from pipeline import flows, keys, report_types, scripts
from pipeline.connection import within
from pipeline.errors import WrongField
from pipeline.flows import FLOWS, Name, ReportPayload, field_path, plain_message
from pipeline.group_reader import Entry, GroupReader
from pipeline.job import DEFAULT_TENANT, OURS, Job, Json, error_body, is_valid_id, new_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pipeline.clock import Clock
    from pipeline.connection import Argument, Link
    from pipeline.settings import Settings

GROUP: Final = "report"
AT_ONCE: Final = 100
"""Requests, or dead letters, looked at in one call for those of one person."""

_BROKEN: Final = tuple(
    re.compile(rb'"%b"\s*:\s*"([A-Za-z0-9._:-]{1,128})"' % name) for name in (b"request_id", b"user_id")
)
"""Where ids stand in what is not JSON."""
_ERASED: Final = "the data of this user were deleted before the report was begun"


class ReportRequest(flows.Payload):
    """A report that is asked for. Without `inputs`, the fields that are not named here are the inputs."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    user_id: Name = Field(description="whom the report is about")
    report_type: Name = Field("medical", description="the kind of report")
    inputs: dict[str, Any] | None = Field(None, description="what the report is written from; see its kind")
    language: Annotated[str, StringConstraints(max_length=35, pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")] = Field(
        "en", description="of the report, as BCP 47 names it"
    )
    force_refresh: bool = Field(False, description="write it anew, also where a finished one would serve")
    reuse_last_input: bool = Field(False, description="fill inputs that are missing from those sent last for this user")


@dataclass(frozen=True, slots=True)
class Person:
    """Whom a report is about.

    Attributes:
        last_input: what was last asked for them, by `report_type` and `inputs`; empty when that is too long ago.
    """

    epoch: str
    last_input: Json


@dataclass(frozen=True, slots=True)
class Found:
    """What there is of a report that a job asks for."""

    word: Literal["cached", "wait", "write", "forgotten"]
    report: Json | None = None


class Reports:
    """Reports in Redis. Every method raises what `Link.run` does."""

    def __init__(self, link: Link, settings: Settings, clock: Clock) -> None:
        self._link = link
        self._settings = settings
        self._clock = clock

    async def close(self) -> None:
        """Close the connection."""
        await self._link.close()

    # --- asking ----------------------------------------------------------------------------------

    async def job(self, body: Json, tenant: str = DEFAULT_TENANT, request_id: str | None = None) -> Job:
        """Return the job that a request asks for; nothing is begun yet, and the clock of its life runs.

        Args:
            request_id: of a request that waits on the stream of responses.

        Raises:
            WrongField: of the request, or of its inputs.
        """
        request, given, prefix = read_request(body)
        kind = report_types.find(request.report_type)
        person = await self._person(keys.of_tenant(tenant, request.user_id))
        if request.reuse_last_input and person.last_input.get("report_type") == kind.name:
            given = person.last_input["inputs"] | given
        inputs = kind.read_inputs(given, prefix)
        settings = self._settings.reports
        payload = ReportPayload(
            report_type=kind.name,
            user_id=request.user_id,
            epoch=person.epoch,
            inputs=inputs.model_dump(mode="json", exclude_none=True),
            language=request.language,
            query=kind.query(inputs),
            collection=kind.collection,
            top_k=kind.top_k,
            request_id=request_id,
            is_fresh=request.force_refresh,
            keep_ms=int(settings.keep_s * 1000),
            keep_most=settings.max_responses,
            cache_ms=int(settings.cache_ttl_s * 1000),
            input_ms=int(settings.input_ttl_s * 1000),
        )
        job = flows.new_job(
            "report",
            payload,
            job_id=new_id(),
            now_ms=self._clock.now_ms(),
            lifetime_s=self._settings.lifetimes.report_s,
            tenant=tenant,
        )
        if kind.collection is None:
            job.route = [stage for stage in job.route if stage not in {"encoder", "retriever"}]
        return job

    async def _person(self, owner: str) -> Person:
        known_ms = int((self._settings.reports.keep_s + self._settings.lifetimes.report_s) * 1000)
        _, epoch, last = await self._link.run(scripts.PERSON, (), (owner, new_id(), known_ms))
        return Person(epoch.decode(), _read_last(last))

    # --- writing ---------------------------------------------------------------------------------

    async def find(self, job: Job, what: str) -> Found:
        """Return what there is of the report that *job* asks for; "write" makes it the one that writes it.

        What somebody else has put in a report's place counts as none.

        Args:
            what: the hash of what is asked, as `hash_of` makes it.
        """
        longest_ms = int(FLOWS[job.flow].longest_s * 1000)
        owner = keys.of_tenant(job.tenant, job.payload["user_id"])
        for fresh in ("fresh" if job.payload.get("is_fresh") else "", "fresh"):
            args = (what, job.id, longest_ms, fresh, owner, job.payload["epoch"])
            word, text = await self._link.run(scripts.REPORT, (), args)
            if word != b"cached":
                break
            if (report := _read_report(text)) is not None:
                return Found("cached", report)
        return Found(word.decode())

    # --- forgetting ------------------------------------------------------------------------------

    async def erase(self, user_id: str, tenant: str) -> str:
        """Forget a person in Redis, and have the history do so; return the name under which it will have done so.

        Requests of theirs that wait are answered, what is being written about them is stopped, and their dead letters
        go: every request that waits, and every letter, is looked at. May be repeated.
        """
        if tenant == DEFAULT_TENANT:
            await self._withdraw_requests(user_id)
        owner = keys.of_tenant(tenant, user_id)
        ttl_ms = int(self._settings.worker.completion_ttl_s * 1000)
        _, epoch = await within(self._link.run(scripts.ERASE, (), (owner, user_id, tenant, ttl_ms, new_id())))
        await self._discard_letters(user_id, tenant)
        return str(epoch.decode())

    async def _withdraw_requests(self, user_id: str) -> None:
        """Answer the requests about a person that wait, before they make them known anew.

        One that is accepted meanwhile is a job that carries the epoch that is forgotten next.
        """
        settings = self._settings.reports
        response = orjson.dumps(_error_response("user_deleted", _ERASED, None))[1:-1]
        async for entry, fields in self._newest_first(keys.REPORT_REQUESTS):
            request_id, about = find_ids(data_of(fields) or b"")
            if about == user_id:
                args = (GROUP, entry, request_id, int(settings.keep_s * 1000), response, settings.max_responses)
                await within(self._link.run(scripts.WITHDRAW, (), args))

    async def _discard_letters(self, user_id: str, tenant: str) -> None:
        """Discard the dead letters of reports about a person."""
        async for letter_id, fields in self._newest_first(keys.DEAD):
            if _is_about(data_of(fields) or b"", user_id, tenant):
                await within(self._link.call("XDEL", keys.DEAD, letter_id))

    async def _newest_first(self, stream: str) -> AsyncIterator[tuple[bytes, Sequence[bytes]]]:
        """Yield what stands in a stream now; not in one step, for there may be thousands."""
        last = "+"
        while rows := await within(self._link.call("XREVRANGE", stream, last, "-", "COUNT", AT_ONCE)):
            for row in rows:
                yield row
            last = "(" + rows[-1][0].decode()

    def __repr__(self) -> str:
        return f"<Reports over {self._link.name}>"


class RequestStream(GroupReader):
    """The stream of requests, read by the consumer of this name."""

    def __init__(self, settings: Settings, consumer: str, clock: Clock) -> None:
        most_deliveries = settings.worker.max_deliveries
        super().__init__(
            settings.redis, keys.REPORT_REQUESTS, GROUP, consumer, settings.reports.prefetch, min(2, most_deliveries)
        )
        self._settings = settings
        self._clock = clock
        self._keep_ms = int(settings.reports.keep_s * 1000)

    async def holds(self, entry: Entry) -> bool:
        """Say whether an entry that was taken is still in this consumer's hands."""
        args = (keys.REPORT_REQUESTS, GROUP, entry.id, entry.id, 1, self._consumer)
        return bool(await self.link.call("XPENDING", *args))

    async def accept(self, entry: Entry, job: Job) -> str:
        """Put *job* in the place of a request; return the script's word. May be sent again after an unknown reply."""
        stage, tail = job.launch()
        admission, history = self._settings.admission, self._settings.history
        return await self._let_go(
            entry, job.payload["request_id"], "accept", job.id, tail, keys.stream(stage, job.priority), job.deadline_ms,
            flows.record_of(job), admission.max_jobs, history.max_backlog,
        )  # fmt: skip

    async def refuse(
        self, entry: Entry, request_id: str, code: str, message: str, worker: str, *, bury: bool, user_id: str = ""
    ) -> str:
        """Answer a request with an error where its id could be read; return the script's word.

        Args:
            request_id: "" where none could be read.
            user_id: whom it is about; "" where that could not be read.
            message: quotes nothing that was sent.
            bury: whether the entry goes to the dead letters.
        """
        response = _error_response(code, message, worker)
        owner = keys.of_tenant(DEFAULT_TENANT, user_id)
        dead = self._settings.dead
        letter = self._letter(entry, request_id, code, message, worker) if bury else b""
        return await self._let_go(
            entry, request_id, "refuse", orjson.dumps(response)[1:-1], self._settings.reports.max_responses, letter,
            dead.max_letters, int(dead.max_age_s * 1000), owner,
        )  # fmt: skip

    async def drop(self, entry: Entry) -> None:
        """Forget an entry that somebody has deleted by hand while it was pending."""
        await self.link.call("XACK", keys.REPORT_REQUESTS, GROUP, entry.id)

    async def _let_go(self, entry: Entry, request_id: str, verb: str, *args: Argument) -> str:
        wanted_at = field_of(entry.fields, b"reply") or b""
        head: tuple[Argument, ...] = (
            GROUP, self._consumer, entry.id, request_id, self._keep_ms, wanted_at, verb,
        )  # fmt: skip
        reply = await self.link.run(scripts.REQUEST, (), (*head, *args))
        return str(reply[1].decode())

    def _letter(self, entry: Entry, request_id: str, code: str, message: str, worker: str) -> bytes:
        data = data_of(entry.fields)
        body = {
            "reason": code,
            "job_id": None,
            "error": error_body("failed", code, message),
            "attempts": 1,
            "deliveries": entry.deliveries,
            "stage": GROUP,
            "stream": keys.REPORT_REQUESTS,
            "entry": entry.id.decode(),
            "worker": worker,
            "at_ms": self._clock.now_ms(),
            "original": None if data is None else data.decode(errors="replace"),
        }
        return orjson.dumps(body)


# --- values ------------------------------------------------------------------------------------


def data_of(fields: Sequence[bytes]) -> bytes | None:
    """Return the field `data` of an entry, None where it has none."""
    return field_of(fields, b"data")


def field_of(fields: Sequence[bytes], wanted: bytes) -> bytes | None:
    """Return a field of an entry, None where it has none of this name."""
    pairs = zip(fields[::2], fields[1::2], strict=False)
    return next((value for name, value in pairs if name == wanted), None)


def find_ids(data: bytes) -> tuple[str, str]:
    """Return the `request_id` and the `user_id` in a request; of one that is not JSON, what looks like them first.

    "" stands for one that there is not, or that cannot be an id.
    """
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError:
        request_id, user_id = (pattern.search(data) for pattern in _BROKEN)
        return request_id[1].decode() if request_id else "", user_id[1].decode() if user_id else ""
    return _id_in(body, "request_id"), _id_in(body, "user_id")


def _id_in(body: Any, name: str) -> str:
    found = body.get(name) if isinstance(body, dict) else None
    return str(found) if is_valid_id(found) else ""


def _error_response(code: str, message: str, worker: str | None) -> Json:
    """Return the response, but for its request's id, to one that no job was made of."""
    return {
        "status": "error",
        "report_id": None,
        "report": None,
        "cached": False,
        "error_message": f"{code}: {message}",
        "worker": worker,
        "duration_ms": 0,
    }


def read_request(body: Json) -> tuple[ReportRequest, Json, str]:
    """Return a request, its inputs, and what the paths of these begin with.

    Raises:
        WrongField: the message quotes nothing that was given.
    """
    try:
        request = ReportRequest.model_validate(body)
    except ValidationError as error:
        lines = [f"{field_path(item['loc'])}: {plain_message(item['type'], item['msg'])}" for item in error.errors()]
        raise WrongField("; ".join(lines[:10]), param=field_path(error.errors()[0]["loc"])) from None
    beside = dict(request.model_extra or {})
    if request.inputs is None:
        return request, beside, ""
    if beside:
        name = sorted(beside)[0][:128]
        raise WrongField(f"{name}: there is no such field", param=name)
    return request, dict(request.inputs), "inputs."


def hash_of(job: Job, messages: Sequence[Json], model: str) -> str:
    """Return the name that a finished report is kept under: the same for who asks the same of the same knowledge.

    What the model is asked stands in it as a whole: inputs, the passages that were found for them, the prompt. So
    knowledge that has changed, where it matters for this report, and a prompt that has changed make another name.
    """
    kind = report_types.find(job.payload["report_type"])
    what = {
        "type": kind.name,
        "version": kind.version,
        "inputs": job.payload["inputs"],
        "language": job.payload["language"],
        "messages": messages,
        "documents": [one["document"] for one in job.state.get("sources", [])],
        "model": model,
    }
    digest = hashlib.sha256(orjson.dumps(what, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return keys.of_tenant(job.tenant, digest)


def _read_last(text: bytes) -> Json:
    """Return a person's last input; nothing where there is none, or where somebody else has written under its key."""
    try:
        last = orjson.loads(text)
        return last if isinstance(last["inputs"], dict) else {}
    except (ValueError, TypeError, KeyError):
        return {}


def _read_report(text: bytes) -> Json | None:
    try:
        report = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return report if isinstance(report, dict) and report.get("machine_written") is True else None


def _is_about(letter: bytes, user_id: str, tenant: str) -> bool:
    """Say whether a dead letter is that of a report about this person."""
    try:
        told = orjson.loads(letter)
        original = (told.get("original") or "").encode()
        if told.get("stream") == keys.REPORT_REQUESTS:
            return tenant == DEFAULT_TENANT and find_ids(original)[1] == user_id
        if not original.startswith(OURS):
            body = orjson.loads(original)
            if body.get("kind") == "report":  # an event that the database refused
                return bool(body["tenant"] == tenant and orjson.loads(body["data"])["user_id"] == user_id)
            return False
        job = orjson.loads(original)
        return bool(job["flow"] == "report" and job["tenant"] == tenant and job["payload"]["user_id"] == user_id)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False

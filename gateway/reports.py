"""The reports service over HTTP, for who does not speak to the streams: asked for here, read here.

What is accepted is the same job as a back end's request makes, but for its answer: a response goes to the stream for
requests from the stream only, since all back ends read that. A report is read from Redis while it is fresh, then from
history; a person's reports are listed from history.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final, Literal

from pydantic import BaseModel, Field, TypeAdapter

from gateway.asked import AFTER, LIMIT, Asked, from_redis, not_found, wrong
from gateway.jobs import JobError
from gateway.operation import Answer, Call, Operation, Parameter, answer
from pipeline.errors import HistoryUnavailable
from pipeline.flows import Name
from pipeline.job import Completion, Json, is_own_id
from pipeline.reports import ReportRequest, read_request

State = Literal["pending", "processing", "completed", "failed", "expired", "cancelled"]

ERASED_WITHIN_S: Final = 3.0
"""How long a deletion waits for the history to have done it; the recorder usually takes some hundredths of that."""
LOOK_EVERY_S: Final = 0.05

_USER_ID: Final[TypeAdapter[str]] = TypeAdapter(Name)


class ReportAccepted(BaseModel):
    """The report will be written, or is there already."""

    report_id: str


class ReportListed(BaseModel):
    """How a report stands."""

    report_id: str
    status: State
    user_id: str | None = None
    report_type: str | None = None
    language: str | None = None
    request_id: str | None = Field(None, description="of the request from the stream that asked for it")
    cached: bool | None = Field(None, description="whether it had been written for somebody who asked the same")
    error: JobError | None = None
    worker: str | None = None
    replica: str | None = None
    attempts: int | None = None
    timings_ms: dict[str, float] | None = None
    created_ms: int | None = None
    finished_ms: int | None = None


class ReportShown(ReportListed):
    """A report; `markdown` in it is for people."""

    report: dict[str, Any] | None = None


class ReportPage(BaseModel):
    """Some reports."""

    reports: list[ReportListed]
    next: str | None = Field(description="`after` for the next page; null after the last one")


class UserDeleted(BaseModel):
    """What was kept of a person is gone (`deleted`), or goes as soon as the history is reached (`deleting`)."""

    user_id: str
    status: Literal["deleted", "deleting"]


async def create(call: Call) -> Answer:
    """Ask for a report.

    What it is written from stands in `inputs`, or beside the other fields. 202 with its id; `GET /reports/{report_id}`
    tells how it stands.
    """
    await call.read(ReportRequest)
    read_request(call.body)  # what is wrong in itself is said without asking Redis
    job = await call.front.report_job(call.body, call.tenant)
    accepted = await call.submit(job, wait=False)
    headers = [(b"idempotent-replayed", b"true")] if accepted.repeated else []
    return answer({"report_id": accepted.job_id}, 202, headers)


async def look(call: Call) -> Answer:
    """Tell how a report stands, and the report when it is there."""
    report_id = call.path_id("report_id")
    found = await _find(call, report_id) if is_own_id(report_id) else None
    if found is None:
        raise not_found("report", report_id)
    return answer(found)


async def _find(call: Call, report_id: str) -> Json | None:
    standing = await from_redis(call.front.standing(report_id, call.tenant))
    if standing is not None:
        if standing.job.flow != "report":
            return None
        payload = standing.job.payload
        about = {name: payload.get(name) for name in ("user_id", "report_type", "language", "request_id")}
        status = "processing" if standing.where == "running" or standing.job.state else "pending"
        return _shown({"report_id": report_id, "status": status, **about})
    row = await _remembered(call, report_id)
    if row is not None and row["status"] not in {"pending", None}:
        return _shown(row)
    ended = await from_redis(call.front.look(report_id, call.tenant))
    if isinstance(ended, Completion):
        return _of_completion(ended, row or {})
    if row is None and call.gateway.records is not None:
        row = await call.history.report(call.tenant, report_id)  # it may have been written since, or cannot be read
    return None if row is None else _shown({**row, "status": row["status"] or "pending"})


async def _remembered(call: Call, report_id: str) -> Json | None:
    """Return what history knows; None also where it cannot be asked now: Redis may know enough."""
    try:
        return await call.history.report(call.tenant, report_id)
    except HistoryUnavailable:
        return None


def _of_completion(ended: Completion, row: Json) -> Json | None:
    result = ended.result or {}
    if ended.status == "completed" and "report" not in result:
        return None  # another service's job
    return _shown(
        row
        | {name: getattr(ended, name) for name in ("status", "error", "worker", "replica", "attempts", "timings_ms")}
        | {"report_id": ended.id, "report": result.get("report"), "cached": result.get("cached")}
        | {"finished_ms": ended.finished_us // 1000 or None}
    )


def _shown(row: Json, model: type[BaseModel] = ReportShown) -> Json:
    return {name: row[name] for name in model.model_fields if row.get(name) is not None}


async def list_of_user(call: Call) -> Answer:
    """List the reports about a person, the newest first; each of them is read at `/reports/{report_id}`."""
    user_id = _user_id(call)
    asked = Asked(call, {"after", "limit"})
    rows, after = await call.history.reports(call.tenant, user_id, after=asked.text("after"), limit=asked.limit())
    shown = [_shown({**row, "status": row["status"] or "pending"}, ReportListed) for row in rows]
    return answer({"reports": shown, "next": after})


async def delete_user(call: Call) -> Answer:
    """Delete all data of a person: reports, inputs, caches, responses on the stream.

    A report that is being written is stopped and answered with `user_deleted`. 200: all is gone. 202: it is in Redis,
    and goes from the history as soon as that can be written. It is no error when there is nothing.
    """
    user_id = _user_id(call)
    erasure = await call.front.erase(user_id, call.tenant)
    done = await _until_erased(call, erasure)
    return answer({"user_id": user_id, "status": "deleted" if done else "deleting"}, 200 if done else 202)


async def _until_erased(call: Call, erasure: str) -> bool:
    give_up_s = time.monotonic() + ERASED_WITHIN_S
    try:
        while not await call.history.has_erased(call.tenant, erasure):
            if time.monotonic() > give_up_s:
                return False
            await asyncio.sleep(LOOK_EVERY_S)
    except HistoryUnavailable:
        return False
    return True


def _user_id(call: Call) -> str:
    try:
        return _USER_ID.validate_python(call.path_id("user_id"))
    except ValueError:
        raise wrong("user_id", "1 to 128 characters out of A-Z a-z 0-9 . _ : -") from None


_USER: Final = Parameter("user_id", "whom the reports are about", required=True, type=Name)

OPERATIONS: Final = (
    Operation(
        "POST",
        "/reports",
        create,
        body=ReportRequest,
        answers={202: ReportAccepted},
        idempotent=True,
        example={"user_id": "ann", "inputs": {"age": 44, "sex": "female", "symptoms": ["headache for two days"]}},
    ),
    Operation(
        "GET",
        "/reports/{report_id}",
        look,
        answers={200: ReportShown},
        errors=(404,),
        parameters=(Parameter("report_id", "the report's id, as it was answered", required=True, type=Name),),
    ),
    Operation(
        "GET",
        "/users/{user_id}/reports",
        list_of_user,
        answers={200: ReportPage},
        errors=(422,),
        parameters=(
            _USER,
            AFTER,
            LIMIT,
        ),
    ),
    Operation(
        "DELETE",
        "/users/{user_id}",
        delete_user,
        answers={200: UserDeleted, 202: UserDeleted},
        errors=(422,),
        parameters=(_USER,),
    ),
)

"""How jobs stand, one or many at once, and how they are cancelled; of whatever flow.

The id of another tenant's job, an id that no job ever had, and one whose completion has gone are the same here: 404.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final, Literal

import structlog
from pydantic import BaseModel, Field

from gateway.asked import Asked, from_redis, wrong
from gateway.errors import BrokenKey, Problem
from gateway.operation import Answer, Call, Operation, Parameter, answer
from pipeline.flows import Name
from pipeline.job import Json, error_body, is_valid_id

logger = structlog.get_logger()

MAX_IDS: Final = 100  # of our own ids, so that the request's head stays within its bound
JOB_ID: Final = Parameter("job_id", "the job's id, as it was answered", required=True, type=Name)


class JobAccepted(BaseModel):
    """The job will be done."""

    job_id: str


class JobError(BaseModel):
    """Why a job did not complete."""

    type: str
    code: str
    message: str


class JobStatus(BaseModel):
    """How a job stands; everything below `status` is there once it has ended.

    `unreadable` stands in `GET /jobs` only, with an error `broken_key`: what Redis holds under this id is no outcome of
    ours. Asked for by itself, such a job is 503.
    """

    job_id: str
    status: Literal["queued", "running", "completed", "failed", "expired", "cancelled", "unreadable"]
    result: dict[str, Any] | None = None
    error: JobError | None = None
    worker: str | None = None
    replica: str | None = None
    attempts: int | None = None
    timings_ms: dict[str, float] | None = None


class JobStatuses(BaseModel):
    """How several jobs stand."""

    jobs: dict[str, JobStatus | None] = Field(description="by id; null for a job that is not known (any more)")


class JobCancelled(BaseModel):
    """What cancelling did."""

    job_id: str
    status: Literal["cancelled", "cancelling"]


async def look(call: Call) -> Answer:
    """Tell how a job stands.

    An outcome can be read for as long as its completion is kept (60 s unless set otherwise).
    """
    job_id = call.path_id("job_id")
    found = await _look(call, job_id)
    if found is None:
        raise not_found(job_id)
    return answer(found)


async def look_at_many(call: Call) -> Answer:
    """Tell how several jobs stand."""
    ids = [part for text in Asked(call, {"ids"}, often=["ids"]).texts("ids") for part in text.split(",")]
    if not 1 <= len(ids) <= MAX_IDS or "" in ids:
        raise wrong("ids", f"1 to {MAX_IDS} ids, separated by commas")
    found = await asyncio.gather(*(_look_among_others(call, job_id) for job_id in ids))
    return answer({"jobs": dict(zip(ids, found, strict=True))})


async def cancel(call: Call) -> Answer:
    """Cancel a job.

    200: it had not begun, and never will. 202: a worker holds it and has been told.
    """
    job_id = call.path_id("job_id")
    done = await call.front.cancel(job_id, call.tenant) if is_valid_id(job_id) else "unknown"
    if done == "unknown":
        raise not_found(job_id)
    if done == "finished":
        raise Problem(409, "job_finished", "the job has its outcome already", job_id=job_id)
    return answer({"job_id": job_id, "status": done}, 200 if done == "cancelled" else 202)


async def _look_among_others(call: Call, job_id: str) -> Json | None:
    """Tell how a job stands, and of one that cannot be read just that: the others are none the worse for it."""
    try:
        return await _look(call, job_id)
    except BrokenKey as broken:
        logger.error("gateway.broken_key", request_id=call.request_id, job_id=job_id, reason=broken.reason)  # noqa: TRY400 - one line will do
        error = error_body(broken.kind, broken.code, broken.message)
        return {"job_id": job_id, "status": "unreadable", "error": error}


async def _look(call: Call, job_id: str) -> Json | None:
    if not is_valid_id(job_id):
        return None
    found = await from_redis(call.front.look(job_id, call.tenant), job_id)
    if found is None:
        return None
    if isinstance(found, str):
        return {"job_id": job_id, "status": found}
    if not call.owns(found, job_id):
        return None
    return {
        "job_id": job_id,
        "status": found.status,
        "result": found.result,
        "error": found.error,
        "worker": found.worker,
        "replica": found.replica,
        "attempts": found.attempts,
        "timings_ms": found.timings_ms,
    }


def not_found(job_id: str) -> Problem:
    """Return the 404 for *job_id*."""
    return Problem(404, "job_not_found", f"there is no job {job_id[:128]!r}, or its outcome is no longer kept")


OPERATIONS: Final = (
    Operation(
        "GET",
        "/jobs",
        look_at_many,
        answers={200: JobStatuses},
        errors=(422,),
        parameters=(
            Parameter(
                "ids",
                "ids of jobs, separated by commas",
                required=True,
                type=Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_IDS)],
            ),
        ),
    ),
    Operation("GET", "/jobs/{job_id}", look, answers={200: JobStatus}, errors=(404,), parameters=(JOB_ID,)),
    Operation(
        "POST",
        "/jobs/{job_id}/cancel",
        cancel,
        answers={200: JobCancelled, 202: JobCancelled},
        errors=(404, 409),
        parameters=(JOB_ID,),
    ),
)

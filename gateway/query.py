"""The query service: a question in, an answer with its sources out.

The client waits on an open connection, or takes a job id and asks later (`background`). A client that goes away takes
its job with it, unless it said `on_disconnect: "continue"`, sent an Idempotency-Key (it means to come back), or
somebody else waits for the same job.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Literal

import structlog
from pydantic import BaseModel, Field

from gateway import jobs
from gateway.errors import ClientGone, Problem, problem_of, problem_of_outcome
from gateway.idempotency import HEADER
from gateway.metrics import LATENCY, QUERY_OUTCOME
from gateway.operation import Answer, Call, Operation, answer, payload_of
from pipeline.clock import monotonic_us
from pipeline.errors import DeadlineExceeded, JobLost, PenstockError
from pipeline.flows import FLOWS, Metadata, QueryPayload
from pipeline.job import Completion, Json, Priority

logger = structlog.get_logger()

MAX_TIMEOUT_S: Final = FLOWS["query"].longest_s


class QueryRequest(QueryPayload):
    """A question, and how it is to be treated."""

    timeout_s: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S, description="seconds to live; a setting when absent")
    priority: Priority = "normal"
    on_disconnect: Literal["cancel", "continue"] = Field(
        "cancel", description="what becomes of the job when the client goes away"
    )
    background: bool = Field(False, description="answer 202 with the job's id at once")


class Source(BaseModel):
    """A passage that the answer was given from."""

    document: str
    title: str = ""
    chunk: int
    score: float
    text: str


class QueryAnswer(BaseModel):
    """An answer."""

    job_id: str
    answer: str
    sources: list[Source]
    worker: str | None = Field(description="who ended the job")
    replica: str | None = Field(description="address of the LLM replica that answered")
    model: str | None
    usage: dict[str, Any] | None = Field(description="tokens, as the replica counted them")
    timings_ms: dict[str, float] = Field(
        description="`<stage>_wait` and `<stage>` per hop, `gateway` before, `return` after; they add up to `total`"
    )
    metadata: Metadata | None = Field(None, description="as it was sent; absent when none was")


async def ask(call: Call) -> Answer:
    """Ask a question.

    The answer comes when the pipeline has it, at the latest when `timeout_s` is over. With `background: true` it is
    202 with the job's id at once; `GET /query/{job_id}` then tells how it stands.
    """
    ended = "error"
    try:
        request = await call.read(QueryRequest)
        _check_length(call, request)
        settings = call.gateway.settings
        lifetime_s = request.timeout_s or settings.lifetimes.query_s
        job = call.job("query", payload_of(request, QueryPayload), lifetime_s, request.priority)
        accepted = await call.submit(job, wait=not request.background)
        headers = [(b"idempotent-replayed", b"true")] if accepted.repeated else []
        if request.background:
            ended = "accepted"
            return answer({"job_id": accepted.job_id}, 202, headers)
        completion = await _outcome(call, request, accepted.job_id, job.deadline_ms)
        ended = completion.status
        if completion.status != "completed":
            raise problem_of_outcome(completion)
        return answer(_answer_body(call, request, completion), 200, headers)
    except PenstockError as error:
        ended = ended if ended != "error" else _kind_of(error)
        raise
    except (ClientGone, asyncio.CancelledError):
        ended = "disconnected"
        raise
    finally:
        QUERY_OUTCOME[ended].inc()
        if ended in _WAITED_FOR:
            LATENCY.observe((monotonic_us() - call.started_us) / 1e6)


_WAITED_FOR: Final = frozenset({"completed", "failed", "expired", "cancelled"})


def _kind_of(error: PenstockError) -> str:
    """Return how a query ended that raised *error* before it had an outcome."""
    match error:
        case DeadlineExceeded():
            return "expired"
        case JobLost():
            return "lost"
    problem = problem_of(error)
    if problem is None:
        return "error"
    return "unavailable" if problem.status >= 500 else "refused"


def _check_length(call: Call, request: QueryRequest) -> None:
    limit = call.gateway.settings.gateway.max_query_chars
    if len(request.query) > limit:
        raise Problem(422, "invalid_field", f"query: String should have at most {limit} characters", param="query")


async def _outcome(call: Call, request: QueryRequest, job_id: str, deadline_ms: int) -> Completion:
    try:
        return await call.outcome(job_id, deadline_ms)
    except ClientGone:
        stays = request.on_disconnect == "continue" or HEADER in call.headers
        if not stays and call.front.waiters(job_id) == 0:
            await _abandon(call, job_id)
        raise


async def _abandon(call: Call, job_id: str) -> None:
    try:
        await call.front.cancel(job_id, call.tenant)
    except PenstockError as error:  # nobody is left to tell; its deadline ends it
        logger.warning("gateway.cancel_failed", job_id=job_id, request_id=call.request_id, error=str(error))


def _answer_body(call: Call, request: QueryRequest, completion: Completion) -> Json:
    result = completion.result or {}
    body: Json = {
        "job_id": completion.id,
        "answer": result.get("answer", ""),
        "sources": result.get("sources", []),
        "worker": completion.worker,
        "replica": completion.replica,
        "model": result.get("model"),
        "usage": result.get("usage"),
        "timings_ms": whole_timings(
            completion.timings_ms,
            elapsed_ms=(monotonic_us() - call.started_us) / 1000,
            since_finished_ms=(call.front.clock.now_us() - completion.finished_us) / 1000,
        ),
    }
    if request.metadata is not None:
        body["metadata"] = request.metadata
    return body


def whole_timings(stages_ms: dict[str, float], *, elapsed_ms: float, since_finished_ms: float) -> dict[str, float]:
    """Return a job's spans with those of the answering gateway, so that all of them add up to `total`.

    `elapsed_ms` and the stages' spans are measured on different machines and the way back is told from two clocks; what
    they leave unexplained is `gateway`. When an earlier job answers for a later request the spans are older than the
    request: nothing is left then, and the total is the job's own.
    """
    spans = {name: round(span, 3) for name, span in stages_ms.items()}
    inside = sum(spans.values())
    ours = max(elapsed_ms - inside, 0.0)
    back = min(max(since_finished_ms, 0.0), ours)
    spans["gateway"] = round(ours - back, 3)
    spans["return"] = round(back, 3)
    spans["total"] = round(sum(spans.values()), 3)
    return spans


OPERATIONS: Final = (
    Operation(
        "POST",
        "/query",
        ask,
        body=QueryRequest,
        answers={200: QueryAnswer, 202: jobs.JobAccepted},
        errors=(409, 502, 504),
        idempotent=True,
        example={"query": "What happens to a job when its worker dies?"},
        unavailable=QUERY_OUTCOME["unavailable"].inc,
    ),
    Operation(
        "GET",
        "/query/{job_id}",
        jobs.look,
        answers={200: jobs.JobStatus},
        errors=(404,),
        parameters=(jobs.JOB_ID,),
    ),
    Operation(
        "POST",
        "/query/{job_id}/cancel",
        jobs.cancel,
        answers={200: jobs.JobCancelled, 202: jobs.JobCancelled},
        errors=(404, 409),
        parameters=(jobs.JOB_ID,),
    ),
)

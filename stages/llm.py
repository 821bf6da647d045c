"""The llm stage: one job, one answer, from whichever replica gives one.

The job arrives with a running place at a replica (`job.replica`). When the call fails, another replica is asked within
the same handling, as long as `Replicas.move` finds one outside `job.avoid`; when none is left, the job is retried later
with the last failure. What a failure means is decided in `stages/openai_protocol.py`; this file only obeys.

**Arithmetic of attempts.** `job.attempt` numbers the charged calls at this stage: 1 for the first, at most
`retry.max_retries + 1` (4). A charged failure is counted exactly once: here, by raising `job.attempt`, when another
replica takes over at once; else by the worker, to whom `RetryLater(charged=True)` says that the call numbered
`job.attempt` failed. The last attempt asks for no other replica. An uncharged failure (nobody took the call) leaves the
number as it is; it cannot go round in circles, since each replica that failed is avoided from then on.

**Observations.** Every call ends in exactly one `Replicas.observe`, except a cancelled one, which says nothing about
the replica. Where the replica did its part and still gave no answer (it refused a wrong request, say), `ok=True` goes
without a duration: a quick refusal must not make a replica look fast.

**Connections.** `stages/http.py` keeps them. Their pool is not bounded: slots are the limit. A connection that the
replica closed while it lay idle is nobody's failure: such a call is sent again, once, at no charge, over a new one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog
from prometheus_client import Counter

from pipeline import histogram
from pipeline.clock import monotonic_us
from pipeline.errors import ConfigError, NoReplica, Reject
from pipeline.flows import FLOWS
from pipeline.job import Done, Job, Json
from pipeline.stage import Context, Stage
from stages.http import BrokenAnswer, HungUp, Pool, Response, Target, TooLarge, Unreachable
from stages.openai_protocol import Answer, Failure, Verdict, encode_request, endpoint, read_response, shorten
from stages.prompt import Source, augment

if TYPE_CHECKING:
    from pipeline.settings import LlmSettings, Settings

MAX_ANSWER_BYTES: Final = 16 << 20
"""Far above any answer a model gives; a replica that sends more has gone wrong."""

KEEP_ALIVE_S: Final = 4.0
"""Below the 5 s after which uvicorn (vLLM, SGLang) and cpp-httplib (llama.cpp) close an idle connection."""

STALE_S: Final = 1.0
"""A connection that died while idle shows it within a round trip; a later end is the replica's, and is charged."""

CALLS = Counter(
    "penstock_llm_calls", "Calls to LLM replicas by outcome: ok, cancelled, or the failure's code", ["outcome"]
)
CALL_SECONDS = histogram.Histogram(
    "penstock_llm_call_seconds",
    "From sending a request to a replica to the last byte of its answer, whatever the answer",
    "replica",
    (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 900),
)

log = structlog.get_logger(__name__)


def build(settings: Settings) -> Stage:
    """Return the stage.

    Raises:
        ConfigError: the API key cannot be sent in a header.
    """
    return Llm(settings.llm, max_retries=settings.retry.max_retries)


class Llm(Stage):
    """Asks a replica, then another one."""

    name = "llm"
    placed = True

    def __init__(self, settings: LlmSettings, *, max_retries: int) -> None:
        self.slots = settings.concurrency
        self._settings = settings
        self._max_retries = max_retries
        self._headers = _headers(settings)
        self._context: Context
        self._targets: dict[str, Target] = {}
        self._pool: Pool | None = None

    async def start(self, context: Context) -> None:
        """Open the pool; connections come with the first calls."""
        self._context = context
        self._pool = Pool(
            connect_timeout_s=self._settings.connect_timeout_s,
            keep_alive_s=KEEP_ALIVE_S,
            max_answer_bytes=MAX_ANSWER_BYTES,
        )

    async def stop(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.close()

    async def handle(self, job: Job) -> Done:
        """Bring an answer: `answer`, `model`, `usage`, `finish_reason`.

        Raises:
            Reject: no replica will ever answer this.
            RetryLater: every replica that could be asked now has failed; `job.attempt` and `job.avoid` are up to date.
            LeaseLost: the entry belongs to another consumer now.
        """
        ask = job.state.get("ask") or {}  # a stage's own prompt goes before the sender's
        model = ask.get("model") or job.payload.get("model") or self._settings.model
        body = encode_request(
            messages_of(job),
            model=model,
            max_tokens=ask.get("max_tokens", self._settings.max_tokens),
            temperature=ask.get("temperature", self._settings.temperature),
            response_format=ask.get("response_format"),
        )
        if job.replica is None:
            raise NoReplica("the job reached the llm stage without a place at a replica")
        url = job.replica
        while True:
            verdict = await self._call(job, url, model, body)
            if isinstance(verdict, Answer):
                return Done(
                    {
                        "answer": verdict.text,
                        "model": verdict.model,
                        "usage": verdict.usage,
                        "finish_reason": verdict.finish_reason,
                    }
                )
            url = await self._move_on(job, url, verdict)

    async def _move_on(self, job: Job, url: str, failure: Failure) -> str:
        """Return the replica to ask next.

        Raises:
            Reject, RetryLater: there is none.
        """
        if failure.consequence == "reject":
            raise failure.as_error()
        job.avoid = [*(other for other in job.avoid if other != url), url]
        charged = failure.consequence == "charged"
        if charged and job.attempt > self._max_retries:
            raise failure.as_error()
        heir = await self._context.replicas.move(job)
        if heir is None:
            raise failure.as_error()
        job.attempt += charged
        return heir

    async def _call(self, job: Job, url: str, model: str, body: bytes) -> Verdict:
        """Make one call within its time, and tell everybody how it went."""
        limit_s = FLOWS[job.flow].call_timeout_s
        began_us = monotonic_us()
        verdict: Verdict
        try:
            async with asyncio.timeout(limit_s):
                verdict = await self._post(job, url, model, body)
        except TimeoutError:
            verdict = Failure("replica_timeout", f"the replica gave no whole answer within {limit_s:g} s")
        except asyncio.CancelledError:
            CALLS.labels("cancelled").inc()
            raise
        duration_s = (monotonic_us() - began_us) / 1e6
        CALL_SECONDS.labels(url).observe(duration_s)
        replicas = self._context.replicas
        if isinstance(verdict, Answer):
            CALLS.labels("ok").inc()
            replicas.observe(url, ok=True, duration_s=duration_s, tokens=verdict.tokens)
            return verdict
        CALLS.labels(verdict.code).inc()
        if verdict.is_healthy:
            replicas.observe(url, ok=True)
        else:
            replicas.observe(url, ok=False, duration_s=duration_s, refused=verdict.is_refused)
        self._log(job, url, verdict, duration_s)
        return verdict

    async def _post(self, job: Job, url: str, model: str, body: bytes) -> Verdict:
        """Send the request; when its idle connection turns out to be dead, send it over a fresh one."""
        try:
            response = await self._send(job, url, body)
        except (Unreachable, HungUp, BrokenAnswer, ValueError) as error:
            return read_error(error)
        return read_response(response.status, response.headers, response.body, asked_model=model)

    async def _send(self, job: Job, url: str, body: bytes) -> Response:
        assert self._pool is not None
        target = self._targets.get(url)
        if target is None:
            target = self._targets[url] = Target.of(endpoint(url), self._headers)
        began_us = monotonic_us()
        try:
            return await self._pool.post(target, job.id, body)
        except HungUp as error:
            if not error.was_kept or monotonic_us() - began_us >= STALE_S * 1e6:
                raise
        return await self._pool.post(target, job.id, body, fresh=True)

    def _log(self, job: Job, url: str, failure: Failure, duration_s: float) -> None:
        """Say that a call failed; the replica's own words may quote the prompt and are for debugging only."""
        line = log.bind(
            job_id=job.id,
            stage=self.name,
            worker=self._context.worker,
            attempt=job.attempt,
            replica=url,
            code=failure.code,
            status=failure.status,
            consequence=failure.consequence,
            duration_s=round(duration_s, 3),
        )
        (line.info if failure.is_healthy or failure.is_refused else line.warning)("llm call failed")
        if not FLOWS[job.flow].private:
            line.debug("llm call failed because", message=failure.message)

    def __repr__(self) -> str:
        return f"<Llm slots={self.slots} model={self._settings.model!r} max_retries={self._max_retries}>"


def messages_of(job: Job) -> list[Json]:
    """Return the turns to send: a stage's own prompt (`ask`), the question with its sources, or what was sent.

    Raises:
        Reject: the job has none of them.
    """
    if ask := job.state.get("ask"):
        return list(ask["messages"])
    if "sources" in job.state:
        sources = [Source(one["title"], one["text"]) for one in job.state["sources"]]
        return augment(job.payload["query"], sources, job.payload.get("system_prompt"))
    messages = job.payload.get("messages")
    if messages:
        return list(messages)
    prompt = job.payload.get("prompt")
    if not prompt:
        raise Reject("the job brings neither messages nor a prompt to the llm stage", code="no_prompt")
    return [{"role": "user", "content": prompt}]


def read_error(error: Unreachable | HungUp | BrokenAnswer | ValueError) -> Failure:
    """Judge a call that brought no whole response; a `ValueError` says that there is no such address."""
    words = shorten(str(error)) or "without a word"
    match error:
        case Unreachable():
            message = f"the replica cannot be reached: {words}"
            return Failure("replica_unreachable", message, "uncharged", is_refused=True)
        case HungUp():
            return Failure("connection_lost", f"the replica closed the connection before it answered: {words}")
        case TooLarge():
            return Failure("bad_answer", f"the replica's answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
        case BrokenAnswer():
            return Failure("bad_answer", f"the replica's answer is broken: {words}")
    return Failure("replica_misconfigured", f"the replica's address cannot be used: {words}")


def _headers(settings: LlmSettings) -> dict[str, str]:
    headers = {
        "content-type": "application/json",
        "accept": "application/json",
        "accept-encoding": "identity",  # replicas are near: unpacking would cost more than it saves
        "user-agent": "penstock",
    }
    if settings.api_key is not None:
        key = settings.api_key.get_secret_value()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("llm.api_key holds characters that no HTTP header can carry")
        headers["authorization"] = f"Bearer {key}"
    return headers

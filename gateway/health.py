"""Whether the gateway lives, whether the pipeline behind it can answer, and the numbers that tell how it does.

`/livez` asks nobody: only a process that should be killed fails it. `/readyz` asks Redis, and what the workers of each
stage say of themselves; `/metrics` tells this process' numbers, and what Redis says of the pipeline. None of them needs
an API key, and none waits longer than a second; `/metrics` waits for figures that come slowly, as long as they do come.
"""

from __future__ import annotations

import asyncio
from typing import Final, Literal

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from pydantic import BaseModel, Field

from gateway.errors import BrokenKey, Problem
from gateway.metrics import REPLICA_LOAD, Told, pipeline_metrics
from gateway.operation import Answer, Call, Operation, answer
from pipeline.connection import CommandRefused
from pipeline.errors import BrokerUnavailable
from pipeline.front import Health
from pipeline.overview import Overview

logger = structlog.get_logger()

PATIENCE_S: Final = 1.0
_BROKEN: Final = (CommandRefused, ValueError, TypeError, LookupError)
"""What comes of a key that a stranger wrote: of a wrong type, no JSON, or JSON of another shape."""


class Alive(BaseModel):
    """The process works."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """What can work; null is well, else the reason why not."""

    status: Literal["ready"]
    redis: str | None
    stages: dict[str, str | None] = Field(description="by stage: null when at least one worker of it is ready")


async def live(call: Call) -> Answer:
    """Tell that this process works."""
    return answer({"status": "ok"})


async def ready(call: Call) -> Answer:
    """Tell whether questions can be answered now."""
    health = await _health(call)
    reasons = {name: reason for name, reason in health.stages.items() if reason is not None}
    if health.redis is not None:
        reasons = {"redis": health.redis} | reasons
    if reasons:
        message = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        problem = Problem(503, "not_ready", message, retry_after_s=PATIENCE_S)
        # Answered, not raised: it is what was asked for, so it is no refusal to be counted.
        return answer(problem.value | {"redis": health.redis, "stages": health.stages}, 503, problem.headers)
    return answer({"status": "ready", "redis": None, "stages": health.stages})


async def _health(call: Call) -> Health:
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await call.front.health()
    except (BrokerUnavailable, TimeoutError) as error:
        return Health(redis=str(error) or f"no answer within {PATIENCE_S:g} s", stages={})
    except _BROKEN as error:
        return Health(redis=_tell_broken(call, error).message, stages={})


async def metrics(call: Call) -> Answer:
    """Show this process' numbers, and the pipeline's, to Prometheus."""
    loads: dict[str, int] = {}
    overview: Overview | None = None  # not known now: better absent than old
    redis_up = True
    try:
        async with asyncio.timeout(PATIENCE_S):
            loads = await call.front.replica_loads()
    except (BrokerUnavailable, TimeoutError):
        redis_up = False
    except _BROKEN as error:
        _tell_broken(call, error)
    if redis_up:
        try:
            overview = await call.front.overview()
        except BrokerUnavailable as error:  # it has just answered: it is slow, not away, and the figures are missing
            logger.warning("gateway.figures_missing", request_id=call.request_id, reason=str(error))
        except _BROKEN as error:
            _tell_broken(call, error)
    REPLICA_LOAD.clear()
    for replica, load in loads.items():
        REPLICA_LOAD.labels(replica).set(load)
    settings = call.gateway.settings
    of_pipeline = pipeline_metrics(
        overview,
        redis_up=redis_up,
        max_jobs=settings.admission.max_jobs,
        max_backlog=settings.history.max_backlog,
    )
    page = generate_latest(REGISTRY) + generate_latest(Told(of_pipeline))
    return Answer(200, page, content_type=CONTENT_TYPE_LATEST.encode())


def _tell_broken(call: Call, error: Exception) -> BrokenKey:
    broken = BrokenKey(f"{type(error).__name__}: {error}")
    logger.error("gateway.broken_key", request_id=call.request_id, path=call.path, reason=broken.reason)
    return broken


OPERATIONS: Final = (
    Operation("GET", "/livez", live, answers={200: Alive}, guarded=False),
    Operation("GET", "/readyz", ready, answers={200: Readiness}, guarded=False),
    Operation("GET", "/healthz", ready, answers={200: Readiness}, guarded=False),
    Operation("GET", "/metrics", metrics, answers={200: None}, guarded=False),
)

"""Where Prometheus finds every live process: `GET /sd/targets`, in the form of its HTTP service discovery.

Workers say in their lease where they serve `/metrics`; gateways and connectors enlist themselves, so that any gateway
names them all. When Redis is away the answer is 503, and Prometheus keeps the targets it knows.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import orjson
from pydantic import BaseModel, Field, RootModel

from gateway.errors import BrokenKey
from gateway.operation import Answer, Call, Operation
from pipeline.addresses import is_loopback
from pipeline.errors import PenstockError
from pipeline.front import Front
from pipeline.overview import Overview
from pipeline.settings import Settings


class TargetGroup(BaseModel):
    """One process."""

    targets: list[str] = Field(description="host and port that serve `/metrics`")
    labels: dict[str, str] = Field(
        description="`kind`: gateway, stage or telegram; a stage process has `worker` and `stages`, too"
    )


class Targets(RootModel[list[TargetGroup]]):
    """All live processes, as Prometheus' `http_sd_configs` takes them."""


async def targets(call: Call) -> Answer:
    """List all live processes for Prometheus."""
    try:
        overview = await call.front.overview()
    except (ValueError, TypeError, LookupError) as error:  # a stranger wrote that key
        raise BrokenKey(f"{type(error).__name__}: {error}") from error
    groups = target_groups(overview, socket.gethostname())
    return Answer(200, orjson.dumps([group.model_dump() for group in groups]))


def target_groups(overview: Overview, here: str) -> list[TargetGroup]:
    """Return one group per process, in the order of their addresses.

    Args:
        here: the name of this machine. Prometheus is taken to run where it reaches what this gateway reaches.
    """
    groups = [
        TargetGroup(targets=[reachable(one.address, one.host, here)], labels={"kind": one.kind})
        for one in (*overview.gateways, *overview.connectors)
    ]
    groups += [
        TargetGroup(
            targets=[reachable(one.metrics, one.host, here)],
            labels={"kind": "stage", "worker": one.worker, "stages": "+".join(one.stages)},
        )
        for one in overview.workers
        if one.metrics
    ]
    return sorted(groups, key=lambda group: group.targets)


def reachable(address: str, host: str, here: str) -> str:
    """Return where a process that listens on *address* of the machine *host* is reached from the machine *here*.

    A process that listens on loopback of another machine is not reached at all. It is named all the same, by its
    machine: a target that is down is seen, one that is missing is not.
    """
    name, _, port = address.rpartition(":")
    name = name.strip("[]")
    if name in {"0.0.0.0", "::", ""} or (is_loopback(name) and host != here):  # noqa: S104 - compared, not bound
        return f"{host}:{port}"
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


@asynccontextmanager
async def enlisted(front: Front, settings: Settings, name: str, address: str) -> AsyncIterator[None]:
    """Be listed among the gateways as long as the block lasts, and a lease longer where it ends without a word."""
    host = socket.gethostname()
    record = orjson.dumps({"name": name, "address": address, "host": host, "pid": os.getpid()})
    task = asyncio.create_task(_enlist_forever(front, record, settings.worker.lease_s), name="enlist")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with suppress(PenstockError):  # then the entry lapses
            await front.sign_off(record)


async def _enlist_forever(front: Front, record: bytes, lease_s: float) -> None:
    while True:
        with suppress(PenstockError):  # Redis is away, or a key is of a wrong type; the front's own loops tell of it
            await front.enlist(record, lease_s)
        await asyncio.sleep(lease_s / 3)


OPERATIONS: Final = (Operation("GET", "/sd/targets", targets, answers={200: Targets}, guarded=False),)

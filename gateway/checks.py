"""What a running system stands on, looked at part by part: the first half of `penstock verify`.

Gateway, API key, Redis, its configuration, the database, the replicas, and a worker of each stage. The second half
(`gateway/trials.py`) has the system do its work. What HTTP cannot tell is asked of Redis, where gateways and workers
are registered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import httpx
from httpx_aiohttp import AiohttpTransport

from gateway.client import Client, GatewayRefused, GatewayUnreachable
from gateway.verify import Check, Failed, Skipped
from pipeline import flows, keys
from pipeline.connection import Link, parse_info
from pipeline.errors import BrokerUnavailable, ConfigError
from pipeline.job import new_id
from pipeline.overview import Overview, WorkerView
from pipeline.picture import Picture, look_closely
from pipeline.settings import Settings
from pipeline.traces import Traces

T = TypeVar("T")

SETTLES_S: Final = 5.0
"""How long something may be missing before that is a failure: processes start one after the other, and restart."""
LOOK_EVERY_S: Final = 0.1
PROBE_S: Final = 5.0
OLD_EVENT_MS: Final = 60_000
"""A recorder that works has written an event within a second."""


@dataclass(slots=True)
class Site:
    """The system that is looked at.

    Attributes:
        redis_name: its address, without a password.
        database_url: of the history; None where it is not known here.
        traces: what was made so far.
        token: in every name and text of ours, so that they are known from others'.
        deliver_to: to whom deliveries go for real, and
        deliver_from: from whom; None: only to the console, to nobody.
        trial_url: where a receiver of ours may be told though it is on loopback; "": nowhere, as far as is known here.
        making: requests under way of which it is not known yet what they made.
        usable: replicas that answer; None before anybody has looked.
    """

    client: Client
    link: Link
    settings: Settings
    redis_name: str
    database_url: str | None = None
    has_key: bool = False
    deliver_to: str | None = None
    deliver_from: str | None = None
    trial_url: str = ""
    traces: Traces = field(default_factory=Traces)
    token: str = field(default_factory=lambda: f"verify-{new_id()[:12]}")
    making: set[asyncio.Task[Any]] = field(default_factory=set)
    began_s: float = field(default_factory=time.monotonic)
    usable: int | None = None

    async def settled(self, read: Callable[[], Awaitable[T]], is_well: Callable[[T], bool]) -> T:
        """Return what *read* returns, once it is well, or when everything has had time to settle."""
        while True:
            found = await read()
            if is_well(found) or time.monotonic() > self.began_s + SETTLES_S:
                return found
            await asyncio.sleep(LOOK_EVERY_S)

    async def picture(self) -> Picture:
        """Look at Redis."""
        return await look_closely(self.link, thorough=False)

    async def seen(self) -> Overview:
        """Return what runs."""
        return (await self.picture()).seen


# --- Connections -------------------------------------------------------------------------------


async def _gateway(site: Site) -> str:
    began_s = time.monotonic()
    url = site.client.url
    start = "start it (`penstock up`, or `penstock gateway`), or name another: --url"
    try:
        await site.client.send_once("GET", "/livez", timeout_s=PROBE_S)
    except GatewayUnreachable as error:
        raise Failed(str(error), start) from None
    except GatewayRefused as error:
        raise Failed(f"{url}: {error}", "name the address of Penstock's gateway: --url") from None
    took_ms = (time.monotonic() - began_s) * 1000
    try:
        await site.client.send_once("GET", "/readyz", timeout_s=PROBE_S)
    except GatewayRefused as error:  # why is told by the checks of what is missing
        return f"{url} answers in {took_ms:.0f} ms; it is not ready: {error}"
    return f"{url} answers in {took_ms:.0f} ms, and is ready"


async def _redis(site: Site) -> str:
    try:
        began_s = time.monotonic()
        about = parse_info(await site.link.call("INFO", "everything"))
        took_ms = (time.monotonic() - began_s) * 1000
    except (BrokerUnavailable, ConfigError) as error:
        todo = (
            "start Redis, or name the one that gateways and workers use: --redis-url, or REDIS_URL. Nothing of ours "
            "needs a restart: all come back by themselves"
        )
        raise Failed(f"{site.redis_name}: {error}", todo) from None
    name = f"Valkey {about['valkey_version']}" if "valkey_version" in about else f"Redis {about['redis_version']}"
    limit = about.get("maxmemory_human", "0B")
    of_limit = f" of {limit}" if limit != "0B" else ""
    used = about["used_memory_human"]
    return f"{name} at {site.redis_name} answers in {took_ms:.0f} ms, {used}{of_limit} used"


async def _configuration(site: Site) -> str:
    about = parse_info(await site.link.call("INFO", "everything"))
    policy = about.get("maxmemory_policy", "unknown")
    if policy != "noeviction":
        todo = "`CONFIG SET maxmemory-policy noeviction`, and the same in Redis' own configuration"
        raise Failed(f"Redis throws accepted jobs away when its memory is full: maxmemory-policy is {policy}", todo)
    seen = await site.seen()
    disk = (
        "it keeps what it holds on disk"
        if about.get("aof_enabled") == "1"
        else "what it holds is gone when it restarts"
    )
    here = f"{_counted(len(seen.gateways), 'gateway')} and {_counted(len(seen.workers), 'worker')} are registered"
    if not seen.gateways and await _answers(site):
        todo = "name the Redis that this gateway uses: --redis-url, or REDIS_URL"
        raise Failed(f"the gateway at {site.client.url} is not registered in this Redis: it uses another one", todo)
    return f"settings are valid; Redis evicts nothing, {disk}; {here}"


async def _answers(site: Site) -> bool:
    try:
        await site.client.send_once("GET", "/livez", timeout_s=PROBE_S)
    except (GatewayUnreachable, GatewayRefused):
        return False
    return True


async def _key(site: Site) -> str:
    try:
        await site.client.send_once("GET", f"/jobs?ids={site.token}")
    except GatewayRefused as error:
        if error.status not in {401, 403}:
            raise
        other = "`penstock keys create NAME` makes one" if error.status == 401 else "`penstock keys list` tells which"
        raise Failed(str(error), f"give a key that it takes: --api-key, or GATEWAY_API_KEY; {other}") from None
    return "the gateway takes it" if site.has_key else "none is asked for"


async def _database(site: Site) -> str:
    async def refusal() -> GatewayRefused | None:
        try:
            await site.client.send_once("GET", "/message?limit=1")
        except GatewayRefused as error:
            if error.code != "history_unavailable":
                raise
            return error
        return None

    refused = await site.settled(refusal, lambda found: found is None)
    if refused is not None:
        todo = (
            "start it; `penstock db upgrade` makes its tables; gateways and recorders need one DATABASE_URL. "
            "Events wait in Redis meanwhile, and nothing is lost"
        )
        raise Failed(f"the gateway cannot read the history: {refused}", todo)

    def writes(seen: Overview) -> bool:
        return any(worker.stages["recorder"] is None for worker in _workers(seen, "recorder"))

    seen = await site.settled(site.seen, writes)
    recorders = _workers(seen, "recorder")
    if recorders and not writes(seen):
        reasons = "; ".join(sorted({str(worker.stages["recorder"]) for worker in recorders}))
        raise Failed(f"the recorder cannot write: {reasons}", "mend what it names; it goes on by itself")
    if recorders and seen.record_oldest_ms > OLD_EVENT_MS:
        waits = f"{_counted(seen.record_backlog, 'event')} wait to be written, the oldest for"
        todo = "look at the recorder's log and at the load of the database; more recorders may run"
        raise Failed(f"{waits} {seen.record_oldest_ms / 1000:.0f} s", todo)
    return "the gateway reads it, " + ("the recorder writes it" if recorders else "nobody writes it")


def _workers(seen: Overview, stage: str) -> list[WorkerView]:
    return [worker for worker in seen.workers if stage in worker.stages]


# --- Replicas ----------------------------------------------------------------------------------


async def _replicas(site: Site) -> str:
    picture = await site.settled(site.picture, lambda found: bool(found.seen.replicas))
    served = {url: health for url, health in picture.health.items() if health.word != "unserved"} or picture.health
    if not served:
        raise Failed("no llm worker has named a replica", "name them to the llm workers: LLM_URLS=http://host:port,...")
    async with httpx.AsyncClient(
        transport=AiohttpTransport(trust_env=False), headers=_bearer(site.settings), timeout=PROBE_S
    ) as http:
        found = await asyncio.gather(*(_probe(http, url) for url in served))
    troubles = {url: trouble for url, trouble in zip(served, found, strict=True) if trouble}
    for url, health in served.items():
        if health.word in {"resting", "probed"} and url not in troubles:
            troubles[url] = f"its last {health.failures} calls failed, and it is given a rest"
    site.usable = len(served) - len(troubles)
    if troubles:
        said = "; ".join(f"{url}: {trouble}" for url, trouble in sorted(troubles.items()))
        todo = (
            "start it, or look at its log; or take it out of LLM_URLS. Where only the llm workers reach the replicas, "
            "run `penstock verify` beside them"
        )
        raise Failed(f"{len(troubles)} of {_counted(len(served), 'replica')} cannot be used: {said}", todo)
    return f"{_counted(len(served), 'replica')}, each answers: {', '.join(sorted(served))}"


async def _probe(http: httpx.AsyncClient, url: str) -> str | None:
    """Return what is wrong with a replica; None where it answers, whatever it answers to somebody without a key."""
    base = url.rstrip("/")
    try:
        status = (await http.get(base + ("/models" if base.endswith("/v1") else "/v1/models"))).status_code
    except httpx.TimeoutException:
        return f"no answer within {PROBE_S:g} s"
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return f"it answers {status}" if status >= 500 else None


def _bearer(settings: Settings) -> dict[str, str]:
    key = settings.llm.api_key
    return {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}


# --- Workers -----------------------------------------------------------------------------------


def _worker(name: str, *stages: str, is_optional: bool = False) -> Check[Site]:
    """Return the check of a worker that is started by this name, and has these stages."""

    def of(seen: Overview, *, ready: bool) -> list[WorkerView]:
        """Return the workers there are; none where a stage has none."""
        found = [_workers(seen, stage) for stage in stages]
        if ready:
            found = [
                [worker for worker in workers if worker.stages[stage] is None]
                for stage, workers in zip(stages, found, strict=True)
            ]
        return list({worker.consumer: worker for workers in found for worker in workers}.values()) if all(found) else []

    async def run(site: Site) -> str:
        if is_optional:
            seen = await site.seen()
        else:
            seen = await site.settled(site.seen, lambda seen: bool(of(seen, ready=True)))
        if ready := of(seen, ready=True):
            return _named(ready)
        found = of(seen, ready=False)
        if not found and is_optional:
            raise Skipped("none runs; it is needed only where PENSTOCK_IMAGES__URL is set")
        if not found:
            todo = f"start one: `penstock stage {name}`; where it ends at once, the last lines of its log say why"
            raise Failed("no worker of this stage runs", todo)
        reasons = {reason for worker in found for stage, reason in worker.stages.items() if reason and stage in stages}
        if name == "recorder":  # it lives; that it cannot write is told of the database
            return f"{_named(found)}; it waits: {'; '.join(sorted(reasons))}"
        said = f"it runs, and cannot work: {'; '.join(sorted(reasons))}"
        raise Failed(said, "mend what it names; it goes on by itself")

    return Check(worker_of(name), f"a worker of stage {name}", run, needs=("redis",))


def worker_of(stage: str) -> str:
    """Return the name of the check of a stage's workers."""
    return f"worker-{stage}"


def _named(workers: list[WorkerView]) -> str:
    return ", ".join(f"{worker.worker} (pid {worker.pid} on {worker.host})" for worker in workers)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# --- What is wrong where somebody waits in vain ------------------------------------------------


async def stuck(site: Site, check: Check[Site]) -> tuple[str, str]:
    """Return where the work of a check stands whose time was over, and what to do."""
    try:
        async with asyncio.timeout(PROBE_S):
            seen = await site.seen()
    except (BrokerUnavailable, TimeoutError):
        return "; Redis gives no answer", "look at Redis, and at the network between it and here"
    lost = [stage for stage in check.stages if not _workers(seen, stage)]
    held = [view for view in seen.streams if view.stage in check.stages and (view.waiting or view.in_hand)]
    where = "".join(
        f"; {view.stream}: {view.waiting} wait, {view.in_hand} in hand"
        + (f" for {view.oldest_ms / 1000:.0f} s" if view.in_hand else "")
        for view in held
    )
    if lost:
        return f"{where}; no worker of {', '.join(lost)} runs any more", f"start it: `penstock stage {lost[0]}`"
    if held:
        stage = max(held, key=lambda view: (view.oldest_ms, view.waiting)).stage
        slow = ", and at the replicas: a call may take that long" if stage == "llm" else ""
        return where, f"look at the log of the {stage} workers and at what `penstock status` says of them{slow}"
    return where, "look at the logs of gateway and workers; `penstock status` shows what they hold"


async def until(read: Callable[[], Awaitable[Any]], is_well: Callable[[Any], bool]) -> Any:
    """Return what *read* returns once it is well; a check's own time-out bounds it."""
    while True:
        found = await read()
        if is_well(found):
            return found
        await asyncio.sleep(LOOK_EVERY_S)


_DELIVERY: Final = (*keys.DELIVERY_STAGES, keys.INCOMING_STAGE)
"""Stages that one process has, started by the name `delivery`."""
_STAGES: Final = dict.fromkeys(stage for flow in flows.FLOWS.values() for stage in flow.route if stage not in _DELIVERY)

CHECKS: Final = (
    Check("gateway", "whether it answers", _gateway, 15.0),
    Check("redis", "whether it answers", _redis),
    Check(
        "configuration",
        "whether Redis keeps what it is given, and is that of the gateway",
        _configuration,
        15.0,
        ("redis",),
    ),
    Check("key", "whether the gateway takes our API key", _key, 10.0, ("gateway", "redis")),
    Check("database", "whether the history is read and written", _database, 30.0, ("gateway", "redis", "key")),
    Check("replicas", "whether the language models answer", _replicas, 15.0, ("redis",)),
    *(_worker(stage, stage, is_optional=stage == "image") for stage in _STAGES),
    _worker("delivery", *_DELIVERY),
    _worker("recorder", "recorder"),
)

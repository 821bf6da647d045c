"""`GET /sd/targets`: who is listed, where, and for how long."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace

import httpx
import orjson
import pytest

from gateway.discovery import enlisted, reachable, target_groups
from pipeline import keys
from pipeline.connection import Link
from pipeline.consumer import Consumer
from pipeline.front import OVERVIEW_FOR_S, Front
from pipeline.overview import GatewayView, WorkerView
from pipeline.settings import Settings
from tests.conftest import wait_until
from tests.gateway.fake import NOTHING
from tests.rig import Scripted, changed, echo


@pytest.mark.parametrize(
    ("address", "host", "found"),
    [
        ("10.0.0.7:9000", "there", "10.0.0.7:9000"),
        ("127.0.0.1:9000", "here", "127.0.0.1:9000"),
        ("::1:9000", "here", "[::1]:9000"),
        ("[::1]:9000", "here", "[::1]:9000"),
        ("localhost:9000", "here", "localhost:9000"),
        ("0.0.0.0:9000", "there", "there:9000"),
        (":::9000", "there", "there:9000"),
        ("[::]:9000", "here", "here:9000"),
        ("127.0.0.1:9000", "there", "there:9000"),
        ("[::1]:9000", "there", "there:9000"),
    ],
)
def test_a_process_is_named_where_it_is_reached_from_here(address: str, host: str, found: str) -> None:
    """A wildcard is no address, and loopback of another machine is not ours."""
    assert reachable(address, host, "here") == found


def test_every_process_is_a_target_of_its_own_in_a_steady_order() -> None:
    """Gateways and stages; a worker that serves nothing is left out."""
    overview = replace(
        NOTHING,
        gateways=[GatewayView("g", "127.0.0.1:8000", "here", 1)],
        workers=[
            WorkerView("w2:b", "w2", {"llm": None, "encoder": "starting"}, "here", 3, "127.0.0.1:9002"),
            WorkerView("w1:a", "w1", {"encoder": None}, "here", 2, "127.0.0.1:9001"),
            WorkerView("w3:c", "w3", {"encoder": None}, "here", 4, ""),
        ],
    )
    assert [(group.targets, group.labels) for group in target_groups(overview, "here")] == [
        (["127.0.0.1:8000"], {"kind": "gateway"}),
        (["127.0.0.1:9001"], {"kind": "stage", "worker": "w1", "stages": "encoder"}),
        (["127.0.0.1:9002"], {"kind": "stage", "worker": "w2", "stages": "llm+encoder"}),
    ]


async def test_a_gateway_lists_live_workers_and_all_gateways(
    link: Link, front: Front, settings: Settings, gateway: httpx.AsyncClient
) -> None:
    """As Prometheus wants it: JSON, a list of groups."""
    consumer = Consumer([Scripted("encoder", echo)], settings, metrics_address="127.0.0.1:9001")
    try:
        await consumer.renew()
        async with enlisted(front, settings, "g", "127.0.0.1:8000"):
            await wait_until(lambda: link.call("EXISTS", keys.GATEWAYS))
            reply = await gateway.get("/sd/targets")
            assert reply.status_code == 200
            assert reply.headers["content-type"] == "application/json"
            assert reply.json() == [
                {"targets": ["127.0.0.1:8000"], "labels": {"kind": "gateway"}},
                {
                    "targets": ["127.0.0.1:9001"],
                    "labels": {"kind": "stage", "worker": consumer.worker_name, "stages": "encoder"},
                },
            ]
            (record,) = await link.call("ZRANGE", keys.GATEWAYS, 0, -1)
            about = orjson.loads(record)
            assert (about["host"], about["pid"]) == (socket.gethostname(), os.getpid())
    finally:
        await consumer._leave()


async def test_a_gateway_signs_off_at_its_end(link: Link, front: Front, settings: Settings) -> None:
    """It need not lapse."""
    async with enlisted(front, settings, "g", "127.0.0.1:8000"):
        await wait_until(lambda: link.call("EXISTS", keys.GATEWAYS))
    assert not await link.call("EXISTS", keys.GATEWAYS)


async def test_a_gateway_that_falls_silent_lapses(link: Link, front: Front) -> None:
    """The last one with its key, an earlier one as soon as another says that it lives."""
    await front.enlist(b'{"name":"old"}', 0.05)
    await wait_until(lambda: _is_gone(link, keys.GATEWAYS))
    await front.enlist(b'{"name":"old"}', 60)
    await link.call("ZADD", keys.GATEWAYS, "XX", 1, b'{"name":"old"}')
    await front.enlist(b'{"name":"new"}', 60)
    assert await link.call("ZRANGE", keys.GATEWAYS, 0, -1) == [b'{"name":"new"}']


async def test_a_gateway_is_listed_again_after_redis_was_emptied(link: Link, front: Front, settings: Settings) -> None:
    """Within a third of a lease."""
    short = changed(settings, worker={"lease_s": 0.5})
    async with enlisted(front, short, "g", "127.0.0.1:8000"):
        await wait_until(lambda: link.call("EXISTS", keys.GATEWAYS))
        await link.call("DEL", keys.GATEWAYS)
        await wait_until(lambda: link.call("EXISTS", keys.GATEWAYS))


async def test_without_redis_the_answer_is_503_so_that_prometheus_keeps_what_it_knows(
    cut_off: httpx.AsyncClient,
) -> None:
    """An empty list would take all targets away in every outage."""
    reply = await cut_off.get("/sd/targets")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "redis_unavailable")


async def test_a_list_that_a_stranger_wrote_is_an_error_that_says_so(gateway: httpx.AsyncClient, link: Link) -> None:
    """Not a fault of the gateway's."""
    await link.call("ZADD", keys.GATEWAYS, 1, "no JSON")
    reply = await gateway.get("/sd/targets")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "broken_key")
    await link.call("DEL", keys.GATEWAYS)


async def test_however_many_ask_redis_is_looked_at_once(front: Front, link: Link) -> None:
    """Those who come together, and those who come within a second."""
    pictures = await asyncio.gather(*(front.overview() for _ in range(20)))
    assert all(picture is pictures[0] for picture in pictures)
    made_us, picture = front._overview or (0, NOTHING)
    front._overview = (made_us - int(OVERVIEW_FOR_S * 1e6), picture)
    assert await front.overview() is not pictures[0]


async def _is_gone(link: Link, key: str) -> bool:
    return not await link.call("EXISTS", key)

"""Gateways asked in process, with a Redis and without one; and what Debian's package `prometheus` brings."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import httpx
import pytest

from gateway.app import create_app
from pipeline.front import Front
from pipeline.settings import RedisSettings, Settings


@pytest.fixture
async def gateway(front: Front, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway whose pipeline is the real one."""
    transport = httpx.ASGITransport(create_app(settings, front))
    async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as client:
        yield client


@pytest.fixture
async def cut_off() -> AsyncIterator[httpx.AsyncClient]:
    """A gateway whose Redis is away, after a time in which it was there."""
    settings = Settings(redis=RedisSettings(url="redis://127.0.0.1:1"))
    async with Front(settings, "test") as front:
        front.knows_api_keys = False
        transport = httpx.ASGITransport(create_app(settings, front))
        async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as client:
            yield client


@pytest.fixture(scope="session")
def promtool() -> str:
    """The program that checks Prometheus' files."""
    if found := shutil.which("promtool"):
        return found
    pytest.skip("promtool is missing: apt-get install prometheus")


@pytest.fixture(scope="session")
def prometheus() -> str:
    """Prometheus itself."""
    if found := shutil.which("prometheus"):
        return found
    pytest.skip("prometheus is missing: apt-get install prometheus")

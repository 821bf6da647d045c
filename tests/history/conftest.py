"""Databases for the history: a file of SQLite's, and one on a real PostgreSQL, each empty."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from pipeline.records import Records
from tests.postgres import PostgresServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One real server per test process."""
    with a_postgres() as server:
        yield server


def a_postgres() -> PostgresServer:
    """Return a server of the test's own, not started; skips where there is no PostgreSQL, as CI never does."""
    try:
        return PostgresServer()
    except LookupError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database; the test runs once on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/folder/history.db"
    return await new_database(request.getfixturevalue("postgres"))


@pytest.fixture
async def records(url: str) -> AsyncIterator[Records]:
    """A history without rows."""
    one = Records.open(url)
    await one.upgrade()
    yield one
    await one.close()


async def new_database(server: PostgresServer) -> str:
    """Make an empty database; return its address."""
    name = f"test{next(_numbers)}"
    connection = await asyncpg.connect(server.url())
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    return server.url(name)

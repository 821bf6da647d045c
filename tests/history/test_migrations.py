"""The tables of a database are those of the program, however it comes to them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from pipeline.errors import HistoryUnavailable
from pipeline.records import METADATA, Event, Records


def differences(connection: sa.Connection) -> list[Any]:
    found: list[Any] = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), METADATA)
    return found


async def test_migrations_make_the_tables_that_the_program_works_with(records: Records) -> None:
    """Who changes a table writes a migration, or this is red."""
    async with records.engine.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_table_without_its_column_is_a_difference(records: Records) -> None:
    """The comparison above can fail."""
    async with records.engine.begin() as connection:
        await connection.exec_driver_sql("ALTER TABLE messages DROP COLUMN worker")
        assert await connection.run_sync(differences) != []


async def test_upgrading_again_changes_nothing(records: Records) -> None:
    """What is there stays."""
    await records.apply([Event("message", "m1", "default", 0, 1, {"prompt": "x"})])
    assert not await records.upgrade()
    await records.check()
    assert await records.message("default", "m1")


async def test_several_may_upgrade_at_once(url: str) -> None:
    """One does it, the others wait for that."""
    several = [Records.open(url) for _ in range(6)]
    assert sorted(await asyncio.gather(*(one.upgrade() for one in several))) == [False] * 5 + [True]
    await asyncio.gather(*(one.close() for one in several))


async def test_a_database_without_tables_is_said_to_need_them(url: str, tmp_path: Any) -> None:
    """And what to do."""
    (tmp_path / "folder").mkdir()
    records = Records.open(url)
    with pytest.raises(HistoryUnavailable, match="penstock db upgrade"):
        await records.check()
    await records.close()


async def test_a_migration_that_breaks_leaves_nothing(url: str, records: Records) -> None:
    """All of it is one transaction, on both databases."""
    async with records.engine.begin() as connection:
        await connection.exec_driver_sql("DELETE FROM alembic_version")
        for name in set(METADATA.tables) - {"webhooks"}:
            await connection.exec_driver_sql(f"DROP TABLE {name}")
    with pytest.raises(HistoryUnavailable):  # the last table is there already
        await records.upgrade()
    async with records.engine.connect() as connection:
        names = await connection.run_sync(lambda it: sa.inspect(it).get_table_names())
    assert sorted(names) == ["alembic_version", "webhooks"]


async def test_tables_of_a_newer_program_are_left_alone(records: Records) -> None:
    """While a deployment is under way, the older program goes on with what it knows."""
    async with records.engine.begin() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    await records.check()
    assert not await records.upgrade()

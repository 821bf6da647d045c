"""The other commands: what they say when something is wrong, and that they start quickly."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import orjson
import pytest

from pipeline import keys
from pipeline.connection import Link
from tests.cli.conftest import clean_environment
from tests.servers import RedisServer


async def penstock(*arguments: str, **environ: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "penstock", *arguments],
        cwd="/",
        env=clean_environment(**environ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize(
    "arguments",
    [["up", "--port", "70000"], ["gateway", "--port", "70000"], ["stage", "llm"], ["status"], ["dead", "list"]],
)
async def test_every_wrong_setting_is_named_at_once(arguments: list[str]) -> None:
    """Several mistakes, a line for each, no traceback, exit code 2."""
    environ = {"PENSTOCK_GATEWEY__PORT": "1", "PENSTOCK_WORKER__LEASE_S": "soon", "PENSTOCK_RETRY__CAP_S": "0.1"}
    code, out, err = await penstock(*arguments, **environ)
    assert (code, out) == (2, "")
    assert "PENSTOCK_GATEWEY__PORT: no such setting; did you mean PENSTOCK_GATEWAY__PORT?" in err
    assert "PENSTOCK_WORKER__LEASE_S: " in err
    assert "cap_s (0.1) must not be below base_s (0.5)" in err
    assert ("PENSTOCK_GATEWAY__PORT: Input should be less than or equal to 65535" in err) == ("70000" in arguments)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["stage", "nosuch"], 2, "'nosuch'; there are aggregator, amqp, chat, delivery, encoder, "),
        (["stage", "chunks"], 2, "there is no stage called 'chunks'"),
        (["gateway", "--host", "0.0.0.0"], 2, "PENSTOCK_API_KEYS"),
        (["mock-llm", "--latency", "soon"], 2, "soon"),
        (["mock-llm", "--host", "192.0.2.1"], 2, "192.0.2.1"),
        (["status", "--redis-url", "redis://127.0.0.1:1"], 1, "no connection to Redis"),
        (["status", "--once", "--data-dir", "/nonexistent"], 1, "; start `penstock up`, or name another Redis:"),
        (["status", "--redis-url", "ftp://127.0.0.1"], 2, "PENSTOCK_REDIS__URL"),
        (["dead", "retry"], 2, "--all"),
        (["db", "upgrade", "--database-url", "mysql://x:secret@y/z"], 2, "PENSTOCK_HISTORY__URL"),
        (["db", "upgrade", "--database-url", "postgresql://x@127.0.0.1:1/z"], 1, "the database cannot be used"),
        (["db", "upgrade", "--data-dir", "/proc/none"], 1, "cannot be made"),
        (["dead", "discard", "1-1", "--all"], 2, "--all"),
    ],
)
async def test_what_cannot_work_ends_with_a_line(arguments: list[str], exit_code: int, said: str) -> None:
    """Wrong use and wrong addresses: a reason and an exit code, never a traceback."""
    code, out, err = await penstock(*arguments)
    assert (code, out) == (exit_code, "")
    assert said in err
    assert "Traceback" not in err


async def test_help_starts_without_the_pipeline() -> None:
    """`--help` is quick because it imports neither Redis nor HTTP nor the stages."""
    code = (
        "import sys; sys.argv = ['penstock', '--help']; import penstock\n"
        "try: penstock.main()\n"
        "except SystemExit: pass\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in "
        "{'redis', 'httpx', 'aiohttp', 'starlette', 'uvicorn', 'qdrant_edge', 'structlog', 'stages', 'gateway', "
        "'sqlalchemy', 'alembic'}))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, env=clean_environment(), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert out.decode().splitlines()[-1] == "[]"


async def test_the_tables_of_the_history_are_made_once(short_path: Path) -> None:
    """Two run it at once: one says that it did so, the other that nothing was to do; as does a third."""
    url = f"sqlite:///{short_path}/history.db"
    two = await asyncio.gather(*(penstock("db", "upgrade", DATABASE_URL=url) for _ in range(2)))
    done, idle = (0, "the tables were brought up to date\n", ""), (0, "the tables are up to date\n", "")
    assert sorted(two) == [idle, done]
    assert await penstock("db", "upgrade", "--data-dir", str(short_path)) == idle


async def test_status_works_while_nothing_runs(redis_server: RedisServer, link: Link) -> None:
    """An empty Redis has a picture, too: for people and for scripts."""
    code, out, _ = await penstock("status", REDIS_URL=redis_server.url)
    assert code == 0
    assert "0 jobs alive, 0 delayed, 0 dead letters" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    code, out, _ = await penstock("status", "--json", "--redis-url", redis_server.url)
    assert code == 0
    assert orjson.loads(out)["workers"] == orjson.loads(out)["gateways"] == []


async def test_dead_letters_are_listed_shown_retried_and_discarded(redis_server: RedisServer, link: Link) -> None:
    """The whole life of three letters: one is tried again, one cannot be, one is thrown away."""
    for data in ('{"id": "a1", "query": "What is a lease?"}', "no JSON", '{"id": "a3", "query": "Why?"}'):
        await link.call("XADD", "job:dead", "*", "data", letter(data))
    url = redis_server.url

    code, out, _ = await penstock("dead", "list", "--json", REDIS_URL=url)
    letters = orjson.loads(out)
    assert [found["job_id"] for found in letters] == ["a1", "a1", "a1"]
    assert all("original" not in found for found in letters)  # a listing shows no prompts
    third, second, first = [found["id"] for found in letters]
    code, out, _ = await penstock("dead", "list", "--limit", "1", REDIS_URL=url)
    assert (code, out.count("tried_out")) == (0, 1)
    code, out, _ = await penstock("dead", "show", second, REDIS_URL=url)
    assert orjson.loads(out)["original"] == "no JSON"

    code, out, err = await penstock("dead", "retry", first, second, REDIS_URL=url)
    assert code == 1
    retried, _, new_id = out.strip().partition(" ")
    assert retried == first
    assert second in err
    assert await link.call("HGET", f"live:{new_id}", "stream") == b"job:encoder_in"

    code, out, _ = await penstock("dead", "discard", third, "1-1", REDIS_URL=url)
    assert (code, out) == (1, f"{third}\n")
    code, out, _ = await penstock("dead", "discard", "--all", REDIS_URL=url)
    assert (code, out) == (0, f"{second}\n")
    assert (await penstock("dead", "list", REDIS_URL=url))[1] == "no dead letters\n"


def letter(original: str) -> bytes:
    return orjson.dumps(
        {
            "reason": "tried_out",
            "job_id": "a1",
            "error": {"type": "failed", "code": "x", "message": "it broke"},
            "attempts": 4,
            "deliveries": 1,
            "stage": "encoder",
            "stream": "job:encoder_in",
            "entry": "1-1",
            "worker": "w",
            "at_ms": 1_700_000_000_000,
            "original": original,
        }
    )


async def test_api_keys_are_made_listed_and_revoked(redis_server: RedisServer, link: Link) -> None:
    """The key is shown once; a listing shows everything else, for people and for scripts."""
    url = redis_server.url
    code, key, _ = await penstock("keys", "create", "ci", "--tenant", "acme", REDIS_URL=url)
    assert code == 0
    code, _, err = await penstock("keys", "create", "ci", REDIS_URL=url)
    assert (code, "there is a key 'ci' already" in err) == (1, True)
    assert (await penstock("keys", "revoke", "nobody", REDIS_URL=url))[0] == 1
    assert (await penstock("keys", "revoke", "ci", REDIS_URL=url))[:2] == (0, "")
    _, listed, _ = await penstock("keys", "list", REDIS_URL=url)
    assert re.fullmatch(r"ci +acme +made [-0-9]{10} [:0-9]{8}Z  revoked [-0-9]{10} [:0-9]{8}Z\n", listed)
    (found,) = orjson.loads((await penstock("keys", "list", "--json", REDIS_URL=url))[1])
    assert (found["name"], found["tenant"], found["revoked_ms"] >= found["created_ms"]) == ("ci", "acme", True)
    held = b"".join(await link.call("HGETALL", keys.API_KEYS))
    assert key.strip().startswith("psk_")
    assert key.strip().encode() not in held

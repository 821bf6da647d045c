"""What an operator meets: commands and exit codes, wrong settings, dead letters, an index that cannot be opened."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.conftest import wait_until
from tests.whole.system import END_S, Outside, System, penstock

WORKERS = ("encoder", "retriever", "llm", "aggregator", "webhook", "chat", "image", "report", "delivery", "recorder")
STAGES = {*WORKERS, "requests", "sms", "mms", "email", "incoming"} - {"delivery"}  # which is a process, and no stage


async def test_one_command_answers_the_first_question() -> None:
    """`up --ask`: the ready line with the address comes first, then the question, its answer and numbered sources."""
    question = "What happens to a job when its worker dies?"
    with System("--ask", question) as own:
        assert own.ready_line == f"ready {own.url}\n"
        assert own.url.startswith("http://127.0.0.1:")
        said = [own.line() for _ in range(6)]
        assert said[:3] == ["\n", f"{question}\n", "\n"]
        assert said[3].strip()
        assert said[5].startswith("  [1] ")


async def test_status_shows_workers_streams_and_replicas(whole: Outside) -> None:
    """Everything that runs, for scripts; the recorder starts after `ready` was said."""
    await whole.ask()
    found: dict[str, Any] = {}

    async def all_are_shown() -> bool:
        code, out, _ = await penstock("status", "--data-dir", str(whole.system.data_dir), "--json")
        assert code == 0
        found.update(orjson.loads(out))
        return len(found["workers"]) == len(WORKERS)

    await wait_until(all_are_shown, timeout_s=END_S)
    assert {stage for worker in found["workers"] for stage in worker["stages"]} == STAGES
    assert {worker["pid"] for worker in found["workers"]} == {whole.system.pid_of(stage) for stage in WORKERS}
    assert {stream["stream"] for stream in found["streams"]} >= {
        "job:encoder_in",
        "job:retriever_in",
        "job:llm_in",
        "message_queue:sms",
        "webhook_queue",
    }
    assert {replica["url"] for replica in found["replicas"]} == set(whole.system.replicas)
    assert (found["live_jobs"], found["delayed"]) == (0, 0)


async def test_the_load_testers_exit_code_tells_how_it_went(whole: Outside) -> None:
    """0 all answered, 1 some failed, 2 nobody there."""
    short = ("-n", "6", "-c", "6", "--json")
    code, out, _ = await penstock("loadtest", "--url", whole.system.url, *short)
    assert (code, orjson.loads(out)["successful"]) == (0, 6)
    await whole.behave(status=500)
    code, out, _ = await penstock("loadtest", "--url", whole.system.url, *short)
    assert (code, orjson.loads(out)["failed"]) == (1, 6)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        code, out, err = await penstock("loadtest", "--url", f"http://127.0.0.1:{reserved.getsockname()[1]}", *short)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


async def test_dead_letters_are_listed_shown_retried_and_discarded(whole: Outside) -> None:
    """A job that failed for good runs again once its cause is mended; a foreigner's nonsense is thrown away."""
    where = ("--data-dir", str(whole.system.data_dir))
    await whole.behave(status=500)
    failed = await whole.ask("What is a lease?")
    assert failed.status == 502
    await whole.reset()
    before = await whole.redis.xlen("job:dead")
    await whole.redis.xadd("job:encoder_in", {"data": "no JSON"})

    async def is_buried() -> bool:
        return bool(await whole.redis.xlen("job:dead") > before)

    async def letters() -> dict[str, str]:
        code, out, _ = await penstock("dead", "list", "--limit", "1000", "--json", *where)
        assert code == 0
        return {row["job_id"] or row["reason"]: row["id"] for row in orjson.loads(out)}

    await wait_until(is_buried, timeout_s=END_S)
    listed = await letters()
    nonsense, story = listed["not_json"], listed[failed.body["job_id"]]
    code, out, _ = await penstock("dead", "show", story, *where)
    shown = orjson.loads(out)
    assert (code, shown["reason"], shown["attempts"]) == (0, "attempts_exhausted", 4)
    assert "500" in shown["error"]["message"]
    assert "What is a lease?" in shown["original"]

    code, out, err = await penstock("dead", "retry", story, nonsense, *where)
    assert code == 1
    assert f"{nonsense} holds no job" in err
    outcome = await whole.outcome(out.split()[-1])
    assert outcome["status"] == "completed"
    assert outcome["result"]["answer"]

    code, out, _ = await penstock("dead", "discard", nonsense, *where)
    assert (code, out.strip()) == (0, nonsense)
    assert not {nonsense, story} & set((await letters()).values())


async def test_a_second_retriever_on_the_index_is_refused(whole: Outside) -> None:
    """It exits with code 2 and says what to do; the first one goes on."""
    code, _, err = await penstock(
        "stage",
        "retriever",
        PENSTOCK_REDIS__URL=whole.system.redis_url,
        PENSTOCK_RETRIEVER__PATH=str(whole.system.data_dir / "index"),
    )
    assert code == 2
    assert "set QDRANT_URL" in err
    assert "Traceback" not in err
    assert (await whole.ask()).status == 200


async def test_jobs_wait_while_the_index_cannot_be_opened(whole: Outside) -> None:
    """`/readyz` says why, a question waits, and it is answered once the index can be opened."""
    index = whole.system.data_dir / "index"
    aside = index.with_name("aside")
    index.rename(aside)
    index.write_text("no directory")
    whole.system.kill("retriever", signal.SIGKILL)

    async def reason() -> str:
        return str((await whole.send("GET", "/readyz")).body.get("stages", {}).get("retriever"))

    async def is_said() -> bool:
        return "the index cannot be opened" in await reason()

    try:
        await wait_until(is_said, timeout_s=END_S)
        assert str(index) in await reason()
        assert (await whole.send("GET", "/readyz")).status == 503
        waiting = asyncio.create_task(whole.ask())
        await wait_until(lambda: whole.redis.xlen("job:retriever_in"), timeout_s=END_S)
        assert not waiting.done()
    finally:
        index.unlink()
        aside.rename(index)
    reply = await waiting
    assert reply.status == 200
    assert reply.body["sources"]


@pytest.mark.parametrize("program", [("up",), ("gateway",), ("stage", "encoder"), ("status",)], ids=" ".join)
async def test_wrong_settings_are_all_named_at_once(program: tuple[str, ...], tmp_path: Path) -> None:
    """Exit code 2, one line for each wrong field, no traceback; nothing was started."""
    where = ("--data-dir", str(tmp_path / "data")) if program in {("up",), ("status",)} else ()
    code, out, err = await penstock(
        *program,
        *where,
        PENSTOCK_GATEWAY__PORT="70000",
        PENSTOCK_WORKER__LEASE_S="soon",
        PENSTOCK_RETREIVER__SLOTS="4",
        LLM_URLS="ftp://somewhere",
        PENSTOCK_RETRY__BASE_S="2",
        PENSTOCK_RETRY__CAP_S="1",
    )
    assert (code, out) == (2, "")
    for name in (
        "PENSTOCK_GATEWAY__PORT",
        "PENSTOCK_WORKER__LEASE_S",
        "did you mean PENSTOCK_RETRIEVER__SLOTS?",
        "PENSTOCK_LLM",
        "PENSTOCK_RETRY",
    ):
        assert name in err
    assert "Traceback" not in err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("url", ["not a url", "http://127.0.0.1:1?slots=0", "http://127.0.0.1:99999"])
async def test_a_wrong_replica_address_is_refused(url: str, tmp_path: Path) -> None:
    """`--llm` with something that no replica can have: exit code 2 and a word about it."""
    code, out, err = await penstock("up", "--port", "0", "--data-dir", str(tmp_path / "data"), "--llm", url)
    assert (code, out) == (2, "")
    assert "LLM" in err
    assert "Traceback" not in err


async def test_a_busy_port_is_refused(whole: Outside, tmp_path: Path) -> None:
    """The second `up` on a port says which and how to choose another, and starts nothing."""
    port = whole.system.url.rpartition(":")[2]
    code, out, err = await penstock("up", "--port", port, "--data-dir", str(tmp_path / "data"))
    assert (code, out) == (2, "")
    assert f"port {port} of 127.0.0.1 is taken" in err
    assert "--port" in err

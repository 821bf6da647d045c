"""Everything as processes: two retrievers on one Qdrant server, dense vectors from an embeddings server, one `up`."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import orjson

from tests.conftest import wait_until
from tests.whole.system import END_S, System, command, environment, outside, penstock

ROOT = Path(__file__).parents[2]


@contextmanager
def running(*arguments: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of our own processes, which is killed at the end."""
    with subprocess.Popen(arguments, cwd=ROOT, env=environment(**environ), stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def address_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return str(orjson.loads(process.stdout.readline())["url"])


async def test_two_retrievers_share_a_server_and_one_of_them_may_die(tmp_path: Path) -> None:
    """`up` and `ingest` work with a server's index and dense vectors as they do without; nothing else changes."""
    (tmp_path / "locks.md").write_text("# Canals\n\nA lock lifts boats from one level of a canal to another.\n")
    (tmp_path / "weirs.md").write_text("# Rivers\n\nA weir is a low dam over which a river flows.\n")
    with ExitStack() as stack:
        qdrant = stack.enter_context(running(sys.executable, "-m", "tests.stages.qdrant_in_small"))
        replica = stack.enter_context(running(*command("mock-llm", "--latency", "0.01")))
        index = {
            "QDRANT_URL": address_of(qdrant),
            "PENSTOCK_ENCODER__EMBEDDINGS_URL": address_of(replica),
            "PENSTOCK_ENCODER__EMBEDDINGS_MODEL": "hashed",
        }
        url = index["PENSTOCK_ENCODER__EMBEDDINGS_URL"]
        system = stack.enter_context(System("--llm", url, **index))
        assert not (system.data_dir / "index").exists()
        redis = {"PENSTOCK_REDIS__URL": system.redis_url}
        stack.enter_context(running(*command("stage", "retriever"), **index, **redis))
        async with outside(system) as whole:
            code, _, err = await penstock("ingest", str(tmp_path), "--url", system.url)
            assert code == 0, err

            async def retrievers() -> int:
                _, out, _ = await penstock("status", "--redis-url", system.redis_url, "--json")
                return sum("retriever" in worker["stages"] for worker in orjson.loads(out)["workers"])

            async def both_work() -> bool:
                return await retrievers() == 2

            await wait_until(both_work, timeout_s=END_S, every_s=0.1)
            replies = await whole.ask_many(20, 5, query="What lifts boats?")
            assert {reply.status for reply in replies} == {200}
            assert {reply.body["sources"][0]["title"] for reply in replies} == {"Canals"}
            # The weir has no word of the question in common; only the dense vector can have brought it.
            assert {len(reply.body["sources"]) for reply in replies} == {2}

            system.kill("retriever", signal.SIGKILL)
            assert (await whole.ask("What lifts boats?")).body["sources"][0]["title"] == "Canals"

            code, _, err = await penstock("stage", "retriever", QDRANT_URL=index["QDRANT_URL"], **redis)
            assert code == 2
            assert "was filled by bm25/english/1 + dense/hashed" in err
            assert "Traceback" not in err

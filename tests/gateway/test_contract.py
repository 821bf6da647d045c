"""What the description says is what the gateway does, whatever it is sent.

Schemathesis makes requests from `/openapi.json`: right ones, wrong ones, and rows of them that use each other's ids. It
holds each answer against it: no fault of ours, no status that is not described, no body that its model does not fit.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import zlib
from pathlib import Path

from gateway.app import create_app, operations
from gateway.server import Server, listen
from pipeline.connection import Link
from pipeline.errors import Reject
from pipeline.front import Front
from pipeline.job import Done, Job
from pipeline.settings import Settings
from tests.conftest import PATIENCE_S
from tests.gateway.fake import RESULT
from tests.rig import Scripted, working

CONFIG = Path(__file__).with_name("schemathesis.toml")
ENDLESS = ["/chat/{chat_id}/events"]
"""Whoever waits for the end of such an answer waits for ever; `test_chats.py` reads from it."""


async def pass_on(job: Job) -> Done:
    """Do what encoder and retriever leave behind."""
    return Done({"document_id": job.payload.get("document_id"), "chunks": 1, "deleted": True})


async def sometimes(job: Job) -> Done:
    """Answer most questions, and refuse some for good."""
    if zlib.crc32(str(job.payload).encode()) % 4 == 0:
        raise Reject("the model will not say", code="content_filtered")
    return Done(RESULT)


async def test_every_answer_is_one_that_the_description_allows(
    link: Link, front: Front, settings: Settings, tmp_path: Path
) -> None:
    """With a real Redis behind it, and workers that answer some jobs and refuse others."""
    settings = settings.model_copy(
        update={"gateway": settings.gateway.model_copy(update={"port": 0})},
    )
    stages = [Scripted("encoder", pass_on), Scripted("retriever", pass_on), Scripted("llm", sometimes)]
    stop = asyncio.Event()
    async with working(settings, stages):
        with listen(settings.gateway) as listener:
            server = Server(settings, create_app(settings, front), stop)
            serving = asyncio.create_task(server.serve(sockets=[listener]), name="gateway")
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/openapi.json"
            command = ["-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", url, "--no-color"]
            command += [word for path in ENDLESS for word in ("--exclude-path", path)]
            tried = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            try:
                said, _ = await asyncio.wait_for(tried.communicate(), 5 * PATIENCE_S)
            finally:
                if tried.returncode is None:
                    tried.kill()
                    await tried.wait()
                stop.set()
                await serving
    text = said.decode()
    assert tried.returncode == 0, text
    described = [row for row in operations() if row.path not in {"/openapi.json", "/docs"}]
    assert f"{len(described) - len(ENDLESS)} selected / {len(described)} total" in text, text
    assert sorted(ENDLESS) == [row.path for row in described if row.streams]
    assert "Stateful" in text
    assert {"document", "document_deletion", "query"} <= {job.flow for stage in stages for job in stage.seen}

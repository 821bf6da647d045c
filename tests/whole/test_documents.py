"""Documents come, change and go; tenants see their own only."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import orjson

from stages.index import EmbeddedIndex
from stages.vectors import KeywordModel
from tests.whole.system import Outside, System, command, environment, outside, penstock

OLD = "The harbour master of Quillmouth keeps seventeen lanterns in the northern shed."
NEW = "The harbour master of Quillmouth keeps forty-two lanterns in the southern shed."
QUESTION = "How many lanterns does the harbour master of Quillmouth keep?"


async def put(whole: Outside, document: str, text: str, **headers: str) -> dict[str, Any]:
    """Index a document and return its job's outcome."""
    reply = await whole.send("POST", "/documents", {"id": document, "text": text}, **headers)
    assert (reply.status, reply.body["id"]) == (202, document)
    return await whole.outcome(reply.body["job_id"], **headers)


async def delete(whole: Outside, document: str, **headers: str) -> dict[str, Any]:
    """Take a document out and return its job's outcome."""
    reply = await whole.send("DELETE", f"/documents/{document}", **headers)
    assert reply.status == 202
    return await whole.outcome(reply.body["job_id"], **headers)


async def texts_of(whole: Outside, document: str, **headers: str) -> list[str]:
    """Ask, and return those sources that are of a document."""
    reply = await whole.send("POST", "/query", {"query": QUESTION}, **headers)
    assert reply.status == 200
    return [source["text"] for source in reply.body["sources"] if source["document"] == document]


async def test_a_question_is_answered_from_the_first_documents(whole: Outside) -> None:
    """A fresh system knows our own pages: the answer names its sources, its worker, its replica and its times."""
    reply = await whole.ask("What happens to a job when its worker dies?", metadata={"ticket": 7})
    assert reply.status == 200
    body = reply.body
    assert body["answer"]
    assert {source["document"] for source in body["sources"]} & {"CONCEPTS.md", "README.md", "OPERATIONS.md"}
    assert set(body["sources"][0]) == {"document", "title", "chunk", "score", "text"}
    assert body["replica"] in whole.system.replicas
    assert body["worker"]
    assert body["usage"]["completion_tokens"] > 0
    assert body["metadata"] == {"ticket": 7}
    spans = dict(body["timings_ms"])
    total = spans.pop("total")
    assert {"encoder", "retriever", "llm", "gateway", "return"} <= set(spans)
    assert abs(sum(spans.values()) - total) < 1


async def test_a_changed_document_replaces_its_chunks_and_a_deleted_one_leaves(whole: Outside) -> None:
    """What was indexed is found, then what replaced it and nothing else, then nothing."""
    assert (await put(whole, "quillmouth", OLD))["result"] == {"document_id": "quillmouth", "chunks": 1}
    assert await texts_of(whole, "quillmouth") == [OLD]
    await put(whole, "quillmouth", NEW)
    assert await texts_of(whole, "quillmouth") == [NEW]
    assert (await delete(whole, "quillmouth"))["result"] == {"document_id": "quillmouth", "deleted": 1}
    assert await texts_of(whole, "quillmouth") == []


async def test_of_two_at_once_the_later_accepted_wins(whole: Outside) -> None:
    """A long version is still at work when a short one is accepted: the short one stands, nothing of the long one."""
    long = "\n\n".join([OLD] + [f"Lantern {number} of Quillmouth hangs on hook {number}." for number in range(3_000)])
    first = await whole.send("POST", "/documents", {"id": "race", "text": long})
    second = await whole.send("POST", "/documents", {"id": "race", "text": NEW})
    ends = await asyncio.gather(*(whole.outcome(reply.body["job_id"]) for reply in (first, second)))
    assert [end["status"] for end in ends] == ["completed", "completed"]
    assert await texts_of(whole, "race") == [NEW]
    assert (await delete(whole, "race"))["result"]["deleted"] == 1


async def test_a_folder_is_ingested_and_found(whole: Outside, tmp_path: Path) -> None:
    """`ingest --json` reports what it sent; a file that changed replaces what was there."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "harbour.md").write_text(f"# Harbour\n\n{OLD}\n")
    (tmp_path / "tides.txt").write_text("High water at Quillmouth comes an hour after moonrise.\n")
    options = (str(tmp_path), "--url", whole.system.url, "--json")
    code, out, _ = await penstock("ingest", *options)
    assert code == 0
    names = [row["id"] for row in orjson.loads(out)["indexed"]]
    assert len(names) == 2
    (harbour,) = (name for name in names if "harbour" in name)
    assert await texts_of(whole, harbour) == [f"# Harbour\n\n{OLD}"]
    (tmp_path / "below" / "harbour.md").write_text(f"# Harbour\n\n{NEW}\n")
    assert (await penstock("ingest", *options))[0] == 0
    assert await texts_of(whole, harbour) == [f"# Harbour\n\n{NEW}"]
    for name in names:
        await delete(whole, name)


async def test_an_ingest_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """Started again it sends only what was not indexed yet, and the index holds each chunk once."""
    documents, before_kill = 60, 15
    for number in range(documents):
        text = "\n\n".join(f"Lantern {number}-{part} hangs. " + "It is lit at dusk. " * 60 for part in range(3))
        (tmp_path / f"{number}.md").write_text(f"# Shed {number}\n\n{text}\n")
    with System(PENSTOCK_API_KEYS="own:own-secret,anna:a-secret") as own:  # what `up` indexes is the first one's
        options = (str(tmp_path), "--url", own.url, "--api-key", "a-secret")
        ingest = await asyncio.create_subprocess_exec(
            *command("ingest", *options), cwd="/", env=environment(), stdout=asyncio.subprocess.PIPE
        )
        assert ingest.stdout is not None
        for _ in range(before_kill):
            assert (await ingest.stdout.readline()).startswith(b"indexed")
        ingest.kill()
        await ingest.wait()

        code, out, _ = await penstock("ingest", *options, "--json")
        second = orjson.loads(out)
        assert code == 0
        assert len(second["unchanged"]) >= before_kill
        assert len(second["unchanged"]) + len(second["indexed"]) == documents
        code, out, _ = await penstock("ingest", *options, "--json")
        third = orjson.loads(out)
        assert (code, third["documents"], len(third["unchanged"])) == (0, 0, documents)
        async with outside(own) as whole:
            await whole.until_idle()
        await own.end(signal.SIGTERM)  # the index has one owner
        index = EmbeddedIndex.open(own.data_dir / "index", KeywordModel("english").name)
        try:
            assert index.count("anna") == sum(row["chunks"] for row in third["unchanged"])
        finally:
            index.close()


async def test_tenants_see_their_own_documents_and_jobs_only() -> None:
    """Two API keys: neither finds, sees, cancels nor deletes what is the other's; without a key there is nothing."""
    anna, ben = {"authorization": "Bearer a-secret"}, {"authorization": "Bearer b-secret"}
    with System(PENSTOCK_API_KEYS="anna:a-secret,ben:b-secret") as own:
        async with outside(own) as whole:
            reply = await whole.send("POST", "/documents", {"id": "quillmouth", "text": OLD}, **anna)
            job_id = reply.body["job_id"]
            assert (await whole.outcome(job_id, **anna))["status"] == "completed"
            assert await texts_of(whole, "quillmouth", **anna) == [OLD]
            assert await texts_of(whole, "quillmouth", **ben) == []

            assert (await delete(whole, "quillmouth", **ben))["result"]["deleted"] == 0
            await put(whole, "quillmouth", NEW, **ben)
            assert await texts_of(whole, "quillmouth", **anna) == [OLD]
            assert await texts_of(whole, "quillmouth", **ben) == [NEW]

            await whole.behave(latency=1)
            reply = await whole.send("POST", "/query", {"query": QUESTION, "background": True}, **anna)
            running = reply.body["job_id"]
            for method, path in (
                ("GET", f"/jobs/{job_id}"),
                ("GET", f"/query/{running}"),
                ("POST", f"/query/{running}/cancel"),
            ):
                reply = await whole.send(method, path, **ben)
                assert (reply.status, reply.body["error"]["code"]) == (404, "job_not_found")
            assert (await whole.send("GET", f"/jobs?ids={running}", **ben)).body == {"jobs": {running: None}}
            assert (await whole.outcome(running, **anna))["status"] == "completed"
            assert (await whole.ask()).status == 401
            await whole.until_idle()

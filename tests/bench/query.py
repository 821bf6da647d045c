"""query: what a question costs from HTTP to HTTP, by process, and what Penstock adds to the replica's own time."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any, Final

from gateway.client import Client
from loadtest.questions import BUILT_IN
from tests.bench import loads
from tests.bench.figures import Report, Window, errors_of, spread
from tests.bench.processes import Broken, Processes
from tests.ports import take_port
from tests.retrieval.stdlib_docs import documents
from tests.servers import RedisServer

Json = dict[str, Any]

STAGES: Final = ("encoder", "retriever", "llm")
OURS: Final = ("gateway", *STAGES, "redis")
"""Whose CPU time is a question's; the replicas' and the load generator's stand beside it."""
SLOTS: Final = 20  # of each of three replicas: none of 50 questions in flight waits for a slot
CHUNK_CHARS: Final = 600  # below the encoder's 300 tokens: one chunk per document
READY_S: Final = 240.0


def run(
    *,
    rounds: int = 3,
    seconds: float = 6.0,
    open_seconds: float = 8.0,
    warm: float = 1.0,
    in_flight: int = 50,
    rate: float = 100.0,
    chunks: int = 1000,
    mock_s: float = 0.05,
    replicas: int = 3,
) -> Report:
    """Start the parts that `penstock up` starts, index, and measure in each round: closed, open, the replicas alone."""
    report = Report(
        "query",
        {"rounds": rounds, "in_flight": in_flight, "rate": rate, "chunks": chunks, "replica_ms": mock_s * 1000},
    )
    closed: list[Window] = []
    opened: list[Window] = []
    alone: list[Window] = []
    with RedisServer(appendonly=True) as redis, Processes() as processes:
        url, mocks = start(processes, redis, mock_s, replicas)
        found = asyncio.run(index(url, chunks))
        questions = [{"query": question} for question in BUILT_IN]
        asking = json.dumps({"urls": [url], "path": "/query", "bodies": questions})
        prompts = [{"model": "default", "messages": [{"role": "user", "content": text}]} for text in BUILT_IN]
        calling = json.dumps({"urls": mocks, "path": "/v1/chat/completions", "bodies": prompts})
        asker = processes.start("load", "tests.bench.driver", "http", asking, talks=True)
        caller = processes.start("load on replicas", "tests.bench.driver", "http", calling, talks=True)
        for child in (asker, caller):
            child.line()
        counted = {**processes.pids("gateway", *STAGES), "redis": redis.pid}
        pids = {**counted, **processes.pids(*(f"replica{n}" for n in range(replicas)))}
        offsets = loads.steady(rate, warm + open_seconds)
        for number in range(rounds):
            closed.append(asker.window(do="closed", in_flight=in_flight, warm_s=warm, seconds=seconds, pids=pids))
            opened.append(asker.window(do="open", offsets=offsets, warm_s=warm, pids=pids))
            alone.append(caller.window(do="open", offsets=offsets, warm_s=warm, pids={}))
            sys.stderr.write(f"round {number + 1}: {closed[-1].cpu_per_call(OURS):.0f} us\n")
    report.notes.append(f"{found} chunks were indexed; Redis keeps an append-only file, as under `up`")
    _fill(report, closed, opened, alone)
    return report


def start(
    processes: Processes,
    redis: RedisServer,
    mock_s: float,
    replicas: int,
    *,
    slots: int = SLOTS,
    more: tuple[str, ...] = (),
) -> tuple[str, list[str]]:
    """Start replicas, stages and gateway; return the gateway's address and the replicas', when all are ready.

    Args:
        more: further stages.
    """
    mocks = []
    for number in range(replicas):
        port = take_port()
        options = ("--port", str(port), "--latency", f"fixed:{mock_s:g}", "--slots", str(slots))
        processes.start(f"replica{number}", "penstock", "mock-llm", *options)
        mocks.append(f"http://127.0.0.1:{port}")
    port = take_port()
    environ = {
        "PENSTOCK_REDIS__URL": redis.url,
        "PENSTOCK_LLM__URLS": ",".join(mocks),
        "PENSTOCK_LLM__SLOTS": str(slots),
        "PENSTOCK_HISTORY__URL": f"sqlite:///{processes.folder}/history.db",
        "PENSTOCK_HISTORY__AUTO_UPGRADE": "true",
        "PENSTOCK_RETRIEVER__PATH": str(processes.folder / "index"),
        "PENSTOCK_GATEWAY__PORT": str(port),
    }
    for stage in (*STAGES, *more):
        processes.start(stage, "stages", stage, environ=environ)
    gateway = processes.start("gateway", "gateway", environ=environ)
    url = f"http://127.0.0.1:{port}"
    give_up = time.monotonic() + READY_S
    while not _is_ready(url):
        if time.monotonic() > give_up or gateway.process.poll() is not None:
            raise Broken("\n".join(f"{child.name}: {child.last_words()}" for child in processes.children.values()))
        time.sleep(0.05)
    return url, mocks


def ask(processes: Processes, url: str, *, rate: float, seconds: float, warm: float) -> Window:
    """Ask the built-in questions at an even rate, and measure one window, by a process that ends with it.

    By a new one each time: the gateway closes connections that were idle while nobody was asking.
    """
    questions = [{"query": question} for question in BUILT_IN]
    asking = json.dumps({"urls": [url], "path": "/query", "bodies": questions})
    asker = processes.start("load", "tests.bench.driver", "http", asking, talks=True)
    asker.line()
    window = asker.window(do="open", offsets=loads.steady(rate, warm + seconds), warm_s=warm, pids={})
    processes.end("load")
    return window


async def index(url: str, chunks: int) -> int:
    """Index that many pieces of the docstrings of Python's standard library; return how many chunks they became."""
    limit = asyncio.Semaphore(16)

    async def put(client: Client, number: int, text: str) -> int:
        async with limit:
            accepted = await client.send("POST", "/documents", {"id": f"piece-{number}", "text": text})
            outcome = await client.outcome(accepted.json()["job_id"])
            return int(outcome["result"]["chunks"])

    async with Client(url) as client:
        return sum(await asyncio.gather(*(put(client, number, text) for number, text in enumerate(pieces(chunks)))))


def pieces(count: int) -> list[str]:
    """Return *count* different texts of some paragraphs each."""
    found: dict[str, None] = {}
    for module, text in documents():
        piece = ""
        for paragraph in text.split("\n\n"):
            if len(piece) + len(paragraph) > CHUNK_CHARS and len(piece) > CHUNK_CHARS // 3:
                found[f"{module}\n\n{piece[:CHUNK_CHARS]}"] = None
                piece = ""
                if len(found) == count:
                    return list(found)
            piece += paragraph + "\n\n"
    return list(found)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _fill(report: Report, closed: list[Window], opened: list[Window], alone: list[Window]) -> None:
    report.row(
        "closed loop",
        "/query",
        CPU_us_per_query=spread([window.cpu_per_call(OURS) for window in closed]),
        queries_per_s=spread([window.rate for window in closed]),
        P50_ms=spread([window.quantile_ms(500) for window in closed]),
        P99_ms=spread([window.quantile_ms(990) for window in closed]),
        errors=errors_of(closed),
    )
    for windows, title in ((closed, "CPU us per query by process, closed loop"), (opened, "... and in the open loop")):
        for part in OURS:
            report.row(title, part, counted=spread([window.cpu_per_call([part]) for window in windows]))
        replicas = [name for name in windows[0].cpu_us if name.startswith("replica")]
        report.row(title, "replicas", beside=spread([window.cpu_per_call(replicas) for window in windows]))
        report.row(title, "load generator", beside=spread([window.cpu_per_call(["submitter"]) for window in windows]))
    title = "open loop, latency from the planned start"
    for name, windows in (("/query", opened), ("a replica alone", alone)):
        report.row(
            title,
            name,
            P50_ms=spread([window.quantile_ms(500) for window in windows]),
            P99_ms=spread([window.quantile_ms(990) for window in windows]),
            lag_P50_ms=spread([window.lag_ms(500) for window in windows]),
            lag_P99_ms=spread([window.lag_ms(990) for window in windows]),
            errors=errors_of(windows),
        )
    pairs = list(zip(opened, alone, strict=True))
    added = {f"P{p // 10}_ms": spread([o.quantile_ms(p) - a.quantile_ms(p) for o, a in pairs]) for p in (500, 990)}
    report.row(title, "added by Penstock", **added)

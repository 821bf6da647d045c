"""ingest: what 50 questions per second notice of 1,000 documents being ingested, and what a kill half-way leaves."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

from stages.index import EmbeddedIndex
from stages.vectors import KeywordModel
from tests.bench.figures import Report, Window
from tests.bench.processes import Broken, Child, Processes
from tests.bench.query import ask, pieces, start
from tests.servers import RedisServer

PIECES: Final = 5  # of which a document is made: about five chunks
SHARE: Final = 0.7
"""Of the time that an ingest takes by itself, the window takes so much: it must not outlast one beside questions."""
LEAST_S: Final = 1.0


def run(
    *, rounds: int = 3, documents: int = 1000, rate: float = 50.0, warm: float = 1.0, mock_s: float = 0.05
) -> Report:
    """Ask at an even rate, alone and beside an ingest, in each round; then kill an ingest half-way and repeat it."""
    report = Report("ingest", {"rounds": rounds, "documents": documents, "rate": rate, "replica_ms": mock_s * 1000})
    alone: list[Window] = []
    beside: list[Window] = []
    with RedisServer(appendonly=True) as redis, Processes() as processes:
        url, _ = start(processes, redis, mock_s, 3)
        folders = [processes.folder / name for name in ("measured", "killed")]
        texts = pieces(documents * PIECES)
        for folder in folders:
            _write(folder, documents, texts)
        began = time.monotonic()
        chunks = _ingest(processes, url, folders[0])["chunks"]
        took_s = time.monotonic() - began
        seconds = max(LEAST_S, SHARE * took_s)

        def window() -> Window:
            return ask(processes, url, rate=rate, seconds=seconds, warm=warm)

        for number in range(rounds):
            alone.append(window())
            child = _begin(processes, url, folders[0], "--again")
            child.line()  # it has begun
            beside.append(window())
            outlasted = child.process.poll() is None
            _await(child)
            processes.end("ingest")
            if not outlasted:
                report.notes.append(f"round {number + 1}: the ingest ended before its window did")
            p99 = [window.quantile_ms(990) for window in (alone[-1], beside[-1])]
            sys.stderr.write(f"round {number + 1}: P99 {p99[0]:.0f} -> {p99[1]:.0f}\n")
        report.beside("questions, latency from the planned start", "an ingest", alone, beside)
        report.notes.append(f"{documents} documents are {chunks} chunks; alone they take {took_s:.1f} s")
        report.notes.append(_killed(processes, url, folders[1], documents, before=chunks))
    return report


def _write(folder: Path, documents: int, texts: list[str]) -> None:
    folder.mkdir()
    for number in range(documents):  # where Python's documentation ends, it begins again
        own = [texts[(number * PIECES + offset) % len(texts)] for offset in range(PIECES)]
        (folder / f"{folder.name}-{number}.md").write_text(f"# {folder.name} {number}\n\n" + "\n\n".join(own))


def _begin(processes: Processes, url: str, folder: Path, *options: str) -> Child:
    return processes.start("ingest", "penstock", "ingest", str(folder), "--url", url, *options, talks=True)


def _ingest(processes: Processes, url: str, folder: Path, *options: str) -> dict[str, Any]:
    """Ingest and return the summary."""
    child = _begin(processes, url, folder, "--json", *options)
    try:
        summary: dict[str, Any] = json.loads(child.line(600.0))
        return summary
    finally:
        processes.end("ingest")


def _await(child: Child) -> None:
    """Read what an ingest says until it ends."""
    try:
        while True:
            child.line(600.0)
    except Broken:
        if child.process.wait(10.0) != 0:
            raise


def _killed(processes: Processes, url: str, folder: Path, documents: int, before: int) -> str:
    """Kill an ingest when half of it is done, start it again; return what the index then holds.

    Args:
        before: chunks it held before.
    """
    child = _begin(processes, url, folder)
    for _ in range(documents // 2):
        child.line()
    child.process.send_signal(signal.SIGKILL)
    child.process.wait()
    processes.end("ingest")
    second = _ingest(processes, url, folder)
    third = _ingest(processes, url, folder)
    expected = before + sum(row["chunks"] for row in third["unchanged"])
    processes.end("retriever")  # the index has one owner
    index = EmbeddedIndex.open(processes.folder / "index", KeywordModel("english").name)
    try:
        found = index.count()
    finally:
        index.close()
    left, sent, more = len(second["unchanged"]), len(second["indexed"]), len(third["indexed"])
    return (
        f"killed at {documents // 2} documents: started again, it left {left} alone and sent {sent}; "
        f"a third start sent {more}; {expected} chunks expected in the index, {found} found"
    )

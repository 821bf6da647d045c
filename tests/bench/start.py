"""start: from typing `penstock up` to the first answer, with everything installed already."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.bench.figures import Report, spread
from tests.bench.processes import Processes
from tests.ports import take_port


def run(*, rounds: int = 5, once: bool = False) -> Report:
    """Start with a new data directory (it indexes the documentation first), then again with the same one.

    A round that is not counted comes first: it compiles what was not compiled yet. With *once* there is one start only,
    and it counts.
    """
    report = Report("start", {"rounds": rounds})
    found: dict[str, list[tuple[float, float]]] = {"new data directory": []}
    if not once:
        found["once more, same directory"] = []
    for number in [1] if once else range(rounds + 1):
        with tempfile.TemporaryDirectory(prefix="penstock-start-", dir="/tmp") as folder:
            for name, times in found.items():
                took = first_answer_s(Path(folder) / "data")
                if number:
                    times.append(took)
                    sys.stderr.write(f"round {number}: {name}: {took[1]:.2f} s\n")
    for name, times in found.items():
        ready, answered = zip(*times, strict=True)
        report.row("seconds since the command", name, ready=spread(ready), first_answer=spread(answered))
    return report


def first_answer_s(data_dir: Path) -> tuple[float, float]:
    """Return the seconds until `ready` was said, and until a question sent then was answered."""
    with Processes() as processes:
        began = time.monotonic()
        up = processes.start(
            "up", "penstock", "up", "--port", str(take_port()), "--data-dir", str(data_dir), talks=True
        )
        word, _, url = up.line().partition(" ")
        assert word == "ready"
        ready = time.monotonic() - began
        body = json.dumps({"query": "What happens to a job when its worker dies?"}).encode()
        request = urllib.request.Request(f"{url}/query", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["answer"]
        return ready, time.monotonic() - began

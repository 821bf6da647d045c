"""Whether the load tester tells the truth: against servers that say what they did, and about itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from loadtest.generator import Generator, Orders
from loadtest.report import percentile
from loadtest.target import Address
from tests.conftest import PATIENCE_S
from tests.loadtest.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

PERCENTILES = ((500, "p50"), (900, "p90"), (950, "p95"), (990, "p99"))
ROUNDED = 0.999  # to the digits of a histogram


@contextmanager
def plain_target(**options: Any) -> Iterator[str]:
    """A server in a process of its own; gives its URL."""
    command = [sys.executable, "-m", "tests.loadtest.plain_target", json.dumps(options)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


def loadtest(*arguments: str, code: int | None = 0) -> dict[str, Any]:
    """Run it and return its report; *code* None: any that comes with a report."""
    command = [sys.executable, "-W", "error", "-m", "loadtest", "--json", "--quiet", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    if code is not None:
        assert ended.returncode == code, ended.stdout
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


def what_it_did(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/did", timeout=PATIENCE_S) as answer:
        did: dict[str, Any] = json.load(answer)
    return did


def test_an_open_loop_sees_a_stall_that_a_closed_loop_misses(tmp_path: Path) -> None:
    """A request planned u seconds into a stall of D waits D - u, so the P99 of a run of T seconds is D - T / 100.

    On a busy machine requests wait longer, but each at least from its planned instant until the server answers it. None
    comes before its instant, so the run began no later than the earliest of them says.
    """
    rate, total, stall_s = 200, 800, 2.0
    file = tmp_path / "numbers.txt"
    file.write_text("\n".join(str(n) for n in range(total)))
    with plain_target(stall_at=rate, stall_s=stall_s) as url:
        arguments = ("--rate", f"{rate}", "-n", f"{total}", "--questions", str(file), "--max-lag", "60000")
        seen = loadtest("--url", url, *arguments, code=None)
        did = what_it_did(url)
    planned_s = [int(question) / rate for question in did["questions"]]
    began_s = min(came_s - at_s for came_s, at_s in zip(did["came_s"], planned_s, strict=True))
    waits_ms = sorted(
        (ended_s - began_s - at_s) * 1000 for ended_s, at_s in zip(did["ended_s"], planned_s, strict=True)
    )
    assert seen["total"] == len(waits_ms) == total
    assert percentile(waits_ms, 990) > 0.9 * stall_s * 1000
    for per_mille, name in PERCENTILES:
        assert seen["latency_ms"][name] >= percentile(waits_ms, per_mille) * ROUNDED
    with plain_target(stall_at=100, stall_s=1.0) as url:
        closed = loadtest("--url", url, "-c", "2", "-n", "1000")
        stalled_ms = what_it_did(url)["stalled_s"] * 1000
    assert closed["latency_ms"]["max"] >= stalled_ms
    assert closed["latency_ms"]["p99"] < stalled_ms


def test_percentiles_are_those_that_the_server_had() -> None:
    """Against answers of a known distribution every percentile is the server's own, and what the way there took.

    What the load tester measures of a request holds what the server measured of it, so that each of the sorted spans is
    at least the server's. All that they are longer by is the difference of the sums: little on a quiet machine.
    """
    with plain_target(median_s=0.3, sigma=0.5) as url:
        report = loadtest("--url", url, "--rate", "150", "-d", "2.5", "--max-lag", "60000", code=None)
        spans = sorted(what_it_did(url)["spans_ms"])
    assert report["total"] == len(spans)
    added_ms = report["service_ms"]["average"] * len(spans) - sum(spans)
    assert added_ms > 0
    for per_mille, name in PERCENTILES:
        its_own_ms, seen_ms = percentile(spans, per_mille), report["service_ms"][name]
        assert its_own_ms * ROUNDED <= seen_ms <= (its_own_ms + added_ms) / ROUNDED


async def test_a_closed_loop_begins_not_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop's timers may ring early: here each does, by a clock that goes on only when somebody looks."""
    start_s, looks = 100.0, count()
    monkeypatch.setattr("loadtest.generator.perf_counter", lambda: start_s - 0.002 + next(looks) * 0.0001)
    told: list[dict[str, Any]] = []
    address = Address.of("http://127.0.0.1:1")  # nothing is sent: a run of no requests ends as it begins
    orders = Orders("127.0.0.1", address, [], 1, 1.0, 1.0, None, part=0, parts=1, clients=1, count=0)
    ended = await Generator(orders, start_s, told.append).run()
    assert ended["ended_s"] > start_s


def test_generators_together_send_the_whole_plan_once(tmp_path: Path) -> None:
    """Three processes share arrivals and questions without overlap, and their counts add up."""
    questions = [f"question {n}" for n in range(100)]
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(questions))
    with plain_target() as url:
        arguments = ("--url", url, "--questions", str(file), "--processes", "3", "-n", "100", "--max-lag", "60000")
        report = loadtest(*arguments, "--rate", "400", "--arrivals", "poisson", "--seed", "7")
        assert sorted(what_it_did(url)["questions"]) == sorted(questions)
    assert (report["total"], report["latency_ms"]["samples"], report["lag_ms"]["samples"]) == (100, 100, 100)
    assert sum(second["sent"] for second in report["seconds"]) == 100
    assert len({slow["job_id"] for slow in report["slowest"]}) == 10
    assert report["manifest"]["settings"]["seed"] == 7


def test_generators_share_a_closed_loop() -> None:
    """Requests and clients are split evenly, the rest going to the first."""
    with plain_target() as url:
        report = loadtest("--url", url, "--processes", "2", "-n", "101", "-c", "5")
    assert (report["total"], report["successful"], report["replicas"]) == (
        101,
        101,
        {"http://replica-0": 51, "http://replica-1": 50},
    )


def test_a_run_that_sent_late_is_invalid() -> None:
    """No generator sends within a nanosecond of its plan; the promise is kept, and worth nothing."""
    with plain_target() as url:
        report = loadtest("--url", url, "--rate", "100", "-n", "20", "--max-lag", "1e-6", "--slo", "p50<10s", code=3)
    assert not report["verdict"]["is_valid"]
    assert report["promise"][0]["is_kept"]
    assert report["late"] == 20


def test_waiting_for_a_connection_is_the_load_testers_own_lag() -> None:
    """With one connection and answers of a tenth of a second most arrivals stand in line, which is not held against the
    server: its service times, one after the other, fit into the run."""
    with plain_target(median_s=0.1, sigma=0.0) as url:
        report = loadtest("--url", url, "--rate", "100", "-n", "10", "--connections", "1", code=3)
    assert report["lag_ms"]["max"] > 500
    assert report["service_ms"]["average"] * 10 <= report["duration_s"] * 1000
    assert report["latency_ms"]["max"] > 850


@pytest.mark.parametrize(("slo", "code"), [("p99<100s,errors<0.1%", 0), ("p99<100s,max<1us", 99)])
def test_the_exit_code_tells_whether_the_promise_was_kept(slo: str, code: int) -> None:
    """One broken clause breaks it."""
    with plain_target() as url:
        report = loadtest("--url", url, "-n", "20", "--slo", slo, code=code)
    assert [judged["is_kept"] for judged in report["promise"]] == [True, code == 0]


def test_the_waterfall_adds_up_to_the_whole() -> None:
    """At every percentile the spans are the latency, within one per cent."""
    with plain_target(median_s=0.05, sigma=0.3, timings=True) as url:
        report = loadtest("--url", url, "--rate", "200", "-n", "200", "--max-lag", "60000")
    assert [fall["percent"] for fall in report["waterfall"]] == [50, 90, 95, 99, 99.9]
    latencies = [percentile["ms"] for percentile in report["percentiles"]]
    for fall, latency_ms in zip(report["waterfall"], latencies, strict=True):
        assert list(fall["spans_ms"]) == ["send lag", "gateway", "encoder_wait", "encoder", "return", "outside"]
        assert sum(fall["spans_ms"].values()) == pytest.approx(fall["whole_ms"], rel=1e-6)
        assert fall["whole_ms"] == pytest.approx(latency_ms, rel=0.0125)  # a bucket and the histogram's own digits


def test_an_interrupted_open_loop_writes_every_report(tmp_path: Path) -> None:
    """Text, JSON and page tell of what had ended; the exit code is 130."""
    page, file = tmp_path / "report.html", tmp_path / "report.json"
    with plain_target(median_s=0.02) as url:
        command = [sys.executable, "-m", "loadtest", "--url", url, "--rate", "50", "--html", str(page)]
        command += ["--json-file", str(file), "--processes", "2", "--max-lag", "60000"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            while len(what_it_did(url)["spans_ms"]) < 10:
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            written, _ = process.communicate()
    assert process.returncode == 130
    report = json.loads(file.read_text())
    assert report["is_interrupted"]
    assert report["successful"] >= 10
    assert "(interrupted)" in written
    assert "Interrupted" in page.read_text()


def test_too_few_descriptors_are_found_out_before_the_start() -> None:
    """One line, exit code 2, and nothing is sent."""
    with plain_target() as url:
        program = f"ulimit -n 200; exec {sys.executable} -m loadtest --url {url} -c 300"
        ended = subprocess.run(["sh", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        assert what_it_did(url)["spans_ms"] == []
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("loadtest: 300 connections need 364 open files in a process, and 200 are allowed")
    assert ended.stderr.count("\n") == 1


def test_the_highest_rate_is_searched_for_and_confirmed(tmp_path: Path) -> None:
    """A promise about the rate itself breaks between the bounds, whatever the machine does."""
    file = tmp_path / "found.json"
    with plain_target() as url:
        command = [sys.executable, "-W", "error", "-m", "loadtest", "--url", url, "--saturate", "30:60", "-d", "0.5"]
        command += ["--slo", "rate<45", "--max-lag", "60000", "--json-file", str(file), "--quiet"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads(file.read_text())
    assert (ended.returncode, ended.stderr) == (0, "")
    assert 30 <= found["rate"] < found["knee"]["rate"] <= found["rate"] * 1.05
    assert sum(trial["rate"] == found["rate"] for trial in found["trials"]) == 4
    assert "The knee: at" in ended.stdout
    assert "rate<45 no longer holds" in ended.stdout


def test_a_search_whose_target_goes_away_still_tells_of_its_trials(tmp_path: Path) -> None:
    """One line says what happened, and what was tried before is not lost."""
    file = tmp_path / "found.json"
    with plain_target() as url:
        command = [sys.executable, "-m", "loadtest", "--url", url, "--saturate", "30:60", "-d", "0.5", "--quiet"]
        command += ["--slo", "errors<0.1%", "--max-lag", "60000", "--json-file", str(file)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert "kept" in process.stdout.readline()
    with process:
        _, said = process.communicate()
    assert (process.returncode, said) == (2, f"loadtest: cannot reach {url}: Connection refused\n")
    found = json.loads(file.read_text())
    assert (found["trials"][0]["ended"], found["rate"], found["is_interrupted"]) == ("kept", None, True)


def test_a_generator_that_dies_ends_the_run_with_one_line() -> None:
    """Figures of half the generators are none."""
    with plain_target() as url:
        command = [sys.executable, "-m", "loadtest", "--url", url, "-d", "60", "--rate", "50", "--quiet"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            while not what_it_did(url)["spans_ms"]:
                assert process.poll() is None
            (child,) = children_of(process.pid)
            os.kill(child, signal.SIGKILL)
            written, said = process.communicate()
    assert (process.returncode, written) == (2, "")
    assert said == f"loadtest: a generator (process {child}) ended in the middle of the run\n"


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

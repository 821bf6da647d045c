"""The load tester as a command, against a real server in its own process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from loadtest.client import Exchange, Peer
from loadtest.options import LoadOptions
from loadtest.run import REACH_S, CannotWrite, run, save
from loadtest.target import Address
from tests.loadtest.conftest import ROOT, until
from tests.loadtest.rude import rude_target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import aiohttp


@pytest.fixture
def target() -> Iterator[str]:
    """The base URL of a server that refuses every tenth query."""
    command = [sys.executable, "-m", "tests.loadtest.target"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


def loadtest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "loadtest", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_reports_shares_errors_and_latencies(target: str) -> None:
    """A hundred requests, ten of them refused: the report has every one, and exit code 1 says that some failed."""
    ended = loadtest("--url", target, "--requests", "100", "--concurrency", "5", "--json")
    assert (ended.returncode, ended.stderr) == (1, "")
    report: dict[str, Any] = json.loads(ended.stdout)
    assert (report["total"], report["successful"], report["failed"]) == (100, 90, 10)
    assert report["errors"] == {"http 503 overloaded": 10}
    assert report["workers"] == {"w1": 90}
    assert report["replicas"] == {"http://replica-1": 50, "http://replica-0": 40}
    latency = report["latency_ms"]
    assert 0 < latency["min"] <= latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]


def test_a_run_without_failures_ends_with_code_0_and_lines_for_people(target: str) -> None:
    """Nine requests come before the first refusal."""
    ended = loadtest("--url", target, "-n", "9")
    assert (ended.returncode, ended.stderr) == (0, "")
    for line in ("Total requests:       9", "Successful requests:  9 (100.0%)", "P50 (Median):", "Throughput:"):
        assert line in ended.stdout


async def test_questions_go_round_with_the_key(target: str, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    """Each question of the file is asked in turn, with the API key as bearer token."""
    file = tmp_path / "questions.txt"
    file.write_text("one\ntwo\n")
    arguments = ("--url", f"{target}/", "-n", "5", "--questions", str(file), "--api-key", "secret")
    ended = await asyncio.to_thread(loadtest, *arguments, LT_CONCURRENCY="1")
    assert ended.returncode == 0
    async with session.get(f"{target}/seen") as response:
        seen = await response.json()
    assert [request["query"] for request in seen] == ["one", "two", "one", "two", "one"]
    assert {request["authorization"] for request in seen} == {"Bearer secret"}


@pytest.mark.parametrize("loop", [["--rate", "1000"], ["--saturate", "1000:1001", "--slo", "rate>0"]])
def test_the_concurrency_of_the_environment_is_only_a_default(loop: list[str]) -> None:
    """Where a shell sets it for its closed loops, an open one runs all the same."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    ended = loadtest("--url", f"http://127.0.0.1:{port}", *loop, LT_CONCURRENCY="7")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"loadtest: cannot reach http://127.0.0.1:{port}: Connection refused\n"


def test_a_run_by_duration_ends_by_itself(target: str) -> None:
    """No request starts after the span; those under way are waited for."""
    ended = loadtest("--url", target, "--duration", "0.2", "-c", "2", "--json")
    report = json.loads(ended.stdout)
    assert report["total"] >= 2
    assert report["unfinished"] == 0
    assert report["duration_s"] >= 0.2


def test_requests_that_take_too_long_are_time_outs(target: str, tmp_path: Path) -> None:
    """A target that never answers is told apart from one that refuses."""
    file = tmp_path / "questions.txt"
    file.write_text("sleep\n")
    ended = loadtest("--url", target, "-n", "2", "--timeout", "0.1", "--questions", str(file), "--json")
    assert ended.returncode == 1
    assert json.loads(ended.stdout)["errors"] == {"timeout": 2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_run_still_writes_its_report(
    target: str, session: aiohttp.ClientSession, tmp_path: Path, number: signal.Signals
) -> None:
    """What had ended is reported, what had not is counted, and the exit code is 130."""
    file = tmp_path / "questions.txt"
    file.write_text("quick\nsleep\nsleep\n")
    command = [sys.executable, "-m", "loadtest", "--url", target, "-c", "2", "--questions", str(file), "--json"]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)

    async def both_clients_wait() -> bool:
        async with session.get(f"{target}/seen") as response:
            return len(await response.json()) == 3

    await until(both_clients_wait)
    process.send_signal(number)
    written, _ = await process.communicate()
    report = json.loads(written)
    assert process.returncode == 130
    assert report["is_interrupted"]
    assert (report["total"], report["successful"], report["unfinished"]) == (1, 1, 2)


def test_a_run_that_is_interrupted_while_it_starts_writes_its_report_too(tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches every process of the group, generators that are being started included."""
    file = tmp_path / "report.json"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "loadtest", "--url", f"http://127.0.0.1:{listener.getsockname()[1]}"]
        command += ["--rate", "10", "--processes", "2", "--json-file", str(file), "--quiet"]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            listener.accept()[0].close()  # the look whether anybody listens; the generators come next
            os.killpg(process.pid, signal.SIGINT)
            written, said = process.communicate()
    assert (process.returncode, said) == (130, "")
    assert "(interrupted)" in written
    report = json.loads(file.read_text())
    assert (report["is_interrupted"], report["successful"], report["failed"]) == (True, 0, 0)
    assert report["busiest"] <= 1.5


def test_whoever_stops_reading_the_report_leaves_the_files_alone(target: str, tmp_path: Path) -> None:
    """`penstock loadtest --json-file FILE | head -1` is no fault."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "loadtest", "--url", target, "-n", "9", "--json-file", str(file), "--quiet"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert json.loads(file.read_text())["successful"] == 9


def test_a_file_that_can_no_longer_be_written_is_one_line(tmp_path: Path) -> None:
    """Its folder may be gone when the run ends."""
    with pytest.raises(CannotWrite, match=r"^cannot write the report to .*report.html: No such file or directory$"):
        save(tmp_path / "gone" / "report.html", b"x")


def test_an_unreachable_target_is_one_line_and_code_2(tmp_path: Path) -> None:
    """Nothing is sent, and nothing is reported: no empty file either."""
    file = tmp_path / "report.json"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    ended = loadtest("--url", f"http://127.0.0.1:{port}", "--json-file", str(file))
    assert (ended.returncode, ended.stdout, file.exists()) == (2, "", False)
    assert ended.stderr == f"loadtest: cannot reach http://127.0.0.1:{port}: Connection refused\n"


def test_a_silent_target_is_given_up_within_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    """A host that drops every packet is found out by our own time-out, not by the system's of two minutes.

    The system would say `Connection timed out`.
    """
    with socket.socket() as silent, ExitStack() as stack:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(4):  # fill the line of those who wait to be accepted: Linux then drops who comes after
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(silent.getsockname())
        assert run(LoadOptions(url=f"http://127.0.0.1:{silent.getsockname()[1]}")) == 2
    assert capsys.readouterr().err.endswith("no answer\n")
    assert REACH_S < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "loadtest: requests must be at least 1, not 0\n"),
        (["--url", "nowhere"], "loadtest: url must read http://HOST:PORT or https://HOST:PORT, not 'nowhere'\n"),
        (["--questions", "/nowhere"], "loadtest: cannot read the questions in /nowhere: No such file or directory\n"),
        (["--body", "@/nowhere"], "loadtest: cannot read the body in /nowhere: No such file or directory\n"),
        (["--html", "/no/where"], "loadtest: cannot write the report to /no/where: No such file or directory\n"),
        (
            ["--rate", "5", "-c", "50"],
            "loadtest: concurrency belongs to a closed loop: leave it out with --rate and --saturate, "
            "where --connections bounds what is open\n",
        ),
        (["--saturate", "5:9"], "loadtest: saturate needs a promise: give --slo with it\n"),
        (
            ["--slo", "p99=5ms"],
            "loadtest: slo: 'p99=5ms' is no clause; write for example p99<500ms, max<2s, errors<0.1%, rate>100\n",
        ),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(arguments: list[str], message: str) -> None:
    """The line names the option and says what it takes."""
    ended = loadtest(*arguments)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", message)


def test_a_target_that_dies_on_the_way_is_reported_by_kind(target: str) -> None:
    """Lost and refused connections are failures of their own kinds, and the run goes on to its end."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    command = [sys.executable, "-m", "loadtest", "--url", f"http://127.0.0.1:{port}", "-n", "2", "-c", "1", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        with listener:
            listener.accept()[0].close()  # the look whether anybody listens
            first, _ = listener.accept()
        with first:  # only now: else the next connection might be made before nobody listens any more
            assert first.recv(1)
        written, _ = process.communicate()
    assert json.loads(written)["errors"] == {"connection lost": 1, "no connection": 1}


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKS = b'transfer-encoding: chunked\r\n\r\n3\r\n{"a\r\n4\r\n": 1\r\n1\r\n}\r\n0\r\n\r\n'
OVERFLOW = b'{"timings_ms": {"a": 1e308, "b": 1e308}}'


@pytest.mark.parametrize(
    ("answer", "closes", "errors"),
    [
        (None, True, {"connection lost": 6}),
        (b"\x00\xffhello\r\n\r\n", False, {"broken answer": 6}),
        (HEAD + b'content-length: 9\r\n\r\n{"a"', True, {"connection lost": 6}),
        (HEAD + b'\r\n{"a": 1}', True, {}),  # its end is the connection's
        (HEAD + b'\r\n{"a"', True, {"not json": 6}),
        (HEAD + CHUNKS, False, {}),
        (HEAD + CHUNKS[:-3], True, {"connection lost": 6}),
        (b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", False, {"http 302": 6}),
        (HEAD + b"content-length: 40000000\r\n\r\n" + b" " * 40_000_000, False, {"answer too long": 6}),
        (HEAD + b"content-length: %d\r\n\r\n%b" % (len(OVERFLOW), OVERFLOW), False, {}),
    ],
    ids=["reset", "garbage", "half", "open", "half-open", "chunks", "half-chunks", "redirect", "long", "sums"],
)
def test_whatever_a_target_writes_the_run_ends_and_says_so(
    answer: bytes | None, closes: bool, errors: dict[str, int]
) -> None:
    """Each way of being wrong has its kind, and none of them ends or hangs the load tester."""
    with rude_target(answer, closes=closes) as url:
        ended = loadtest("--url", url, "-n", "6", "-c", "2", "--quiet", "--json")
    assert (ended.returncode, ended.stderr) == (1 if errors else 0, "")
    found = json.loads(ended.stdout)["errors"]
    if answer is None:  # a reset may come before the connection is there for us, or after
        found = {
            "connection lost": sum(
                count for kind, count in found.items() if kind in {"no connection", "connection lost"}
            )
        }
    assert found == errors


async def test_who_stands_in_line_does_not_wait_for_a_target_that_has_gone() -> None:
    """With every connection in use exchanges wait for one; when none can be made any more, they are told at once."""
    ended: list[tuple[int, str | None]] = []

    def on_end(exchange: Exchange, ended_s: float, failure: str | None, status: int, body: bytes) -> None:
        ended.append((exchange.number, failure))

    async def all_have_ended() -> bool:
        return len(ended) == 5

    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    peer = Peer("127.0.0.1", Address.of(f"http://127.0.0.1:{listener.getsockname()[1]}"), 1, on_end)
    for number in range(5):
        peer.start(Exchange(number, 0.0, time.perf_counter() + 600, b"x"))
    client, _ = await asyncio.get_running_loop().sock_accept(listener)
    listener.close()
    client.close()
    await until(all_have_ended)
    await peer.close()
    assert ended == [(0, "connection lost"), *((number, "no connection") for number in range(1, 5))]

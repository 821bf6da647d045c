"""The supervisor, with real processes that are as small as a process can be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import leash
from pipeline.errors import ConfigError
from pipeline.supervisor import (
    BACKOFF_CAP_S,
    GOOD_RUN_S,
    GiveUp,
    Program,
    Restart,
    Supervisor,
    decide_after_exit,
    describe_exit,
)
from tests.cli.conftest import ROOT, clean_environment, lives
from tests.conftest import PATIENCE_S, wait_until

SLEEP = "import time; time.sleep(600)"


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    async with Supervisor(out=2) as running:
        yield running


def python(name: str, code: str) -> Program:
    return Program(name, [sys.executable, "-I", "-S", "-c", code])


async def test_a_process_that_dies_is_started_again(supervisor: Supervisor) -> None:
    """SIGKILL from outside ends the process, not the program."""
    child = supervisor.start(python("sleeper", SLEEP))
    await wait_until(lambda: child.pid)
    first = child.pid
    child.signal(signal.SIGKILL)
    await wait_until(lambda: child.pid not in {None, first})
    assert child.starts == 2


async def test_exit_code_2_ends_the_supervisor_with_the_childs_words(supervisor: Supervisor) -> None:
    """Wrong settings do not get better by trying again."""
    supervisor.start(
        python("picky", "import sys; sys.stderr.write('penstock: port: too large\\nhost: empty'); sys.exit(2)")
    )
    with pytest.raises(ConfigError) as refusal:
        await supervisor.refused()
    assert str(refusal.value) == "port: too large\nhost: empty"


async def test_a_program_that_cannot_be_found_is_tried_again(supervisor: Supervisor) -> None:
    """A missing binary is a crash like any other; its last words say what is missing."""
    child = supervisor.start(Program("ghost", ["/nonexistent/ghost"]))
    await wait_until(lambda: child.starts >= 2)
    await wait_until(lambda: any("No such file" in line for line in child.last_words))


async def test_stop_lets_the_process_end_by_itself(supervisor: Supervisor, tmp_path: Path) -> None:
    """SIGTERM comes first, and a process that obeys it is not killed."""
    said = tmp_path / "said"
    code = f"import signal, sys; signal.signal(15, lambda *_: (open({str(said)!r}, 'w').write('bye'), sys.exit(0)))"
    ready = tmp_path / "ready"
    child = supervisor.start(python("polite", f"{code}; open({str(ready)!r}, 'w'); {SLEEP}"))
    await wait_until(ready.exists)
    await supervisor.stop(["polite"], timeout_s=PATIENCE_S)
    assert said.read_text() == "bye"
    assert child.pid is None
    assert child.starts == 1


async def test_stop_kills_what_does_not_end_in_time(supervisor: Supervisor, tmp_path: Path) -> None:
    """A process that ignores SIGTERM gets SIGKILL."""
    ready = tmp_path / "ready"
    child = supervisor.start(python("deaf", f"import signal; signal.signal(15, 1); open({str(ready)!r}, 'w'); {SLEEP}"))
    await wait_until(ready.exists)
    await supervisor.stop(["deaf"], timeout_s=0.1)
    assert child.pid is None


async def test_stop_ends_a_wait_between_two_starts(supervisor: Supervisor) -> None:
    """Nothing is started after it was stopped, not even what was about to be."""
    child = supervisor.start(python("crasher", "raise SystemExit(1)"))
    await wait_until(lambda: child.starts >= 2)
    await supervisor.stop(["crasher"], timeout_s=PATIENCE_S)
    assert child.pid is None


async def test_leaving_the_supervisor_kills_all_children() -> None:
    """Whatever happens inside, no process is left."""
    async with Supervisor(out=2) as supervisor:
        children = [supervisor.start(python(f"sleeper{number}", SLEEP)) for number in range(3)]
        await wait_until(lambda: all(child.pid for child in children))
        pids = [child.pid or 0 for child in children]
    assert not any(lives(pid) for pid in pids)


async def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL leaves the supervisor no time to stop anything; the kernel does it."""
    said = tmp_path / "pid"
    code = f"""
import asyncio, sys
from pipeline.supervisor import Program, Supervisor
async def main():
    async with Supervisor(out=2) as supervisor:
        program = "import os, time; open({str(said)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
        supervisor.start(Program("sleeper", [sys.executable, "-c", program]))
        await asyncio.sleep(600)
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=clean_environment())
    try:
        await wait_until(lambda: said.exists() and said.read_text())
        pid = int(said.read_text())
        assert lives(pid)
    finally:
        process.kill()
        process.wait()
    await wait_until(lambda: not lives(pid))


async def test_without_the_kernels_help_a_watcher_ends_the_child(tmp_path: Path) -> None:
    """Where there is no PR_SET_PDEATHSIG, a closed pipe says that the supervisor is gone."""
    said = tmp_path / "pid"
    charge = f"import os, time; open({str(said)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"""
import os, subprocess, sys, time
read_end, write_end = os.pipe()
start = "import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline import leash; " \\
    "leash._tie_by_kernel = lambda number: False; leash.main(sys.argv[1:])"
command = [sys.executable, "-c", start, "9", str(os.getpid()), str(read_end), sys.executable, "-c", {charge!r}]
subprocess.Popen(command, pass_fds=[read_end])
os.close(read_end)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        await wait_until(lambda: said.exists() and said.read_text())
        pid = int(said.read_text())
        assert lives(pid)
    finally:
        process.kill()
        process.wait()
    await wait_until(lambda: not lives(pid))


def test_a_child_of_a_dead_parent_does_not_begin() -> None:
    """The parent may die before the arrangement stands: then its number is not our parent's any more."""
    read_end, write_end = os.pipe()
    command = [
        sys.executable,
        "-I",
        "-S",
        leash.__file__,
        "9",
        "1",
        str(read_end),
        sys.executable,
        "-c",
        "print('ran')",
    ]
    ended = subprocess.run(command, pass_fds=[read_end], capture_output=True, check=False)
    os.close(read_end)
    os.close(write_end)
    assert (ended.returncode, ended.stdout) == (1, b"")


@given(st.integers(-64, 255).filter(lambda code: code != 2), st.floats(0, 1e6), st.integers(0, 10_000))
def test_every_other_exit_is_answered_by_a_bounded_wait(code: int, uptime_s: float, early_deaths: int) -> None:
    """However often it dies, it is started again, at most five seconds later."""
    decision = decide_after_exit(code, uptime_s, early_deaths)
    assert isinstance(decision, Restart)
    assert 0 < decision.after_s <= BACKOFF_CAP_S
    assert describe_exit(code)


def test_a_good_run_forgets_early_deaths() -> None:
    """Back-off is for what dies young."""
    assert decide_after_exit(1, GOOD_RUN_S, 9) == decide_after_exit(1, 0.0, 0)
    assert decide_after_exit(2, GOOD_RUN_S, 0) == GiveUp()

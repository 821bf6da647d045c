"""The harness itself: it knows who ended a process, what may be unknown, and when it is given too little to do."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import clean_environment
from tests.faults.cell import Cell
from tests.faults.cluster import Part
from tests.faults.history import Writer
from tests.faults.nemesis import HEARD_AFTER_S, unknown_in_silence
from tests.faults.scenarios import load_all


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """A process that lives until somebody ends it."""
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    return Part("encoder-1", command, clean_environment(), tmp_path / "encoder-1.log")


async def test_process_that_somebody_else_has_ended_is_named_in_all_its_later_lives(part: Part) -> None:
    """Its next life, and an end that the suite asks for, do not make up for it."""
    await part.start()
    os.kill(part.pid, signal.SIGKILL)
    await part.wait()
    assert part.fallen == ["encoder-1.1 (exit code -9)"]
    await part.start()
    await part.kill()
    assert part.fallen == ["encoder-1.1 (exit code -9)"]


async def test_process_that_the_suite_has_ended_is_not_named(part: Part) -> None:
    """Neither one that was killed, nor one that was told to stop, nor one that is frozen."""
    await part.start()
    part.signal(signal.SIGSTOP)
    assert part.fallen == []
    await part.kill()
    await part.start()
    await part.stop()
    assert part.fallen == []


async def test_process_that_may_die_is_not_named(part: Part) -> None:
    """A payload that kills its worker is such a case."""
    await part.start()
    part.may_die = True
    os.kill(part.pid, signal.SIGKILL)
    await part.wait()
    assert part.fallen == []


@pytest.mark.parametrize(
    ("later_s", "excused"), [(-0.1, 0), (0.0, 1), (1.0, 1), (0.9 + HEARD_AFTER_S, 1), (1.2 + HEARD_AFTER_S, 0)]
)
def test_unknown_is_excused_during_a_silence_and_shortly_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later_s: float, excused: int
) -> None:
    """What clients do not hear at any other time is nobody's fault but Penstock's."""
    now_s = 1000.0
    monkeypatch.setattr("tests.faults.history.time.monotonic", lambda: now_s)
    clients, faults = tmp_path / "clients.jsonl", tmp_path / "faults.jsonl"
    with Writer(faults) as writer:
        writer.write("silence", from_s=1000.0, to_s=1001.0)
    with Writer(clients) as writer:
        writer.write("submitted", n=1, kind="ask", subject="heron")
        now_s += later_s
        writer.write("unknown", n=1, code="redis_unavailable")
    assert unknown_in_silence(clients, faults) == excused


async def test_scenario_refuses_fewer_requests_than_can_show_anything(tmp_path: Path) -> None:
    """Rather than be red, or green, for their number."""
    one = load_all()[1]
    with pytest.raises(ValueError, match=f"at least {one.least}, not {one.least - 1}"):
        await one.run(Cell(one.number, one.title, 1, one.least - 1, tmp_path))


def test_every_scenario_has_enough_requests_by_default_and_in_the_slice() -> None:
    """What it refuses must not be what it is given."""
    for one in load_all().values():
        assert one.least <= one.jobs
        assert not one.in_slice or one.least <= one.in_slice

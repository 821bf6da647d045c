"""What the tests of the command line share: real processes, and waiting for what they do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lives(pid: int) -> bool:
    """Say whether process *pid* runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True
    return state not in "ZX"


def clean_environment(**more: str) -> dict[str, str]:
    """Return an environment in which nothing is set but what a shell needs, and our own source tree."""
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)} | more


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a path short enough for a unix socket."""
    with TemporaryDirectory(prefix="penstock-", dir="/tmp") as folder:
        yield Path(folder)

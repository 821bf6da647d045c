"""Does the suite notice? Breaks one promise at a time, in a copy of the tree, and runs the slice until it turns red.

First the slice must be green unbroken, with the same seed: otherwise its red would say nothing. A scenario that failed
by itself, or took too long, has caught nothing.

    python -m tests.faults.sabotage --json docs/reliability.jsonl    every break; the file is what `report` reads
    python -m tests.faults.sabotage --only lease                     those whose name holds this word
    python -m tests.faults.sabotage --only doubt --scenario 25       by this scenario only, which is not in the slice

The exit code is 0 when every break was caught, 1 when one was not, 2 when the unbroken tree is red already.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.faults.cell import SCENARIO_FAILED
from tests.faults.history import Json, read
from tests.faults.scenarios import load_all
from tests.faults.verdict import append, appendable

ROOT: Final = Path(__file__).resolve().parents[2]
TIMEOUT_S: Final = 600.0  # of one cell
SEED: Final = 1


@dataclass(frozen=True, slots=True)
class Break:
    """One line of the core, and what it is replaced with."""

    name: str
    file: str
    was: str
    became: str


BREAKS: Final = (
    Break(
        "owner check", "pipeline/scripts/settle.lua",
        "return owner == consumer and count == record.count", "return owner",
    ),
    Break(
        "load lease", "pipeline/scripts/_prelude.lua",
        "if call('ZREM', KEY.leases .. url, id) == 1 then set_load(url) end", "local _ = id",
    ),
    Break(
        "completion's only-once", "pipeline/scripts/settle.lua",
        "call('SET', KEY.completion .. id, record.a, 'PX', ttl_ms, 'NX')",
        "call('SET', KEY.completion .. id, record.a, 'PX', ttl_ms)",
    ),
    Break(
        "one job per id", "pipeline/scripts/submit.lua",
        "if call('EXISTS', KEY.live .. id, KEY.completion .. id) > 0 then return 'accepted', id end", "local _ = id",
    ),
    Break(
        "patience with killers", "pipeline/handling.py",
        "if entry.deliveries > self._max_deliveries:", "if entry.deliveries > 1:",
    ),
    Break(
        "the answer itself", "pipeline/flows.py",
        'result=("answer", "model", "usage"),', 'result=("model", "usage"),',
    ),
    Break(
        "doubt of an heir", "pipeline/scripts/begin.lua",
        "if delivery.doubt and not may_repeat then return answer('doubt') end", "local _ = delivery.doubt",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of one break.

    Attributes:
        caught_by: the first verdict that is red for a promise that did not hold; None without any.
        overdue: scenarios that were still running when their time was over, and so told nothing.
    """

    caught_by: Json | None
    overdue: Sequence[int]

    def __str__(self) -> str:
        late = f" (scenarios {', '.join(map(str, self.overdue))} took too long)" if self.overdue else ""
        if self.caught_by is None:
            return f"NOTHING{late}"
        return f"scenario {self.caught_by['number']}: {'; '.join(self.caught_by['broken'])}{late}"


def main() -> int:
    """Try the breaks; return the exit code."""
    parser = argparse.ArgumentParser(description="Break the core on purpose; the fault suite must notice.")
    parser.add_argument("--only", default="", help="breaks whose name holds this")
    known = load_all()
    slice_of_all = [number for number, one in known.items() if one.in_slice]
    parser.add_argument("--scenario", type=int, action="append", choices=sorted(known), help="only this; repeatable")
    parser.add_argument("--json", type=appendable, help="append what came of it to this file")
    options = parser.parse_args()
    wanted = [one for one in BREAKS if options.only in one.name]
    if not wanted:
        parser.error(f"no break is called so: {options.only}")
    numbers = options.scenario or slice_of_all
    with copied() as tree:
        baseline = [(number, run(tree, number)) for number in numbers]
    if red := [str(number) for number, verdict in baseline if verdict is None or not verdict["green"]]:
        print(f"without any break: red or without a verdict is scenario {', '.join(red)}")
        return 2
    missed = 0
    for one in wanted:
        found = attempt(one, numbers)
        missed += found.caught_by is None
        print(f"{one.name}: caught by {found}", flush=True)
        if options.json:
            line = {
                "break": one.name, "file": one.file, "was": one.was, "became": one.became,
                "caught_by": found.caught_by, "overdue": found.overdue,
            }  # fmt: skip
            append(options.json, line)
    return 1 if missed else 0


def attempt(one: Break, numbers: Sequence[int]) -> Attempt:
    """Run the slice on a broken copy, scenario by scenario, until one turns red for what was broken.

    Raises:
        ValueError: the line to be broken is not there once; mend `BREAKS`.
    """
    overdue = []
    with copied() as tree:
        path = tree / one.file
        path.write_text(broken(one, path.read_text()))
        for number in numbers:
            verdict = run(tree, number)
            if verdict is None:
                overdue.append(number)
            elif claims := [claim for claim in verdict["broken"] if not claim.startswith(SCENARIO_FAILED)]:
                return Attempt(verdict | {"broken": claims}, overdue)
    return Attempt(None, overdue)


def broken(one: Break, text: str) -> str:
    """Return *text*, the content of the break's file, broken.

    Raises:
        ValueError: the line to be broken is not there once.
    """
    if text.count(one.was) != 1:
        raise ValueError(f"{one.file} should hold {one.was!r} once, not {text.count(one.was)} times")
    return text.replace(one.was, one.became)


@contextmanager
def copied() -> Iterator[Path]:
    """Have a copy of the tree."""
    with tempfile.TemporaryDirectory(prefix="penstock-broken-") as name:
        tree = Path(name) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", ".penstock", "*_cache", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=ignored)
        yield tree


def run(tree: Path, number: int) -> Json | None:
    """Run one scenario on a tree, in its short form where the slice has one.

    Returns:
        Its verdict, None when it took too long or gave none.
    """
    verdicts = tree.parent / "verdicts.jsonl"
    verdicts.unlink(missing_ok=True)
    form = ["--slice"] if load_all()[number].in_slice else []
    command = ["-m", "tests.faults", *form, "--scenario", str(number), "--seed", str(SEED), "--json", str(verdicts)]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, *command],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdout=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
        )
    return next(read(verdicts), None)


if __name__ == "__main__":
    sys.exit(main())

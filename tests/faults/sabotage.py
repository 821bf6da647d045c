"""Does the suite notice? Breaks one promise at a time, in a copy of the tree, and runs the slice until it turns red.

    python -m tests.faults.sabotage                 every break
    python -m tests.faults.sabotage --only lease    those whose name holds this word

The exit code is 0 when every break was caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from tests.faults.history import Json, read
from tests.faults.report import ROOT

TIMEOUT_S: Final = 600.0
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
        "if owner ~= consumer or count ~= record.count then", "if not owner then",
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
)  # fmt: skip


def main() -> int:
    """Try the breaks; return the exit code."""
    parser = argparse.ArgumentParser(description="Break the core on purpose; the fault suite must notice.")
    parser.add_argument("--only", default="", help="breaks whose name holds this")
    parser.add_argument("--json", type=Path, help="append what came of it to this file")
    options = parser.parse_args()
    missed = 0
    for one in BREAKS:
        if options.only not in one.name:
            continue
        caught = attempt(one)
        missed += caught is None
        word = f"scenario {caught['number']}: {'; '.join(caught['broken'])}" if caught else "NOTHING"
        print(f"{one.name}: caught by {word}", flush=True)
        if options.json:
            line = {"break": one.name, "file": one.file, "was": one.was, "became": one.became, "caught_by": caught}
            with options.json.open("ab") as file:
                file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    return 1 if missed else 0


def attempt(one: Break) -> Json | None:
    """Run the slice on a broken copy; return the first verdict that is red, None when all are green.

    Raises:
        ValueError: the line to be broken is not there once; mend `BREAKS`.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-broken-") as name:
        copy = Path(name) / "tree"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", ".penstock", "*_cache", "__pycache__")
        )
        path = copy / one.file
        text = path.read_text()
        if text.count(one.was) != 1:
            raise ValueError(f"{one.file} should hold {one.was!r} once, not {text.count(one.was)} times")
        path.write_text(text.replace(one.was, one.became))
        verdicts = Path(name) / "verdicts.jsonl"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.faults",
                "--slice",
                "--until-red",
                "--seed",
                str(SEED),
                "--json",
                str(verdicts),
            ],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            stdout=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
        )
        return next((verdict for verdict in read(verdicts) if not verdict["green"]), None)


if __name__ == "__main__":
    sys.exit(main())

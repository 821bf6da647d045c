"""The fault suite: `python -m tests.faults`, or `just faults`.

    python -m tests.faults                          the whole matrix, once
    python -m tests.faults --scenario 3 --seed 7    one cell again
    python -m tests.faults --slice                  what continuous integration runs
    python -m tests.faults --scenario 21            the long run, 15 minutes (see docs/RELIABILITY.md)
    python -m tests.faults --durability             what an accepted job survives; --write puts it into the docs

The exit code is 0 when every cell is green. `--keep` leaves the files of every cell; those of a red one always stay.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

import orjson
import uvloop

from tests.faults import cell, durability
from tests.faults.cell import Verdict
from tests.faults.scenarios import Scenario, load_all


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    scenarios = load_all()
    options = _parser(scenarios).parse_args()
    seed = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    if options.durability:
        table = durability.measure_all(seed)
        print(table)
        if options.write:
            durability.write(table)
        return 0
    chosen = options.scenario or [number for number, one in scenarios.items() if not one.is_long]
    wanted = [scenarios[number] for number in chosen]
    if options.slice:
        wanted = [one for one in wanted if one.in_slice]
    verdicts = []
    for one in wanted:
        jobs = options.jobs or (one.in_slice if options.slice else one.jobs)
        verdict = run_cell(one, seed, jobs, keep=options.keep)
        verdicts.append(verdict)
        if options.json:
            with options.json.open("ab") as file:
                file.write(orjson.dumps(verdict.as_json(), option=orjson.OPT_APPEND_NEWLINE))
        if options.until_red and not verdict.is_green:
            break
    print(summary(verdicts))
    return 0 if all(verdict.is_green for verdict in verdicts) else 1


def run_cell(scenario: Scenario, seed: int, jobs: int, *, keep: bool) -> Verdict:
    """Run one cell in a folder of its own, and say how it went."""
    folder = Path(tempfile.mkdtemp(prefix="penstock-faults-", dir="/tmp"))  # short: it holds a unix socket
    print(f"{scenario.number:>2} {scenario.title}: seed {seed}, {jobs} requests", flush=True)
    verdict = uvloop.run(cell.run(scenario.number, scenario.title, scenario.run, seed, jobs, folder))
    print("   " + line(verdict), flush=True)
    for claim in verdict.broken:
        print(f"   BROKEN {claim}", flush=True)
    if verdict.is_green and not keep:
        shutil.rmtree(folder)
    else:
        print(f"   its files: {folder}", flush=True)
    return verdict


def line(verdict: Verdict) -> str:
    """Return one verdict in one line."""
    recovered = (
        "-" if verdict.recovered_max_s is None else f"{verdict.recovered_p50_s:.1f}/{verdict.recovered_max_s:.1f} s"
    )
    return (
        f"{'green' if verdict.is_green else 'RED'} in {verdict.seconds:.0f} s: accepted {verdict.accepted}, "
        f"lost {verdict.lost}, duplicated {verdict.duplicated}, unseen {verdict.unseen}, wrong {verdict.wrong}, "
        f"stale {verdict.stale}; {verdict.faults} faults, {verdict.hit_share:.0%} met work; recovered {recovered}; "
        f"{dict(verdict.by_status)}, refused {verdict.refused}, unknown {verdict.unknown}, "
        f"stale writes refused {verdict.refusals}, calls repeated {verdict.calls_repeated}"
        + "".join(f"; {name} {value}" for name, value in verdict.figures.items())
    )


def summary(verdicts: list[Verdict]) -> str:
    """Return what all cells together showed."""
    total = {
        name: sum(getattr(v, name) for v in verdicts) for name in ("accepted", "kills", "faults", "lost", "duplicated")
    }
    red = [str(verdict.number) for verdict in verdicts if not verdict.is_green]
    word = f"RED: scenario {', '.join(red)}" if red else "all green"
    return f"{len(verdicts)} cells, " + ", ".join(f"{name} {count}" for name, count in total.items()) + f": {word}"


def _parser(scenarios: dict[int, Scenario]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="just faults", description="Harm a running system and check what it promises."
    )
    parser.add_argument(
        "--scenario", type=int, action="append", choices=list(scenarios), help="only this one; repeatable"
    )
    parser.add_argument("--seed", type=int, help="of every choice; printed, so that a run can be repeated")
    parser.add_argument("--jobs", type=int, help="requests of each cell")
    parser.add_argument("--slice", action="store_true", help="the cells that continuous integration runs")
    parser.add_argument("--until-red", action="store_true", help="stop at the first cell that is not green")
    parser.add_argument("--json", type=Path, help="append the verdicts to this file, one line each")
    parser.add_argument("--keep", action="store_true", help="keep the files of green cells, too")
    parser.add_argument("--durability", action="store_true", help="measure what an accepted job survives, as a table")
    parser.add_argument("--write", action="store_true", help="put that table into docs/OPERATIONS.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Turns verdicts into the tables of docs/RELIABILITY.md: `python -m tests.faults.report`.

Verdicts are lines of `docs/reliability.jsonl`, as `python -m tests.faults --json docs/reliability.jsonl` and
`python -m tests.faults.sabotage --json docs/reliability.jsonl` append them. Of each scenario, and of each break, the
last line counts. What stands between two HTML comments of the page is written here and nowhere else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tests.faults.history import Json, read

ROOT: Final = Path(__file__).resolve().parents[2]
VERDICTS: Final = ROOT / "docs" / "reliability.jsonl"
PAGE: Final = ROOT / "docs" / "RELIABILITY.md"
LONG: Final = 21
MATRIX: Final = range(1, LONG)

COLUMNS: Final = (
    "#", "Scenario", "Seed", "Accepted", "Kills", "Faults", "met work", "Lost", "Duplicated", "Unseen", "Wrong",
    "Stale", "Recovered p50 / max", "",
)  # fmt: skip


def main() -> int:
    """Write the tables into the page; return 1 when a cell of the matrix is red or missing."""
    lines = list(read(VERDICTS))
    cells = {line["number"]: line for line in lines if "number" in line}
    breaks = {line["break"]: line for line in lines if "break" in line}
    page = PAGE.read_text()
    matrix = [cells[number] for number in sorted(cells) if number != LONG]
    page = put(page, "matrix", f"{table(COLUMNS, [row(cell) for cell in matrix])}\n\n{caption(matrix)}")
    if LONG in cells:
        page = put(page, "long run", f"{long_run(cells[LONG])}\n\n{caption([cells[LONG]])}")
    page = put(page, "breaks", table(("What was broken", "Caught by"), [break_row(line) for line in breaks.values()]))
    PAGE.write_text(page)
    red = [str(number) for number, line in cells.items() if not line["green"]]
    missing = [str(number) for number in MATRIX if number not in cells]
    print(
        f"{len(cells)} cells, {len(breaks)} breaks; red: {', '.join(red) or 'none'}; "
        f"missing: {', '.join(missing) or 'none'}"
    )
    return 1 if red or missing else 0


def row(cell: Json) -> list[str]:
    """Return one cell of the matrix as a row."""
    recovered = "-"
    if cell["recovered_max_s"] is not None:
        recovered = f"{cell['recovered_p50_s']:.1f} / {cell['recovered_max_s']:.1f} s"
    share = f"{cell['hits'] / cell['aimed']:.0%}" if cell["aimed"] else "-"
    values: list[Any] = [
        cell["number"], cell["title"], cell["seed"], cell["accepted"], cell["kills"], cell["faults"], share,
        cell["lost"], cell["duplicated"], cell["unseen"], cell["wrong"], cell["stale"], recovered,
        "green" if cell["green"] else "**red**",
    ]  # fmt: skip
    return [str(value) for value in values]


def caption(cells: Sequence[Json]) -> str:
    """Return what was measured, when, and on what; and what all cells together showed."""
    totals = {name: sum(cell[name] for cell in cells) for name in ("accepted", "kills", "faults", "lost", "duplicated")}
    about = {
        name: sorted({str(cell[name]) for cell in cells if cell.get(name)}) for name in ("date", "server", "commit")
    }
    told = "; ".join(f"{name} {', '.join(values)}" for name, values in about.items() if values)
    return f"Together: {_words(totals)}. Measured: {told}."


def long_run(cell: Json) -> str:
    """Return the long run's figures as a list."""
    figures = cell["figures"]
    memory = [f"{name} {a} / {b} MiB" for (name, a), b in zip(*_halves(figures["memory_mib"]), strict=True)]
    return "\n".join(
        [
            f"- seed {cell['seed']}, {cell['seconds'] / 60:.0f} minutes: {cell['accepted']:,} jobs accepted, "
            f"{cell['refused']} refused, {cell['unknown']} unknown to their clients",
            f"- outcomes: {_words(cell['by_status'])}",
            f"- faults: {_words(figures['faults'])}; {cell['hits'] / cell['aimed']:.0%} met work in hand",
            f"- **lost {cell['lost']}, duplicated {cell['duplicated']}**, unseen {cell['unseen']}, "
            f"wrong {cell['wrong']}, stale {cell['stale']}; loads not back at 0: {cell['load_left']}; "
            f"keys without TTL: {cell['endless_keys']}",
            f"- recovered after {cell['recovered_p50_s']:.1f} s (p50), {cell['recovered_max_s']:.1f} s (max)",
            f"- calls answered twice, since their worker was killed before it settled: {cell['calls_repeated']}",
            f"- memory at the end of the first and of the second half: {', '.join(memory)}",
        ]
    )


def _halves(memory: Sequence[Json]) -> tuple[Iterable[tuple[str, float]], Iterable[float]]:
    first, second = memory
    return first.items(), [second[name] for name in first]


def _words(counts: Json) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def break_row(line: Json) -> list[str]:
    """Return one break as a row."""
    caught = line["caught_by"]
    overdue = line.get("overdue")
    late = f" (scenarios {', '.join(map(str, overdue))} took too long)" if overdue else ""
    told = (
        f"**not caught**{late}"
        if caught is None
        else f"scenario {caught['number']}: {'; '.join(caught['broken'])[:160]}"
    )
    return [f"{line['break']}: `{line['was']}` became `{line['became']}` in `{line['file']}`".replace("|", "\\|"), told]


def table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put(page: str, name: str, text: str) -> str:
    """Return *page* with *text* between the comments called *name*.

    Raises:
        ValueError: the page has no such comments.
    """
    pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{text}\n{found[2]}", page)
    if count != 1:
        raise ValueError(f"the page should hold the comments of {name!r} once, not {count} times")
    return changed


if __name__ == "__main__":
    sys.exit(main())

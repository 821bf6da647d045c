"""Turns verdicts into the tables of docs/RELIABILITY.md: `python -m tests.faults.report`.

Verdicts are lines of `docs/reliability.jsonl`, as `python -m tests.faults --json docs/reliability.jsonl` and
`python -m tests.faults.sabotage --json docs/reliability.jsonl` append them. Of each scenario, and of each break, the
last line counts. What stands between two HTML comments of the page is written here and nowhere else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

from tests.faults.history import Json, read
from tests.faults.sabotage import BREAKS, ROOT

VERDICTS: Final = ROOT / "docs" / "reliability.jsonl"
PAGE: Final = ROOT / "docs" / "RELIABILITY.md"
LONG: Final = 21
MATRIX: Final = (*range(1, LONG), *range(22, 26))

COLUMNS: Final = (
    "#", "Scenario", "`just faults` with", "Accepted", "Kills", "Faults", "met work", "Lost", "Destroyed", "Duplicated",
    "Unseen", "Wrong", "Stale", "Out of order", "Loads left", "Keys without TTL", "Recovered p50 / max",
    "Memory grown by", "",
)  # fmt: skip


TOTALS: Final = ("accepted", "kills", "faults", "lost", "destroyed", "duplicated")
"""What is told of all cells together."""


def main() -> int:
    """Write the tables into the page.

    Returns:
        0; 1 when a cell is red or missing, or a break was not tried or not caught; 2 without any verdicts: the page is
        left as it is.
    """
    lines = list(read(VERDICTS))
    if not lines:
        print(f"{VERDICTS} holds no verdicts: run `just faults --json {VERDICTS.relative_to(ROOT)}` first")
        return 2
    cells = {line["number"]: line for line in lines if "number" in line}
    breaks = {line["break"]: line for line in lines if "break" in line}
    page = PAGE.read_text()
    if matrix := [cells[number] for number in sorted(cells) if number != LONG]:
        page = put(page, "matrix", f"{table(COLUMNS, [row(cell) for cell in matrix])}\n\n{caption(matrix)}")
    if with_batches := [cell for cell in matrix if "batches" in cell["figures"]]:
        page = put(page, "batches", "\n".join(f"- {batches(cell)}" for cell in with_batches))
    if with_chats := [cell for cell in matrix if "chats" in cell["figures"]]:
        page = put(page, "chats", "\n".join(f"- {chats(cell)}" for cell in with_chats))
    if with_deliveries := [cell for cell in matrix if "deliveries" in cell["figures"]]:
        page = put(page, "deliveries", "\n".join(f"- {deliveries(cell)}" for cell in with_deliveries))
    if LONG in cells:
        page = put(page, "long run", f"{long_run(cells[LONG])}\n\n{caption([cells[LONG]])}")
    if breaks:
        rows = [break_row(line) for line in breaks.values()]
        page = put(page, "breaks", table(("What was broken", "Caught by"), rows))
    PAGE.write_text(page)
    shortcomings = {
        "red": [str(number) for number, line in sorted(cells.items()) if not line["green"]],
        "missing": [str(number) for number in (*MATRIX, LONG) if number not in cells],
        "not caught": [name for name, line in breaks.items() if line["caught_by"] is None],
        "not tried": [one.name for one in BREAKS if one.name not in breaks],
    }
    told = "; ".join(f"{word}: {', '.join(names) or 'none'}" for word, names in shortcomings.items())
    print(f"{len(cells)} cells, {len(breaks)} breaks; {told}")
    return 1 if any(shortcomings.values()) else 0


def row(cell: Json) -> list[str]:
    """Return one cell of the matrix as a row."""
    recovered = "-"
    if cell["recovered_max_s"] is not None:
        recovered = f"{cell['recovered_p50_s']:.1f} / {cell['recovered_max_s']:.1f} s"
    share = f"{cell['hits'] / cell['aimed']:.0%}" if cell["aimed"] else "-"
    command = f"`--scenario {cell['number']} --seed {cell['seed']} --jobs {cell['asked']}`"
    values: list[Any] = [
        cell["number"], cell["title"], command, cell["accepted"], cell["kills"], cell["faults"], share,
        cell["lost"], cell["destroyed"], cell["duplicated"], cell["unseen"], cell["wrong"], cell["stale"],
        cell["out_of_order"], cell["load_left"], cell["endless_keys"], recovered, grown(cell["grown_mib"]),
        "green" if cell["green"] else "**red**",
    ]  # fmt: skip
    return [str(value) for value in values]


def batches(cell: Json) -> str:
    """Return what came of the batches of one cell."""
    figures = dict(cell["figures"])
    counts = figures.pop("batches")
    late = "".join(f"; {name} {value}" for name, value in figures.items() if name.startswith("batch "))
    return f"Scenario {cell['number']}, seed {cell['seed']}, {cell['seconds']:.0f} s: {_words(counts)}{late}"


def chats(cell: Json) -> str:
    """Return what came of the chats of one cell."""
    told = _words(cell["figures"]["chats"])
    return f"Scenario {cell['number']}, seed {cell['seed']}, {cell['seconds']:.0f} s: {told}"


def deliveries(cell: Json) -> str:
    """Return what came of the messages of one cell, and what their receivers said."""
    told = _words(cell["figures"]["deliveries"])
    said = ", ".join(f"{count:,} of {code}" for code, count in cell["figures"]["answers"].items())
    return f"Scenario {cell['number']}, seed {cell['seed']}, {cell['seconds']:.0f} s: {told}; answers: {said}"


def grown(mib: dict[str, float]) -> str:
    """Return by how much memory has grown: of Redis, and of the process that has grown most."""
    processes = {name: size for name, size in mib.items() if name != "redis"}
    most = [max(processes, key=lambda name: processes[name])] if processes else []
    told = [f"{name} {mib[name]:+.1f}" for name in (*(["redis"] if "redis" in mib else []), *most)]
    return f"{', '.join(told)} MiB" if told else "-"


def caption(cells: Sequence[Json]) -> str:
    """Return what was measured, when, and on what; and what all cells together showed."""
    totals = {name: sum(cell[name] for cell in cells) for name in TOTALS}
    about = {
        name: sorted({str(cell[name]) for cell in cells if cell.get(name)}) for name in ("date", "server", "commit")
    }
    told = "; ".join(f"{name} {', '.join(values)}" for name, values in about.items() if values)
    return f"Together: {_words(totals)}. Measured: {told}."


def long_run(cell: Json) -> str:
    """Return the long run's figures as a list; those that a run which failed did not come to are left out."""
    figures = cell["figures"]
    lines = [
        f"seed {cell['seed']}, {cell['seconds'] / 60:.0f} minutes: {cell['accepted']:,} jobs accepted, "
        f"{cell['refused']} refused, {cell['unknown']} unknown to their clients",
        f"outcomes: {_words(cell['by_status'])}",
        f"**lost {cell['lost']}, duplicated {cell['duplicated']}**, destroyed {cell['destroyed']}, "
        f"unseen {cell['unseen']}, wrong {cell['wrong']}, stale {cell['stale']}, "
        f"out of order {cell['out_of_order']}; loads not back at 0: {cell['load_left']}; "
        f"keys without TTL: {cell['endless_keys']}",
        f"calls made again: {cell['calls_repeated']}, of {cell['calls_excused']} in the hands of workers that were "
        "killed or lost them",
    ]
    if cell["aimed"] and "faults" in figures:
        lines.append(f"faults: {_words(figures['faults'])}; {cell['hits'] / cell['aimed']:.0%} met work in hand")
    if cell["recovered_max_s"] is not None:
        lines.append(f"recovered after {cell['recovered_p50_s']:.1f} s (p50), {cell['recovered_max_s']:.1f} s (max)")
    if "memory_mib" in figures:
        first, second = figures["memory_mib"]
        memory = ", ".join(f"{name} {size} / {second[name]} MiB" for name, size in first.items())
        lines.append(f"memory at the end of the first and of the second half: {memory}")
    if not cell["green"]:
        lines.append(f"**red**: {'; '.join(cell['broken'])}")
    return "\n".join(f"- {line}" for line in lines)


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

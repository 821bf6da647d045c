"""The scenarios, by number: what is done to the system, and what must hold all the same.

Each is an `async def` that gets a `Cell`, in the file of its subject. Its docstring's first line is its title in the
matrix, the rest its pass condition; what every cell checks (nothing lost, unseen, duplicated, wrong or stale, nothing
left in Redis, at least four of five faults with work in hand) is not repeated there.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from tests.faults.cell import Cell

Run = Callable[[Cell], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the matrix.

    Attributes:
        jobs: requests that it sends unless told otherwise.
        is_long: whether it runs only when asked for by name.
        in_slice: whether continuous integration runs it, and with how many requests.
    """

    number: int
    run: Run
    jobs: int
    in_slice: int = 0
    is_long: bool = False

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.run) or "").partition("\n")[0].rstrip(".")


SCENARIOS: Final[dict[int, Scenario]] = {}


def scenario(number: int, *, jobs: int, in_slice: int = 0, is_long: bool = False) -> Callable[[Run], Run]:
    """Enter a function into the matrix."""

    def enter(run: Run) -> Run:
        assert number not in SCENARIOS, f"scenario {number} is there twice"
        SCENARIOS[number] = Scenario(number, run, jobs, in_slice, is_long)
        return run

    return enter


def load_all() -> dict[int, Scenario]:
    """Import every file of scenarios; return all of them by number, in order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(SCENARIOS.items()))

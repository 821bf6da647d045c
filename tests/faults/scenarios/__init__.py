"""The scenarios, by number: what is done to the system, and what must hold all the same.

Each is an `async def` that gets a `Cell`, in the file of its subject. Its docstring's first line is its title in the
matrix, the rest its pass condition; what every cell checks (nothing lost, unseen, duplicated, wrong or stale, nothing
left in Redis, at least four of five faults with work in hand) is not repeated there.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from tests.conftest import wait_until
from tests.faults.cell import Cell

Run = Callable[[Cell], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the matrix.

    Attributes:
        jobs: requests that it sends unless told otherwise.
        least: with fewer it cannot show what it is to show, and refuses.
        is_long: whether it runs only when asked for by name.
        in_slice: whether continuous integration runs it, and with how many requests.
    """

    number: int
    run: Run
    jobs: int
    least: int = 1
    in_slice: int = 0
    is_long: bool = False

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.run) or "").partition("\n")[0].rstrip(".")


SCENARIOS: Final[dict[int, Scenario]] = {}


def scenario(
    number: int, *, jobs: int, least: int = 1, in_slice: int = 0, is_long: bool = False
) -> Callable[[Run], Run]:
    """Enter a function into the matrix; what is entered raises ValueError when it is to send too few requests."""

    def enter(run: Run) -> Run:
        assert number not in SCENARIOS, f"scenario {number} is there twice"

        @functools.wraps(run)
        async def checked(cell: Cell) -> None:
            if cell.jobs < least:
                raise ValueError(f"--jobs must be at least {least}, not {cell.jobs}: fewer would show nothing")
            await run(cell)

        SCENARIOS[number] = Scenario(number, checked, jobs, least, in_slice, is_long)
        return checked

    return enter


async def reach(
    claim: str, condition: Callable[[], Awaitable[object] | object], *, within_s: float, every_s: float = 0.05
) -> None:
    """Wait until something is so that a scenario needs before it can go on.

    Raises:
        TimeoutError: it did not come to that; the message says to what.
    """
    try:
        await wait_until(condition, timeout_s=within_s, every_s=every_s)
    except TimeoutError:
        raise TimeoutError(f"not within {within_s:g} s: {claim}") from None


def load_all() -> dict[int, Scenario]:
    """Import every file of scenarios; return all of them by number, in order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(SCENARIOS.items()))

"""The highest rate that keeps the promise: bisection between two rates, then three confirmations of what was found.

`decide_next` is the whole search as a plain function of the trials so far; `search` obeys it. A trial that the load
tester itself could not keep up with counts as not kept, and is told apart in the end: the target may well be able to do
more.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson

from loadtest.crew import GeneratorDied
from loadtest.limits import NoRoom
from loadtest.live import watch
from loadtest.manifest import manifest
from loadtest.report import EXIT_BROKEN, EXIT_INTERRUPTED, EXIT_INVALID, EXIT_OK, EXIT_USAGE, SCHEMA, Report
from loadtest.run import CannotWrite, Outputs, Unreachable, measured, save, say, signals_held

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.options import LoadOptions

CONFIRMATIONS: Final = 3
CLOSE: Final = 1.05  # two rates that differ by less are one answer
TRIAL_S: Final = 10.0

Ended = Literal["kept", "broken", "invalid"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run at one rate.

    Args:
        p99_ms: None: no request succeeded.
        why: the clauses that were broken, or why the run was invalid; empty when the promise was kept.
    """

    rate: float
    ended: Ended
    p99_ms: float | None = None
    why: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """How a search ended.

    Args:
        rate: the highest that kept the promise each time; None: not even the lowest did.
        knee: the lowest tried rate above it that did not; None: nothing above was tried, as the highest kept it.
    """

    rate: float | None
    knee: Trial | None


def decide_next(low: float, high: float, trials: Sequence[Trial]) -> float | Found:
    """Return the rate to try next, or what was found.

    A rate holds as long as every trial at it kept the promise; the search is between the highest that holds and the
    lowest above that does not.
    """
    failed = {trial.rate for trial in trials if trial.ended != "kept"}
    floor = min(failed, default=None)
    kept = Counter(trial.rate for trial in trials if trial.rate not in failed)
    holding = [rate for rate in kept if floor is None or rate < floor]
    if not holding:
        return low if low not in failed else Found(None, _knee(low, trials))
    best = max(holding)
    if floor is None and best < high:
        return high
    if floor is not None and floor / best > CLOSE:
        return (best + floor) / 2
    if kept[best] < 1 + CONFIRMATIONS:
        return best
    return Found(best, None if floor is None else _knee(floor, trials))


def read_bounds(text: str) -> tuple[float, float]:
    """Return the two rates in `LOW:HIGH`.

    Raises:
        ValueError: they are no two rising rates.
    """
    low, _, high = text.partition(":")
    try:
        bounds = float(low), float(high)
    except ValueError:
        raise ValueError(
            f"saturate must read LOW:HIGH (requests per second), for example 10:400, not {text!r}"
        ) from None
    if not 0 < bounds[0] < bounds[1] < float("inf"):
        raise ValueError(f"saturate needs 0 < LOW < HIGH, not {text!r}")
    return bounds


def check_alone(slo: str | None, others: Sequence[str]) -> None:
    """Check what stands beside a search on the command line.

    Raises:
        ValueError: the promise is missing, or an option has no meaning in a search.
    """
    if not slo:
        raise ValueError("saturate needs a promise: give --slo with it")
    if others:
        raise ValueError(
            f"saturate chooses the rates, and has no page: leave out {', '.join(f'--{o}' for o in others)}"
        )


def search(options: LoadOptions, low: float, high: float, outputs: Outputs) -> int:
    """Run trials until the rate is found, write what was found, and return the exit code."""
    with signals_held():
        return _search(options, low, high, outputs)


def _search(options: LoadOptions, low: float, high: float, outputs: Outputs) -> int:
    trials: list[Trial] = []
    about = manifest(options)
    try:
        outputs.check()
        while not isinstance(step := decide_next(low, high, trials), Found):
            # Another seed each time: a confirmation of the very same arrivals would confirm less.
            trial = replace(
                options, rate=step, duration_s=options.duration_s or TRIAL_S, seed=options.seed + len(trials)
            )
            with watch(quiet=outputs.quiet) as watcher:
                report = measured(trial, watcher)
            if report.is_interrupted:
                _write(trials, None, about, outputs)
                return EXIT_INTERRUPTED
            trials.append(trial_of(step, report))
            if not outputs.as_json:
                say(line_of(trials[-1]) + "\n")
        _write(trials, step, about, outputs)
    except (CannotWrite, NoRoom, Unreachable, GeneratorDied) as error:
        sys.stderr.write(f"loadtest: {error}\n")
        if trials and not isinstance(error, CannotWrite):  # an hour of them may have gone before
            _write(trials, None, about, outputs)
        return EXIT_USAGE
    if step.rate is not None:
        return EXIT_OK
    return EXIT_INVALID if step.knee is not None and step.knee.ended == "invalid" else EXIT_BROKEN


def trial_of(rate: float, report: Report) -> Trial:
    """Return what one run says about its rate."""
    p99_ms = None if report.latency_ms is None else report.latency_ms.p99
    if not report.verdict.is_valid:
        return Trial(rate, "invalid", p99_ms, report.verdict.reasons)
    broken = tuple(judged.clause for judged in report.promise if not judged.is_kept)
    return Trial(rate, "broken" if broken else "kept", p99_ms, broken)


def line_of(trial: Trial) -> str:
    """Return a trial as one line."""
    p99 = "no success" if trial.p99_ms is None else f"P99 {trial.p99_ms:.2f} ms"
    return f"{trial.rate:10.1f} req/s  {p99:>16}  {trial.ended}{': ' if trial.why else ''}{'; '.join(trial.why)}"


def conclusion(found: Found) -> str:
    """Return what was found, for people."""
    knee = found.knee
    if found.rate is None:
        assert knee is not None
        return f"No rate was found: the lowest, {knee.rate:.1f} req/s, ended {knee.ended}: {'; '.join(knee.why)}"
    holds = f"Highest rate that keeps the promise: {found.rate:.1f} req/s, confirmed {CONFIRMATIONS} times"
    if knee is None:
        return f"{holds}\nNo knee was met: this is the highest rate that was asked for"
    if knee.ended == "invalid":
        return f"{holds}\nAbove it, at {knee.rate:.1f} req/s, the load tester itself gave out: {'; '.join(knee.why)}"
    return f"{holds}\nThe knee: at {knee.rate:.1f} req/s {' and '.join(knee.why)} no longer holds"


def _knee(rate: float, trials: Sequence[Trial]) -> Trial:
    return next(trial for trial in trials if trial.rate == rate and trial.ended != "kept")


def _write(trials: Sequence[Trial], found: Found | None, about: dict[str, Any], outputs: Outputs) -> None:
    body = {
        "schema": SCHEMA,
        "rate": found.rate if found else None,
        "knee": asdict(found.knee) if found and found.knee else None,
        "is_interrupted": found is None,
        "trials": [asdict(trial) for trial in trials],
        "manifest": about,
    }
    as_json = orjson.dumps(body) + b"\n"
    words = conclusion(found) if found else "Ended early: nothing was found yet"
    say(as_json.decode() if outputs.as_json else f"\n{words}\n")
    if outputs.json_file is not None:
        save(outputs.json_file, as_json)

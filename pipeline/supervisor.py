"""A small supervisor: keeps processes running, stops them in order, and leaves none behind.

Rules:
- What dies is started again, after a back-off that grows with every early death and is forgotten after a good run.
- Exit code 2 means wrong settings: starting again would not help, so it ends the supervisor with the child's words.
- Children live in sessions of their own: Ctrl-C at a terminal reaches the supervisor only, which stops them in order.
- Children die with the supervisor, SIGKILL included (`leash.py`).
- Standard output of children goes where `out` points; their standard error is read here and logged line by line, so
  that the last words of a child that died are known.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog

from pipeline import leash
from pipeline.errors import ConfigError

WRONG_SETTINGS: Final = 2
BACKOFF_BASE_S: Final = 0.1
BACKOFF_CAP_S: Final = 5.0
GOOD_RUN_S: Final = 10.0
LAST_WORDS: Final = 20  # lines of standard error kept per child

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Program:
    """One process to keep running.

    Attributes:
        environ: added to the supervisor's own environment.
        pass_fds: descriptors the process inherits.
        stderr: file for its standard error; None: read here, logged, and remembered as its last words.
        quiet: what it says on standard output is of no interest.
        orphan_signal: sent by the kernel when the supervisor itself is killed.
        started: called after every start with the number of the start, 1 for the first.
    """

    name: str
    command: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)
    pass_fds: tuple[int, ...] = ()
    stderr: Path | None = None
    quiet: bool = False
    orphan_signal: signal.Signals = signal.SIGKILL
    started: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the process again after a wait."""

    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The process refuses its settings; starting it again cannot help."""


def decide_after_exit(code: int, uptime_s: float, early_deaths: int) -> Restart | GiveUp:
    """Say what to do about a process that ended without being asked to.

    Args:
        code: exit code; negative for a signal.
        uptime_s: how long it ran.
        early_deaths: runs before this one that ended early, in a row.
    """
    if code == WRONG_SETTINGS:
        return GiveUp()
    if uptime_s >= GOOD_RUN_S:
        return Restart(BACKOFF_BASE_S)
    return Restart(min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(early_deaths, 30)))


def describe_exit(code: int) -> str:
    """Return an exit code in words: `killed by SIGKILL`, `exit code 1`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


class Child:
    """One program and whichever process runs it now."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.starts = 0
        self.last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._keeper: asyncio.Task[None] | None = None  # written by Supervisor.start only

    @property
    def pid(self) -> int | None:
        """The process id, None while none runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def signal(self, number: signal.Signals) -> None:
        """Send *number* to the running process, if there is one."""
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, timeout_s: float) -> None:
        """Ask the process to end (SIGTERM); kill it after *timeout_s*. No new one is started."""
        self._stopping = True
        if self._keeper is None:
            return
        if self._process is None or self._process.returncode is not None:
            self._keeper.cancel()  # waits to start it again
        self.signal(signal.SIGTERM)
        _, late = await asyncio.wait({self._keeper}, timeout=timeout_s)
        if late:
            _log.warning("killed: it did not end in time", child=self.program.name, timeout_s=timeout_s)
            self.kill()
            await asyncio.wait({self._keeper})

    def kill(self) -> None:
        """Kill the process (SIGKILL). No new one is started."""
        self._stopping = True
        self.signal(signal.SIGKILL)

    async def keep(self, out: int, pipe: int) -> None:
        """Run the program again and again until stopped.

        Raises:
            ConfigError: the process ended with exit code 2.
        """
        early_deaths = 0
        while True:
            began_s = time.monotonic()
            code = await self._run_once(out, pipe)
            if self._stopping:
                return
            uptime_s = time.monotonic() - began_s
            decision = decide_after_exit(code, uptime_s, early_deaths)
            if isinstance(decision, GiveUp):
                words = "\n".join(self.last_words).removeprefix("penstock: ")
                raise ConfigError(words or f"{self.program.name} refuses its settings; its log says why")
            early_deaths = 0 if uptime_s >= GOOD_RUN_S else early_deaths + 1
            _log.warning(
                "ended; starting it again",
                child=self.program.name,
                why=describe_exit(code),
                uptime_s=round(uptime_s, 1),
                after_s=round(decision.after_s, 1),
            )
            await asyncio.sleep(decision.after_s)

    async def _run_once(self, out: int, pipe: int) -> int:
        program = self.program
        self.last_words.clear()
        with program.stderr.open("ab") if program.stderr else contextlib.nullcontext() as stderr:
            process = await asyncio.create_subprocess_exec(
                *leash.prefix(program.orphan_signal, pipe),
                *program.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL if program.quiet else out,
                stderr=stderr or asyncio.subprocess.PIPE,
                env={**os.environ, **program.environ},
                pass_fds=(pipe, *program.pass_fds),
                start_new_session=True,
            )
        self._process = process
        self.starts += 1
        if self._stopping:  # asked to stop while it was being started
            self.signal(signal.SIGTERM)
        if program.started:
            program.started(self.starts)
        try:
            if process.stderr is not None:
                await self._listen(process.stderr)
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        while line := await _read_line(stderr):
            text = line.decode(errors="replace").rstrip()
            self.last_words.append(text)
            if text:
                _log.info(text, process=self.program.name)

    def __repr__(self) -> str:
        return f"<Child {self.program.name} pid={self.pid} starts={self.starts}>"


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await reader.read(error.consumed)


class Supervisor:
    """Keeps children running; use as `async with`. Leaving kills what was not stopped before."""

    def __init__(self, out: int) -> None:
        self.children: dict[str, Child] = {}
        self._out = out
        self._read_end, self._write_end = -1, -1
        self._refusal: asyncio.Future[None]

    async def __aenter__(self) -> Self:
        self._refusal = asyncio.get_running_loop().create_future()
        self._read_end, self._write_end = os.pipe()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        keepers = [child._keeper for child in self.children.values() if child._keeper]  # noqa: SLF001 - one story
        if keepers:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.wait(keepers)
        os.close(self._read_end)
        os.close(self._write_end)
        if self._refusal.done():
            self._refusal.exception()  # seen: whoever waited in `refused` has raised it
        else:
            self._refusal.cancel()

    def start(self, program: Program) -> Child:
        """Start *program* and keep it running."""
        child = self.children[program.name] = Child(program)
        keeper = asyncio.create_task(child.keep(self._out, self._read_end), name=f"keep {program.name}")
        keeper.add_done_callback(self._keeper_done)
        child._keeper = keeper  # noqa: SLF001 - one story
        return child

    async def refused(self) -> None:
        """Wait until a child refuses its settings.

        Raises:
            ConfigError: with that child's own words.
        """
        await asyncio.shield(self._refusal)

    async def stop(self, names: Sequence[str], timeout_s: float) -> None:
        """Stop these children, all at the same time; each is killed after *timeout_s*."""
        await asyncio.gather(*(self.children[name].stop(timeout_s) for name in names if name in self.children))

    def kill(self) -> None:
        """Kill every child at once."""
        for child in self.children.values():
            child.kill()

    def _keeper_done(self, keeper: asyncio.Task[None]) -> None:
        if keeper.cancelled() or self._refusal.done():
            return
        if error := keeper.exception():
            self._refusal.set_exception(error)

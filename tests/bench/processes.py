"""The processes of one benchmark: started together, each tied to this one's life, ended together."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pipeline import leash
from tests.bench.figures import Window

Json = dict[str, Any]

ROOT: Final = Path(__file__).resolve().parents[2]
READY_S: Final = 240.0
MEASURE_S: Final = 600.0
END_S: Final = 20.0  # then it is killed, which ends it as well


class Broken(Exception):
    """A process of a benchmark did not do what it was started for."""


class Child:
    """One process. Where it *talks*, its standard output is read line by line; the rest of what it says is logged."""

    def __init__(self, name: str, module: list[str], environ: Mapping[str, str], log: Path, *, talks: bool) -> None:
        self.name = name
        self._is_told = False
        self._log = log
        read_end, self._write_end = os.pipe()  # held open by this process alone, see pipeline/leash.py
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [*leash.prefix(signal.SIGKILL, read_end), sys.executable, "-P", "-m", *module],
                cwd="/",
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": "/nonexistent",
                    "PYTHONPATH": str(ROOT),
                    "PENSTOCK_LOG__LEVEL": "warning",
                    **environ,
                },
                pass_fds=[read_end],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if talks else errors,
                stderr=errors,
            )
        os.close(read_end)
        self._said = b""

    @property
    def pid(self) -> int:
        """Its process id, from the start on."""
        return self.process.pid

    def line(self, within_s: float = READY_S) -> str:
        """Return the next line it says.

        Raises:
            Broken: it says none, or ends.
        """
        assert self.process.stdout is not None
        out = self.process.stdout.fileno()
        give_up = time.monotonic() + within_s
        while b"\n" not in self._said:
            if not select.select([out], [], [], max(0.0, give_up - time.monotonic()))[0]:
                raise Broken(f"{self.name} says nothing for {within_s:g} s\n{self.last_words()}")
            part = os.read(out, 1 << 20)
            if not part:
                raise Broken(f"{self.name} ended\n{self.last_words()}")
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def ask(self, within_s: float = READY_S, **command: Any) -> Json:
        """Send one command as a line of JSON and return the answer.

        Raises:
            Broken: it does not come.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        answer: Json = json.loads(self.line(within_s))
        return answer

    def window(self, **command: Any) -> Window:
        """Have it measure one window.

        Raises:
            Broken: nothing succeeded in it.
        """
        window = Window.from_json(self.ask(MEASURE_S, **command))
        if not window.ended:
            raise Broken(f"{self.name}: no call succeeded: {window.errors}")
        return window

    def last_words(self) -> str:
        """Return the end of what it wrote on standard error."""
        return self._log.read_text(errors="replace")[-4000:]

    def tell(self) -> None:
        """Tell it to end; once only, since a second signal means at once."""
        if not self._is_told:
            self._is_told = True
            self.process.terminate()

    def end(self) -> None:
        """Let it drain, and kill it where that takes too long."""
        self.tell()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        os.close(self._write_end)


class Processes:
    """A set of processes; use as `with`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="penstock-bench-", dir="/tmp")  # short: it holds sockets
        self.folder = Path(self._folder.name)
        self.children: dict[str, Child] = {}

    def start(self, name: str, *module: str, talks: bool = False, environ: Mapping[str, str] | None = None) -> Child:
        """Start `python -m MODULE...` under *name*."""
        log = self.folder / f"{name}.log"
        child = self.children[name] = Child(name, list(module), environ or {}, log, talks=talks)
        return child

    def end(self, *names: str) -> None:
        """End some of them, together."""
        ending = [self.children.pop(name) for name in names]
        for child in ending:
            child.tell()
        for child in ending:
            child.end()

    def pids(self, *names: str) -> dict[str, int]:
        """Return the process ids of some, by name."""
        return {name: self.children[name].pid for name in names}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(*reversed(list(self.children)))
        self._folder.cleanup()

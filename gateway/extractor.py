"""Reads HTML and PDF files in processes of its own, so that a file can harm nothing but its own reading.

A child reads one file after another, at low priority, within a bound of memory for itself and a bound of CPU time for
each file. Both are kept by the kernel: a file that makes a library loop or grow without end kills the child, and the
next file gets a new one. The child leaves when its standard input ends, that is, also when its parent is killed.

    parent -> child   {"path": "<hex>", "kind": "html"}
    child -> parent   {"text", "title", "note", "digest"} or {"reason"}
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import orjson

from gateway.formats import MAX_TEXT_BYTES, Text, Unreadable, read_html, read_pdf

Kind = Literal["html", "pdf"]

PROCESSES: Final = 2
CPU_S: Final = 30.0  # a page of a PDF takes about 10 ms
MEMORY_BYTES: Final = 1 << 30
SILENCE_S: Final = 300.0  # a disk that does not answer costs no CPU time
NICENESS: Final = 10  # reading is never as urgent as a question on the same machine
_ANSWER_BYTES: Final = 16 * MAX_TEXT_BYTES  # as JSON a character takes up to six


class Extractor:
    """Reads files, a few at once; use as `async with`.

    Args:
        cpu_s: of one file, at most.
        memory_bytes: of a process, at most.
    """

    def __init__(self, processes: int = PROCESSES, *, cpu_s: float = CPU_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._children = [_Child(cpu_s, memory_bytes) for _ in range(processes)]
        self._idle: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()  # the last one is warm; most never start

    async def __aenter__(self) -> Self:
        for child in self._children:
            self._idle.put_nowait(child)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            await child.end()

    async def read(self, path: Path, kind: Kind) -> Text:
        """Return what a file says.

        Raises:
            Unreadable: nothing, or reading it broke or outlasted its reader.
        """
        child = await self._idle.get()
        try:
            return await child.read(path, kind)
        except _Died as death:
            if not death.is_worn:
                raise Unreadable(death.reason) from death
            # It had read other files before: what they left behind may have been too much for it.
            try:
                return await child.read(path, kind)
            except _Died as again:
                raise Unreadable(again.reason) from again
        finally:
            self._idle.put_nowait(child)


class _Died(Exception):
    """The child died over a file.

    Attributes:
        is_worn: whether a fresh child may do better.
    """

    def __init__(self, reason: str, *, is_worn: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_worn = is_worn


class _Child:
    """One process, started when there is something to read."""

    def __init__(self, cpu_s: float, memory_bytes: int) -> None:
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._process: Process | None = None
        self._files = 0

    async def read(self, path: Path, kind: Kind) -> Text:
        process = self._process = self._process or await self._start()
        self._files += 1
        answer = b""
        is_silent = False
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(orjson.dumps({"path": os.fsencode(path).hex(), "kind": kind}) + b"\n")
            async with asyncio.timeout(SILENCE_S):
                await process.stdin.drain()
                answer = await process.stdout.readline()
        except TimeoutError:
            is_silent = True
        except ConnectionError:
            answer = b""
        except BaseException:  # cancelled half-way: the next reader must not get this answer
            await self.end()
            raise
        if not answer.endswith(b"\n"):
            files, code = self._files, await self.end()
            raise _Died(self._why(code, is_silent=is_silent), is_worn=files > 1 and code != -signal.SIGPROF)
        found = orjson.loads(answer)
        if "reason" in found:
            raise Unreadable(found["reason"])
        return Text(**found)

    async def _start(self) -> Process:
        self._files = 0
        return await asyncio.create_subprocess_exec(
            *[sys.executable, "-P", "-m", "gateway.extractor", str(self._cpu_s), str(self._memory_bytes)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            limit=_ANSWER_BYTES,
            start_new_session=True,  # Ctrl-C is for us: we end it
        )

    def _why(self, code: int, *, is_silent: bool) -> str:
        if is_silent:
            return f"could not be read within {SILENCE_S:g} s"
        if code == -signal.SIGPROF:
            return f"takes more than {self._cpu_s:g} s of computing to read"
        most = f"{self._memory_bytes >> 20} MiB"
        return f"breaks its reader (exit {code}): it is damaged, or needs more than {most} of memory"

    async def end(self) -> int:
        """End the process, if there is one; return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.stdin is not None:
            process.stdin.close()
        if process.stdout is None or not process.stdout.at_eof():  # else it is ending by itself, and its code tells why
            with suppress(ProcessLookupError):
                process.kill()
        return await process.wait()


# --- The child ---------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Answer requests on standard input until it ends."""
    cpu_s, memory_bytes = float(arguments[0]), int(arguments[1])
    _confine(memory_bytes)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get among the answers
    for line in sys.stdin.buffer:
        request = orjson.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF kills, also in the middle of a library's code
        answer = _answer(Path(os.fsdecode(bytes.fromhex(request["path"]))), request["kind"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(orjson.dumps(answer) + b"\n")
        answers.flush()


def _confine(memory_bytes: int) -> None:
    import resource

    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # where the system knows no such bound, the sizes of files still bound it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _answer(path: Path, kind: Kind) -> dict[str, str]:
    try:
        if kind == "html":
            data = path.read_bytes()
            found, digest = read_html(data), hashlib.sha256(data)
        else:
            found = read_pdf(path)
            with path.open("rb") as again:  # afterwards: where it is what it was before, it was that meanwhile
                digest = hashlib.file_digest(again, "sha256")
    except Unreadable as error:
        return {"reason": str(error)}
    except MemoryError:
        return {"reason": "needs too much memory to read"}
    except OSError as error:
        return {"reason": f"cannot be read: {error.strerror}"}
    except Exception as error:  # noqa: BLE001 - a stranger's file: whatever it brings about is its reason
        return {"reason": f"cannot be read: {type(error).__name__}: {str(error)[:200]}"}
    return {"text": found.text, "title": found.title, "note": found.note, "digest": digest.hexdigest()}


if __name__ == "__main__":
    main(sys.argv[1:])

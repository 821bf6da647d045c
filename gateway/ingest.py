"""`penstock ingest`: text and Markdown files become documents.

A document's id is its path below the root that was named, so that ingesting again replaces what was there. Files are
read one at a time as places become free; one that cannot be a document is skipped with a reason, the others go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.client import Client, GatewayRefused, GatewayUnreachable

SUFFIXES: Final = frozenset({".md", ".markdown", ".txt", ".text", ".rst"})
MAX_BODY_BYTES: Final = 1 << 20  # the gateway's limit; a larger file is refused rather than cut up: parts would be left
# behind when it shrinks
IN_FLIGHT: Final = 32
MAX_ID: Final = 128
_SAFE_PART = re.compile(r"[A-Za-z0-9._-]+")
_HEADING = re.compile(r"#{1,6}\s+(.+?)\s*#*")
_FENCE = re.compile(r"\s*(```|~~~)")
_TITLE_CHARS: Final = 1_000
_TITLE_LINES: Final = 60

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3


@dataclass(frozen=True, slots=True)
class File:
    """One file to ingest, under its document id; `name` is for people."""

    path: Path
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """One file that is no document, and why.

    Attributes:
        is_fault: False for a file of another kind that merely lay in a folder.
    """

    name: str
    reason: str
    is_fault: bool = True


@dataclass(frozen=True, slots=True)
class Indexed:
    """One document in the index."""

    name: str
    id: str
    chunks: int


Result = Indexed | Skipped


@dataclass(slots=True)
class Report:
    """What came of it."""

    indexed: list[Indexed] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Note one file."""
        if isinstance(result, Indexed):
            self.indexed.append(result)
        else:
            self.skipped.append(result)

    @property
    def exit_code(self) -> int:
        """0 when every text file is indexed, else 1."""
        return EXIT_FAILED if any(item.is_fault for item in self.skipped) else EXIT_OK

    def as_json(self) -> dict[str, Any]:
        """Return the summary for scripts."""
        return {
            "documents": len(self.indexed),
            "chunks": sum(item.chunks for item in self.indexed),
            "indexed": [{"path": item.name, "id": item.id, "chunks": item.chunks} for item in self.indexed],
            "skipped": [{"path": item.name, "reason": item.reason} for item in self.skipped],
        }


# --- Decisions ---------------------------------------------------------------------------------


def document_id(name: str) -> str:
    """Return the document id of a file called *name* (its path below the root, with `/`).

    Folders are joined by `:`. A name that does not fit into an id as it is gets its unfit characters replaced and
    a hash of the whole name appended after `::`, which no other id contains: different names never share an id.
    """
    name = unicodedata.normalize("NFC", name)
    parts = name.split("/")
    plain = ":".join(parts)
    if all(_SAFE_PART.fullmatch(part) for part in parts) and len(plain) <= MAX_ID:
        return plain
    mark = "::" + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    safe = ":".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts)
    return safe[: MAX_ID - len(mark)].rstrip(":") + mark


def title_of(text: str, path: Path) -> str:
    """Return the first heading near the top of *text*, else the file's name in words."""
    fenced = False
    lines = text.splitlines()[:_TITLE_LINES]
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if _FENCE.match(line):
            fenced = not fenced
        if fenced:
            continue
        if heading := _HEADING.fullmatch(line.strip()):
            return heading.group(1)[:_TITLE_CHARS]
        if line.strip() and re.fullmatch(r"={3,}", below.strip()):
            return line.strip()[:_TITLE_CHARS]
    return re.sub(r"[-_]+", " ", path.stem)[:_TITLE_CHARS]


def find_files(paths: Sequence[Path]) -> Iterator[File | Skipped]:
    """Yield what there is to ingest below *paths*, in a stable order; hidden files and folders are left out.

    Raises:
        FileNotFoundError: one of *paths* does not exist.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(str(path))
    seen: dict[str, Path] = {}
    for root in paths:
        for path in _walk(root) if root.is_dir() else [root]:
            name = path.relative_to(root).as_posix() if root.is_dir() else path.name
            if root.is_dir() and path.suffix.lower() not in SUFFIXES:
                kind = _printable(path.suffix) or "no suffix"
                yield Skipped(_printable(name), f"neither text nor Markdown ({kind})", is_fault=False)
                continue
            if _printable(name) != name:
                yield Skipped(_printable(name), "its name is not UTF-8: rename it")
                continue
            file = File(path, document_id(name), name)
            if file.id in seen and seen[file.id].resolve() != path.resolve():
                other = _printable(str(seen[file.id]))
                yield Skipped(_printable(str(path)), f"{other} has the same id, {file.id}: name a folder above both")
            elif file.id not in seen:
                seen[file.id] = path
                yield file


def read_document(file: File) -> dict[str, Any] | Skipped:
    """Return the body to send for *file*, or why there is none."""
    try:
        found = file.path.stat()
        if not stat.S_ISREG(found.st_mode):  # to open a FIFO would wait for its writer, a device may never end
            return Skipped(file.name, "not a regular file")
        if found.st_size > MAX_BODY_BYTES:
            return Skipped(file.name, f"{found.st_size:,} bytes; at most 1 MiB goes into one document: split it")
        text = file.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Skipped(file.name, f"not UTF-8 text (byte {error.start})")
    except OSError as error:
        return Skipped(file.name, f"cannot be read: {error.strerror}")
    if "\0" in text:
        return Skipped(file.name, "not text: holds NUL bytes")
    if not text.strip():
        return Skipped(file.name, "empty", is_fault=False)
    body = {
        "id": file.id,
        "title": title_of(text, file.path),
        "text": text,
        "metadata": {"path": file.name[:1_000]},
        "priority": "low",
    }
    if len(orjson.dumps(body)) > MAX_BODY_BYTES:
        return Skipped(file.name, "more than 1 MiB as JSON: split it")
    return body


def _printable(name: str) -> str:
    """Return a file's name as text; bytes of it that are none come out as `\\udc80` and the like."""
    return name.encode(errors="backslashreplace").decode()


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)


# --- Effects -----------------------------------------------------------------------------------


async def ingest(client: Client, found: Sequence[File | Skipped], on_result: Callable[[Result], None]) -> Report:
    """Send every file, a few at a time, and wait until each is indexed.

    Args:
        on_result: called once for each file, as its end is known.

    Raises:
        GatewayUnreachable: the gateway stayed away; what was accepted before goes on there.
        GatewayRefused: it takes nothing from us at all (401, 403, no such route).
    """
    report = Report()
    waiting = iter(found)

    def note(result: Result) -> None:
        report.add(result)
        on_result(result)

    async def take() -> None:
        for item in waiting:
            note(item if isinstance(item, Skipped) else await _ingest_one(client, item))

    try:
        async with asyncio.TaskGroup() as tasks:
            for number in range(IN_FLIGHT):
                tasks.create_task(take(), name=f"ingest {number}")
    except ExceptionGroup as group:  # not `except*`: before Python 3.11.4 it wraps what is raised in it once more
        ends_it_all = group.subgroup((GatewayUnreachable, GatewayRefused))
        if ends_it_all is None:
            raise
        raise _first(ends_it_all) from None
    return report


async def _ingest_one(client: Client, file: File) -> Result:
    document = await asyncio.to_thread(read_document, file)
    if isinstance(document, Skipped):
        return document
    try:
        accepted = await client.send("POST", "/documents", document)
        outcome = await client.outcome(accepted.json()["job_id"])
    except GatewayRefused as error:
        if error.status in {401, 403, 404, 405}:
            raise
        return Skipped(file.name, str(error))
    if outcome.get("status") != "completed":
        reason = (outcome.get("error") or {}).get("message") or str(outcome.get("status"))
        return Skipped(file.name, reason)
    return Indexed(file.name, file.id, int((outcome.get("result") or {}).get("chunks", 0)))


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

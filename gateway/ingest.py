"""`penstock ingest`: Markdown, text, HTML and PDF files become documents.

A document's id is its path below the root that was named, so that ingesting again replaces what was there. With each
goes a digest of its file; the index is asked for those it holds before anything is read, and what stands there already
is left alone. So an ingest that was killed is started again and does only what was not done: nothing is remembered
here, and nothing can be remembered wrongly. A few files are at work at a time; one that cannot be a document is skipped
with a reason, the others go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import orjson

from gateway.client import Client, GatewayRefused, GatewayUnreachable
from gateway.extractor import Extractor
from gateway.formats import MAX_TEXT_BYTES, Text, Unreadable

Kind = Literal["text", "html", "pdf"]

SUFFIXES: Final[dict[str, Kind]] = {
    **dict.fromkeys((".md", ".markdown", ".txt", ".text", ".rst"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    ".pdf": "pdf",
}
MAX_FILE_BYTES: Final[dict[Kind, int]] = {"text": MAX_TEXT_BYTES, "html": 16 << 20, "pdf": 256 << 20}
MAX_BODY_BYTES: Final = 1 << 20  # the gateway's limit; a larger file is refused rather than cut up: parts would be left
# behind when it shrinks
IN_FLIGHT: Final = 4  # enough to keep both stages at work; more would only stand before questions
LOOK_AT_ONCE: Final = 50  # ids of 128 characters in one request's head
READING: Final = 2
"""Version of how files are read. Raise it when `gateway.formats` makes another text of the same file: what was indexed
before is then sent again."""
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
    """One document that was put into the index.

    Attributes:
        note: what is missing from it, for people; empty where nothing is.
    """

    name: str
    id: str
    chunks: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """One document that was in the index already, made from the same file."""

    name: str
    id: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Found:
    """One file as it lies there.

    Attributes:
        digest: of its bytes, and of how they are read; the index keeps it with the document.
    """

    file: File
    kind: Kind
    digest: str


Result = Indexed | Unchanged | Skipped


@dataclass(slots=True)
class Report:
    """What came of it."""

    indexed: list[Indexed] = field(default_factory=list)
    unchanged: list[Unchanged] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Note one file."""
        if isinstance(result, Indexed):
            self.indexed.append(result)
        elif isinstance(result, Unchanged):
            self.unchanged.append(result)
        else:
            self.skipped.append(result)

    @property
    def chunks(self) -> int:
        """How many chunks were put into the index."""
        return sum(item.chunks for item in self.indexed)

    @property
    def exit_code(self) -> int:
        """0 when every file of a kind that can be read is in the index, else 1."""
        return EXIT_FAILED if any(item.is_fault for item in self.skipped) else EXIT_OK

    def as_json(self) -> dict[str, Any]:
        """Return the summary for scripts."""
        return {
            "documents": len(self.indexed),
            "chunks": self.chunks,
            "indexed": [
                {"path": item.name, "id": item.id, "chunks": item.chunks} | ({"note": item.note} if item.note else {})
                for item in self.indexed
            ],
            "unchanged": [{"path": item.name, "id": item.id, "chunks": item.chunks} for item in self.unchanged],
            "skipped": [{"path": item.name, "reason": item.reason, "failed": item.is_fault} for item in self.skipped],
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
        OSError: one of *paths* does not exist, or cannot be looked at.
    """
    for path in paths:
        path.stat()
    seen: dict[str, Path] = {}
    for root in paths:
        for item in _walk(root) if root.is_dir() else [root]:
            if isinstance(item, Skipped):
                yield item
                continue
            path = item
            name = path.relative_to(root).as_posix() if root.is_dir() else path.name
            if root.is_dir() and path.suffix.lower() not in SUFFIXES:
                kind = _printable(path.suffix) or "no suffix"
                yield Skipped(_printable(name), f"not a kind of file that is read ({kind})", is_fault=False)
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


def kind_of(path: Path, beginning: bytes) -> Kind:
    """Return how a file is to be read: as its suffix says, else as it begins; it is text unless it shows otherwise."""
    if kind := SUFFIXES.get(path.suffix.lower()):
        return kind
    if beginning.startswith(b"%PDF-"):
        return "pdf"
    return "html" if re.match(rb"\s*<(?:!doctype\s+html|html)\b", beginning, re.IGNORECASE) else "text"


def examine(file: File) -> Found | Skipped:
    """Return what a file is, without making sense of it, or why it can be no document."""
    try:
        about = file.path.stat()
        if not stat.S_ISREG(about.st_mode):  # to open a FIFO would wait for its writer, a device may never end
            return Skipped(file.name, "not a regular file")
        if not about.st_size:
            return Skipped(file.name, "empty", is_fault=False)
        with file.path.open("rb") as opened:
            kind = kind_of(file.path, opened.read(512))
            if about.st_size > MAX_FILE_BYTES[kind]:
                most = f"{MAX_FILE_BYTES[kind] >> 20} MiB"
                return Skipped(file.name, f"{about.st_size:,} bytes; at most {most} goes into one document: split it")
            opened.seek(0)
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return Skipped(file.name, f"cannot be read: {error.strerror}")
    return Found(file, kind, _digest(digest))


def _digest(of_bytes: str) -> str:
    return f"{READING}:{of_bytes}"


def read_text(file: File) -> Text | Skipped:
    """Return what a text or Markdown file says, or why that is no document."""
    try:
        data = file.path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Skipped(file.name, f"not UTF-8 text (byte {error.start})")
    except OSError as error:
        return Skipped(file.name, f"cannot be read: {error.strerror}")
    if "\0" in text:
        return Skipped(file.name, "not text: holds NUL bytes")
    if not text.strip():
        return Skipped(file.name, "empty", is_fault=False)
    return Text(text, digest=hashlib.sha256(data).hexdigest())


def document_of(found: Found, read: Text, collection: str | None = None) -> dict[str, Any] | Skipped:
    """Return the body to send for a file that was read, or why there is none."""
    file = found.file
    body = {
        "id": file.id,
        "title": read.title[:_TITLE_CHARS] or title_of(read.text, file.path),
        "text": read.text,
        "digest": _digest(read.digest),  # of what was read: the file may have changed since it was examined
        "metadata": {"path": file.name[:1_000]},
        "priority": "low",
    }
    if collection is not None:
        body["collection"] = collection
    if len(orjson.dumps(body)) > MAX_BODY_BYTES:
        return Skipped(file.name, "more than 1 MiB as JSON: split it")
    return body


def _printable(name: str) -> str:
    """Return a file's name as text; bytes of it that are none come out as `\\udc80` and the like."""
    return name.encode(errors="backslashreplace").decode()


def _walk(root: Path) -> Iterator[Path | Skipped]:
    """Yield the files below *root*, and what is not looked into; links to folders are not: they may lead round."""
    left = [root]
    while left:
        folder = left.pop()
        name = _printable(folder.relative_to(root).as_posix())
        try:
            with os.scandir(folder) as listed:
                entries = sorted((entry for entry in listed if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            yield Skipped(name, f"a folder that cannot be read: {error.strerror}")
            continue
        inner = []
        for entry in entries:
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                inner.append(path)
            elif entry.is_symlink() and _leads_to_folder(path):
                yield Skipped(_printable(path.relative_to(root).as_posix()), "a link to a folder", is_fault=False)
            else:
                yield path
        left += reversed(inner)


def _leads_to_folder(link: Path) -> bool:
    try:
        return link.is_dir()
    except OSError:  # it leads where we may not look: reading it will say so
        return False


# --- Effects -----------------------------------------------------------------------------------


async def ingest(
    client: Client,
    found: Sequence[File | Skipped],
    on_result: Callable[[Result], None],
    *,
    again: bool = False,
    collection: str | None = None,
) -> Report:
    """Send every file that the index does not hold, a few at a time, and wait until each is indexed.

    Args:
        on_result: called once for each file, as its end is known.
        again: send also what the index holds already.
        collection: the knowledge base they go into; None: what questions are answered from.

    Raises:
        GatewayUnreachable: the gateway stayed away; what was accepted before goes on there.
        GatewayRefused: it takes nothing from us at all (401, 403, no such route).
    """
    report = Report()

    def note(result: Result) -> None:
        report.add(result)
        on_result(result)

    to_do: asyncio.Queue[Found | None] = asyncio.Queue(LOOK_AT_ONCE)

    async def sort_out() -> None:
        async for item in _missing(client, found, again=again, collection=collection):
            if isinstance(item, Found):
                await to_do.put(item)
            else:
                note(item)
        for _ in range(IN_FLIGHT):
            await to_do.put(None)

    async def take(extractor: Extractor) -> None:
        while item := await to_do.get():
            note(await ingest_one(client, extractor, item, collection))

    try:
        async with Extractor() as extractor, asyncio.TaskGroup() as tasks:
            tasks.create_task(sort_out(), name="sort out files")
            for number in range(IN_FLIGHT):
                tasks.create_task(take(extractor), name=f"ingest {number}")
    except ExceptionGroup as group:  # not `except*`: before Python 3.11.4 it wraps what is raised in it once more
        ends_it_all = group.subgroup((GatewayUnreachable, GatewayRefused))
        if ends_it_all is None:
            raise
        raise _first(ends_it_all) from None
    return report


async def _missing(
    client: Client, found: Sequence[File | Skipped], *, again: bool, collection: str | None
) -> AsyncIterator[Found | Unchanged | Skipped]:
    """Examine the files in order; those that the index holds as they are come out as `Unchanged`."""
    rest = iter(found)
    while batch := list(islice(rest, LOOK_AT_ONCE)):
        examined = await asyncio.to_thread(_examine_all, batch)
        ids = [item.file.id for item in examined if isinstance(item, Found)]
        held = {} if again or not ids else await client.documents(ids, collection)
        for item in examined:
            standing = held.get(item.file.id) if isinstance(item, Found) else None
            if isinstance(item, Found) and standing and standing["digest"] == item.digest:
                yield Unchanged(item.file.name, item.file.id, standing["chunks"])
            else:
                yield item


def _examine_all(batch: Sequence[File | Skipped]) -> list[Found | Skipped]:
    return [examine(item) if isinstance(item, File) else item for item in batch]


async def ingest_one(client: Client, extractor: Extractor, found: Found, collection: str | None = None) -> Result:
    """Read one file, send it, and wait until it is indexed.

    Raises:
        GatewayUnreachable, GatewayRefused: see `ingest`.
    """
    file = found.file
    try:
        if found.kind == "text":
            read = await asyncio.to_thread(read_text, file)
        else:
            read = await extractor.read(file.path, found.kind)
    except Unreadable as error:
        return Skipped(file.name, str(error))
    if isinstance(read, Skipped):
        return read
    if found.kind == "pdf" and _digest(read.digest) != found.digest:  # nobody knows which of the two it was made from
        return Skipped(file.name, "changed while it was read: start again when it is whole")
    document = await asyncio.to_thread(document_of, found, read, collection)
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
    return Indexed(file.name, file.id, int((outcome.get("result") or {}).get("chunks", 0)), read.note)


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

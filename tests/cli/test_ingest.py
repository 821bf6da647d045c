"""`penstock ingest` against a small real HTTP server that behaves as a gateway does."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs

import orjson
import pytest
import uvicorn
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from gateway.client import RETRY_CAP_S, Client, GatewayRefused, GatewayUnreachable, decide_wait_s, next_poll_s
from gateway.extractor import NICENESS, Extractor
from gateway.ingest import (
    IN_FLIGHT,
    LOOK_AT_ONCE,
    MAX_BODY_BYTES,
    File,
    Found,
    Indexed,
    Kind,
    Report,
    Skipped,
    Unchanged,
    document_id,
    document_of,
    examine,
    find_files,
    ingest,
    ingest_one,
    kind_of,
    read_text,
    title_of,
)
from gateway.progress import describe, summary
from tests.cli.conftest import ROOT, clean_environment
from tests.conftest import PATIENCE_S, wait_until
from tests.pdfs import NOTHING, pdf, protected, words

POLLS_BEFORE_DONE = 2


class SmallGateway:
    """Takes documents, says "queued" a few times, then what the document's text asks for.

    Attributes:
        documents: as they were sent.
        index: as they stand; may be filled by a test.
        lookups: how many documents were asked for at a time.
    """

    def __init__(self) -> None:
        self.documents: dict[str, dict[str, Any]] = {}
        self.index: dict[str, dict[str, Any]] = {}
        self.lookups: list[int] = []
        self.is_silent = False
        self.is_somebody_else = False
        self.refuse_first = 0
        self.key = ""
        self.most_in_flight = 0
        self.url = ""
        self._jobs: dict[str, tuple[str, int]] = {}
        self._numbers = itertools.count()
        self._refused: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if self.is_somebody_else:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
            await send({"type": "http.response.body", "body": b"<title>Welcome</title>"})
            return
        status, answer, headers = self._answer(scope, body)
        head = [(b"content-type", b"application/json"), *headers]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": orjson.dumps(answer)})

    @property
    def refused(self) -> int:
        return self._refused.total()

    def _answer(self, scope: Scope, body: bytes) -> tuple[int, Any, list[tuple[bytes, bytes]]]:
        if self.key and dict(scope["headers"]).get(b"authorization") != f"Bearer {self.key}".encode():
            return 401, error("no_key", "an API key is needed"), []
        match scope["method"], scope["path"]:
            case "GET", "/livez":
                return 200, {}, []
            case "POST", "/documents":
                document = orjson.loads(body)
                if self._refused[document["id"]] < self.refuse_first:
                    self._refused[document["id"]] += 1
                    return 503, error("overloaded", "too much work"), [(b"retry-after", b"0")]
                if "TOO ODD" in document["text"]:
                    return 422, error("too_odd", "is odd", param="text"), []
                job_id = f"job{next(self._numbers)}"
                self._jobs[job_id] = (document["id"], 0)
                self.documents[document["id"]] = document
                self.most_in_flight = max(self.most_in_flight, len(self._jobs))
                return 202, {"job_id": job_id}, []
            case "GET", "/documents":
                if self.is_silent:
                    return 504, error("deadline_exceeded", "the job's deadline has passed"), []
                ids = parse_qs(scope["query_string"].decode())["ids"][0].split(",")
                self.lookups.append(len(ids))
                return 200, {"documents": {name: self.index.get(name) for name in ids}}, []
            case "GET", "/jobs":
                ids = parse_qs(scope["query_string"].decode())["ids"][0].split(",")
                return 200, {"jobs": {job_id: self._status(job_id) for job_id in ids}}, []
        return 404, error("not_found", "nothing there"), []

    def _status(self, job_id: str) -> dict[str, Any] | None:
        if job_id not in self._jobs:
            return None
        document, polls = self._jobs[job_id]
        if polls < POLLS_BEFORE_DONE:
            self._jobs[job_id] = (document, polls + 1)
            return {"job_id": job_id, "status": "running"}
        del self._jobs[job_id]
        if "VANISHES" in self.documents[document]["text"]:
            return None
        if "BREAKS" in self.documents[document]["text"]:
            return {"status": "failed", "result": None, "error": {"code": "broken", "message": "it broke"}}
        self.index[document] = {"chunks": 3, "digest": self.documents[document]["digest"]}
        return {"status": "completed", "result": {"document_id": document, "chunks": 3}, "error": None}


def error(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": param, "code": code}}


@pytest.fixture
async def gateway() -> AsyncIterator[SmallGateway]:
    small = SmallGateway()
    server = uvicorn.Server(uvicorn.Config(small, port=0, log_level="critical", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    await wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    small.url = f"http://127.0.0.1:{port}"
    yield small
    server.should_exit = True
    await serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "setup.md").write_text("# Setting up\n\nTurn the key.\n")
    (tmp_path / "notes.txt").write_text("Just some notes.\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.md").write_text("# Not this one\n")
    return tmp_path


async def run(gateway: SmallGateway, *paths: Path, again: bool = False) -> Report:
    async with Client(gateway.url, gateway.key) as client:
        return await ingest(client, list(find_files(paths)), lambda _result: None, again=again)


# --- What is sent ------------------------------------------------------------------------------


async def test_a_folder_becomes_documents_and_all_are_waited_for(gateway: SmallGateway, folder: Path) -> None:
    """Ids are paths, titles are headings, priority is low, and the end is seen."""
    report = await run(gateway, folder)
    assert {item.id for item in report.indexed} == {"guide:setup.md", "notes.txt"}
    assert gateway.documents["guide:setup.md"].pop("digest")
    assert gateway.documents["guide:setup.md"] == {
        "id": "guide:setup.md",
        "title": "Setting up",
        "text": "# Setting up\n\nTurn the key.\n",
        "metadata": {"path": "guide/setup.md"},
        "priority": "low",
    }
    assert report.as_json()["chunks"] == 6
    assert report.exit_code == 0
    assert [item.name for item in report.skipped] == ["picture.png"]


async def test_html_and_pdf_become_documents(gateway: SmallGateway, tmp_path: Path) -> None:
    """Read in another process; called by what they say of themselves; what is missing is told."""
    (tmp_path / "page.html").write_text("<title>Site</title><nav>Home</nav><h1>The page</h1><p>Turn the key.")
    (tmp_path / "paper.PDF").write_bytes(pdf(words("Turn the key."), title="The paper"))
    whole = pdf(words("Turn it."), words("Gone."))
    (tmp_path / "torn.pdf").write_bytes(whole.replace(b"7 0 obj\n<< /Type", b"7 0 obj\n[] /Type"))
    report = await run(gateway, tmp_path)
    assert report.skipped == []
    sent = {name: (document["title"], document["text"]) for name, document in gateway.documents.items()}
    assert sent["page.html"] == ("The page", "# The page\n\nTurn the key.")
    assert sent["paper.PDF"] == ("The paper", "Turn the key.")
    assert sent["torn.pdf"] == ("torn", "Turn it.")
    assert [item.note for item in report.indexed if item.note] == ["1 of 2 pages could not be read"]


async def test_what_stands_in_the_index_is_not_sent_again(gateway: SmallGateway, folder: Path) -> None:
    """Neither read nor sent, but for what has changed; `again` sends all."""
    assert len((await run(gateway, folder)).indexed) == 2
    gateway.documents.clear()
    second = await run(gateway, folder)
    assert (second.indexed, gateway.documents, second.exit_code) == ([], {}, 0)
    assert [item.id for item in second.unchanged] == ["notes.txt", "guide:setup.md"]
    (folder / "notes.txt").write_text("Other notes.\n")
    assert [item.id for item in (await run(gateway, folder)).indexed] == ["notes.txt"]
    assert len((await run(gateway, folder, again=True)).indexed) == 2


async def test_a_document_that_left_the_index_is_sent_again(gateway: SmallGateway, folder: Path) -> None:
    """The index is asked each time: nothing that was remembered elsewhere can be wrong."""
    await run(gateway, folder)
    del gateway.index["notes.txt"]
    assert [item.id for item in (await run(gateway, folder)).indexed] == ["notes.txt"]


async def test_the_index_is_asked_about_many_at_once(gateway: SmallGateway, tmp_path: Path) -> None:
    """A thousand small files are twenty questions."""
    for number in range(LOOK_AT_ONCE + 1):
        (tmp_path / f"{number}.md").write_text(f"# {number}\n")
    await run(gateway, tmp_path)
    assert gateway.lookups == [LOOK_AT_ONCE, 1]


async def test_an_index_that_does_not_answer_is_told_as_such(gateway: SmallGateway, folder: Path) -> None:
    """A gateway without a retriever behind it can take documents, and nobody would index them."""
    gateway.is_silent = True
    with pytest.raises(GatewayUnreachable, match="the index does not answer"):
        await run(gateway, folder)


async def test_overload_is_waited_out(gateway: SmallGateway, folder: Path) -> None:
    """A 503 with Retry-After is no failure: the document is sent again."""
    gateway.refuse_first = 3
    report = await run(gateway, folder)
    assert len(report.indexed) == 2
    assert report.exit_code == 0


async def test_work_in_flight_is_bounded(gateway: SmallGateway, tmp_path: Path) -> None:
    """A thousand files do not become a thousand jobs at once."""
    for number in range(3 * IN_FLIGHT):
        (tmp_path / f"{number}.md").write_text(f"# {number}\n")
    report = await run(gateway, tmp_path)
    assert len(report.indexed) == 3 * IN_FLIGHT
    assert gateway.most_in_flight <= IN_FLIGHT


async def test_one_bad_file_does_not_stop_the_others(gateway: SmallGateway, folder: Path) -> None:
    """Each failure has a reason; the rest is indexed; the exit code tells."""
    (folder / "breaks.md").write_text("BREAKS the encoder")
    (folder / "lost.md").write_text("VANISHES from Redis")
    (folder / "odd.md").write_text("TOO ODD for the gateway")
    (folder / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "scan.pdf").write_bytes(pdf(NOTHING))
    (folder / "secret.pdf").write_bytes(protected())
    (folder / "nothing.html").write_text("<script>1</script>")
    report = await run(gateway, folder)
    reasons = {item.name: item.reason for item in report.skipped if item.is_fault}
    assert reasons == {
        "breaks.md": "it broke",
        "lost.md": "lost",
        "odd.md": "text: is odd",
        "latin.txt": "not UTF-8 text (byte 1)",
        "scan.pdf": "holds no text on 1 pages: scanned, perhaps; run OCR on it first",
        "secret.pdf": "protected by a password: save it without one",
        "nothing.html": "holds no text",
    }
    assert len(report.indexed) == 2
    assert report.exit_code == 1


async def test_a_refused_key_ends_it_all(gateway: SmallGateway, folder: Path) -> None:
    """401 will be 401 for every document: say it once."""
    gateway.key = "right"
    async with Client(gateway.url, "wrong") as client:
        with pytest.raises(GatewayRefused, match="an API key is needed"):
            await ingest(client, list(find_files([folder])), lambda _result: None)
    assert (await run(gateway, folder)).exit_code == 0


async def test_a_gateway_that_stays_away_is_given_up_on(folder: Path) -> None:
    """Patience ends, and the reason names the address."""
    async with Client("http://127.0.0.1:1", patience_s=0) as client:
        with pytest.raises(GatewayUnreachable, match=r"127\.0\.0\.1:1"):
            await ingest(client, list(find_files([folder])), lambda _result: None)


# --- The command -------------------------------------------------------------------------------


async def test_the_command_prints_a_summary_for_scripts(gateway: SmallGateway, folder: Path) -> None:
    """`--json`: one object on standard output and nothing else."""
    code, out, _err = await command("ingest", str(folder), "--url", gateway.url, "--json")
    assert code == 0
    assert orjson.loads(out)["documents"] == 2


async def test_the_command_prints_plain_lines_without_a_terminal(gateway: SmallGateway, folder: Path) -> None:
    """No bar and no escape codes in a log file."""
    code, out, _err = await command("ingest", str(folder), "--url", gateway.url)
    assert code == 0
    assert "indexed  guide/setup.md  (3 chunks)" in out.splitlines()
    assert "2 documents indexed (6 chunks), 1 skipped" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["/nonexistent/folder"], 2, "/nonexistent/folder does not exist"),
        ([str(ROOT / "README.md"), "--url", "http://127.0.0.1:1"], 3, "no gateway at http://127.0.0.1:1"),
        (["a" * 300], 2, "cannot be read: File name too long"),
        ([str(ROOT / "README.md"), "--url", "localhost:8000"], 2, "--url: no address like http://127.0.0.1:8000"),
        ([str(ROOT / "README.md"), "--url", ""], 2, "--url is empty"),
        ([str(ROOT / "README.md"), "--api-key", "schl\u00fcssel"], 2, "no HTTP header can carry"),
        ([str(ROOT / "README.md"), "--api-key", "a\nb"], 2, "no HTTP header can carry"),
    ],
)
async def test_the_command_says_at_once_what_is_wrong(arguments: list[str], exit_code: int, said: str) -> None:
    """Wrong paths and wrong addresses end the command with a line and no traceback."""
    code, out, err = await command("ingest", *arguments)
    assert (code, out) == (exit_code, "")
    assert said in err
    assert "Traceback" not in err


async def test_the_command_is_nice(gateway: SmallGateway, folder: Path) -> None:
    """On the machine that answers questions, whatever it costs is to come after them."""
    gateway.refuse_first = 1_000_000
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "penstock", "ingest", str(folder), "--url", gateway.url],
        cwd="/",
        env=clean_environment(),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await wait_until(lambda: gateway.refused > 0)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    finally:
        process.kill()
        await process.wait()


async def test_a_reader_that_has_read_enough_ends_nothing(gateway: SmallGateway, folder: Path) -> None:
    """`penstock ingest ... | head -1`: the pipe is closed, the rest is indexed, nobody sees a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "penstock", "ingest", str(folder), "--url", gateway.url],
        cwd="/",
        env=clean_environment(),
        stdout=writer,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(writer)
    _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert len(gateway.documents) == 2


@pytest.mark.parametrize("again", [[], ["--again"]])
async def test_what_is_no_gateway_is_told_as_such(gateway: SmallGateway, folder: Path, again: list[str]) -> None:
    """A page of somebody else's at that address, with 200: one line, and no file blamed for it."""
    gateway.is_somebody_else = True
    code, out, err = await command("ingest", str(folder), "--url", gateway.url, *again)
    assert (code, out) == (2, "")
    assert err.startswith(f"penstock: {gateway.url} refuses: 200 without any JSON: something else than Penstock")
    assert err.count("\n") == 1


async def command(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "penstock",
        *arguments,
        cwd="/",
        env=clean_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


# --- Decisions ---------------------------------------------------------------------------------

names = st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1), min_size=1, max_size=8).map("/".join)


@given(names)
@example("a" * 300)
@example("guide/setup.md")
@example("ключ/файл.md")
def test_every_path_gives_a_valid_and_stable_id(name: str) -> None:
    """Whatever a file is called, its id fits into a key."""
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", document_id(name))
    assert document_id(name) == document_id(name)


@given(st.sets(names, min_size=2, max_size=20))
@example({"a/b.md", "a:b.md"})
@example({"a b.md", "a-b.md"})
@example({"a" * 200 + ".md", "a" * 201 + ".md"})
def test_different_paths_never_share_an_id(paths: set[str]) -> None:
    """Otherwise one document would silently replace another."""
    distinct = {unicodedata.normalize("NFC", path) for path in paths}
    assert len({document_id(path) for path in distinct}) == len(distinct)


def test_two_roots_with_the_same_name_inside_are_told_apart(tmp_path: Path) -> None:
    """The second README.md is refused, not silently put in the first one's place."""
    for root in ("one", "two"):
        (tmp_path / root).mkdir()
        (tmp_path / root / "README.md").write_text(f"# {root}\n")
    found = list(find_files([tmp_path / "one", tmp_path / "two", tmp_path / "one"]))
    assert [type(item) for item in found] == [File, Skipped]
    assert "same id" in next(item.reason for item in found if isinstance(item, Skipped))


def test_a_file_named_by_itself_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    """Suffixes only choose what to take out of a folder."""
    (tmp_path / "LICENSE").write_text("All yours.\n")
    assert [type(item) for item in find_files([tmp_path / "LICENSE"])] == [File]
    assert [type(item) for item in find_files([tmp_path])] == [Skipped]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"a\0b", "not text: holds NUL bytes"),
        (b"\xff\xfe", "not UTF-8 text (byte 0)"),
        (b"x" * (MAX_BODY_BYTES + 1), "1,048,577 bytes; at most 1 MiB goes into one document: split it"),
        (b"\n" * (MAX_BODY_BYTES - 10) + b"x", "more than 1 MiB as JSON: split it"),
    ],
)
def test_what_cannot_be_a_document_is_skipped_with_a_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    """A reason that a person can act on."""
    path = tmp_path / "file.txt"
    path.write_bytes(data)
    answer = document(File(path, "file.txt", "file.txt"))
    assert isinstance(answer, Skipped)
    assert answer.reason == reason


def document(file: File) -> dict[str, Any] | Skipped:
    """Return what a text file is sent as, or the reason why it is not."""
    found = examine(file)
    text = read_text(file) if isinstance(found, Found) else found
    return text if isinstance(text, Skipped) else document_of(cast("Found", found), text)


def test_a_file_that_cannot_be_read_is_skipped_with_a_reason(tmp_path: Path) -> None:
    """What the system says is a reason like any other."""
    answer = examine(File(tmp_path / "gone.txt", "gone.txt", "gone.txt"))
    assert answer == Skipped("gone.txt", "cannot be read: No such file or directory")


async def test_the_digest_is_that_of_what_was_sent(gateway: SmallGateway, tmp_path: Path) -> None:
    """A file may change between the look at it and its reading: what came of it must not go under the old digest."""
    note, page, paper = (tmp_path / name for name in ("note.md", "page.html", "paper.pdf"))
    new = {note: b"# New\n", page: b"<h1>New</h1>", paper: pdf(words("New."))}
    for path in new:
        path.write_bytes(b"old")
    async with Client(gateway.url) as client, Extractor() as extractor:
        for path, data in new.items():
            found = examine(File(path, path.name, path.name))
            assert isinstance(found, Found)
            path.write_bytes(data)
            result = await ingest_one(client, extractor, found)
            if path is paper:
                assert result == Skipped("paper.pdf", "changed while it was read: start again when it is whole")
            else:
                assert gateway.documents[path.name]["digest"].endswith(hashlib.sha256(data).hexdigest())


async def test_a_folder_is_not_left_by_its_links(gateway: SmallGateway, tmp_path: Path) -> None:
    """They may lead round, or out of it; each is told, and a link to itself is a file that cannot be read."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("a\n")
    (tmp_path / "linked.md").symlink_to(tmp_path / "sub" / "a.md")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "self.md").symlink_to("self.md")
    report = await run(gateway, tmp_path)
    assert {item.name for item in report.indexed} == {"linked.md", "sub/a.md"}
    assert sorted(report.skipped, key=lambda item: item.name) == [
        Skipped("self.md", "cannot be read: Too many levels of symbolic links"),
        Skipped("sub/up", "a link to a folder", is_fault=False),
    ]


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it would be missing from the index, and nobody would know. Root may read all: so refused here."""
    for name in ("a", "locked", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.md").write_text("x\n")
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if path.name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = list(find_files([tmp_path]))
    assert [item.name for item in found] == ["a/x.md", "locked", "z/x.md"]
    assert found[1] == Skipped("locked", "a folder that cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("name", "beginning", "kind"),
    [
        ("a.md", b"<html>", "text"),
        ("a.htm", b"", "html"),
        ("a.Pdf", b"<html>", "pdf"),
        ("a", b"%PDF-1.7", "pdf"),
        ("a", b"\n <!DOCTYPE html>", "html"),
        ("a", b"<HTML lang=en>", "html"),
        ("a.html5", b"<htmlish>", "text"),
    ],
)
def test_a_file_is_read_as_its_suffix_says_or_as_it_begins(name: str, beginning: bytes, kind: Kind) -> None:
    """A file named by itself may be called anything."""
    assert kind_of(Path(name), beginning) == kind


def test_a_file_too_large_to_be_read_is_not_read(tmp_path: Path) -> None:
    """A disk image that somebody called `.pdf` costs a look at its size."""
    with (tmp_path / "image.pdf").open("wb") as image:
        image.truncate((256 << 20) + 1)
    answer = examine(File(tmp_path / "image.pdf", "image.pdf", "image.pdf"))
    assert answer == Skipped("image.pdf", "268,435,457 bytes; at most 256 MiB goes into one document: split it")


@pytest.mark.parametrize("inside", [True, False])
async def test_what_is_no_regular_file_is_never_opened(gateway: SmallGateway, tmp_path: Path, *, inside: bool) -> None:
    """A FIFO that nobody writes to would hold up everything for ever."""
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "good.md").write_text("good\n")
    async with asyncio.timeout(PATIENCE_S):
        report = await run(gateway, tmp_path if inside else tmp_path / "pipe.md")
    assert report.skipped == [Skipped("pipe.md", "not a regular file")]
    assert [item.name for item in report.indexed] == ["good.md"] * inside


def test_a_device_named_by_itself_is_skipped() -> None:
    """`/dev/zero` has no end."""
    (file,) = find_files([Path("/dev/zero")])
    assert isinstance(file, File)
    assert examine(file) == Skipped("zero", "not a regular file")


async def test_a_name_that_is_no_text_is_skipped(gateway: SmallGateway, tmp_path: Path) -> None:
    """File names are bytes; one that is not UTF-8 goes into no JSON, with or without a heading to take its place."""
    for text in ("# Bear\n", "no heading\n"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xe4r.md")).write_text(text)
        (tmp_path / "good.md").write_text("good\n")
        report = await run(gateway, tmp_path, again=True)
        assert report.skipped == [Skipped("b\\udce4r.md", "its name is not UTF-8: rename it")]
        assert [item.name for item in report.indexed] == ["good.md"]


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("# The title\n\ntext", "The title"),
        ("## Closed ##\n", "Closed"),
        ("intro\n\n# Later\n", "Later"),
        ("Underlined\n==========\n", "Underlined"),
        ("```\n# a comment in code\n```\n# Real\n", "Real"),
        ("no heading at all", "my file"),
        ("#hashtag is none", "my file"),
    ],
)
def test_the_title_is_the_first_heading_or_the_files_name(text: str, title: str) -> None:
    """Sources are shown by title."""
    assert title_of(text, Path("my_file.md")) == title


@given(st.integers(400, 599), st.text(max_size=5), st.integers(0, 10_000))
@example(503, "7", 0)
@example(429, "nan", 0)
@example(503, "-1", 3)
def test_only_429_and_503_are_sent_again_after_a_bounded_wait(status: int, header: str, failures: int) -> None:
    """Whatever Retry-After says, the wait is neither nothing nor for ever."""
    wait_s = decide_wait_s(status, {"retry-after": header}, failures)
    assert (wait_s is None) == (status not in {429, 503})
    assert wait_s is None or 0 < wait_s <= RETRY_CAP_S


def test_retry_after_is_obeyed() -> None:
    """The gateway knows best."""
    assert decide_wait_s(503, {"retry-after": "7"}, 0) == 7


@given(st.integers(0, 10**9))
def test_polling_slows_down_while_nothing_ends(idle_polls: int) -> None:
    """Quick for a quick job, twice a second for a slow one."""
    assert 0 < next_poll_s(idle_polls) <= 0.5


def test_lines_about_files_read_well() -> None:
    """Singular, plural, reasons."""
    assert describe(Indexed("a.md", "a.md", 1)) == "indexed  a.md  (1 chunk)"
    assert describe(Indexed("a.pdf", "a.pdf", 2, "page 3 is torn")) == "indexed  a.pdf  (2 chunks; page 3 is torn)"
    assert describe(Unchanged("a.md", "a.md", 2)) == "is there  a.md  (2 chunks)"
    assert describe(Skipped("b", "empty", is_fault=False)) == "skipped  b  (empty)"
    assert describe(Skipped("b", "no PDF")) == "failed   b  (no PDF)"
    assert summary(Report()) == ["0 documents indexed (0 chunks)"]


def test_the_summary_ends_with_every_file_that_failed() -> None:
    """Among a thousand lines they would be overlooked; what merely lay there is counted by its kind."""
    report = Report()
    for number in range(20):
        report.add(Skipped(f"{number}.png", "not a kind of file that is read (.png)", is_fault=False))
    report.add(Skipped("scan.pdf", "holds no text"))
    report.add(Unchanged("a.md", "a.md", 2))
    report.add(Indexed("b.md", "b.md", 1))
    assert summary(report) == [
        "left out 20 files: not a kind of file that is read (.png)",
        "1 file could not be indexed:",
        "  scan.pdf: holds no text",
        "1 document indexed (1 chunk), 1 there already, 21 skipped",
    ]

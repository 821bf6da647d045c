"""Reading in another process: what a file does there stays there."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest

from gateway.extractor import Extractor
from gateway.formats import Text, Unreadable
from tests.cli.conftest import clean_environment, lives
from tests.conftest import wait_until
from tests.pdfs import bomb, pdf, words

MIB = 1 << 20


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.pdf"
    path.write_bytes(pdf(words("Turn the key.")))
    return path


def text(path: Path, words: str) -> Text:
    """Return what the reading of a file comes to."""
    return Text(words, digest=hashlib.sha256(path.read_bytes()).hexdigest())


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that live."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if lives(int(child))]


async def test_one_process_reads_many_files(good: Path, tmp_path: Path) -> None:
    """To start one for each would cost more than most files."""
    (tmp_path / "page.html").write_text("<p>Turn it.")
    before = children(os.getpid())
    async with Extractor(1) as extractor:
        assert await extractor.read(good, "pdf") == text(good, "Turn the key.")
        started = [pid for pid in children(os.getpid()) if pid not in before]
        assert await extractor.read(tmp_path / "page.html", "html") == text(tmp_path / "page.html", "Turn it.")
        with pytest.raises(Unreadable, match="cannot be read: No such file"):
            await extractor.read(tmp_path / "gone.html", "html")
        assert await extractor.read(good, "pdf") == text(good, "Turn the key.")
        assert [pid for pid in children(os.getpid()) if pid not in before] == started
    assert not any(lives(pid) for pid in started)


async def test_a_file_that_needs_too_much_memory_harms_no_other(good: Path, tmp_path: Path) -> None:
    """A few kilobytes that unpack to a quarter of a gigabyte end their reader, and nothing else."""
    (tmp_path / "bomb.pdf").write_bytes(bomb(256))
    async with Extractor(1, memory_bytes=200 * MIB) as extractor:
        with pytest.raises(Unreadable, match="needs more than 200 MiB of memory"):
            await extractor.read(tmp_path / "bomb.pdf", "pdf")
        assert await extractor.read(good, "pdf") == text(good, "Turn the key.")


async def test_a_file_that_takes_too_long_harms_no_other(good: Path, tmp_path: Path) -> None:
    """The kernel ends it by the processor time that it used, however busy the machine is."""
    (tmp_path / "deep.html").write_text("<div>" * 200_000 + "x")  # takes the square of its depth, half a minute or more
    async with Extractor(1, cpu_s=0.5) as extractor:
        with pytest.raises(Unreadable, match=r"takes more than 0\.5 s of computing"):
            await extractor.read(tmp_path / "deep.html", "html")
        assert await extractor.read(good, "pdf") == text(good, "Turn the key.")


async def test_a_reader_that_dies_of_an_earlier_file_reads_once_more(good: Path) -> None:
    """What the files before left behind is not this one's fault."""
    before = children(os.getpid())
    async with Extractor(1) as extractor:
        await extractor.read(good, "pdf")
        (pid,) = (pid for pid in children(os.getpid()) if pid not in before)
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: not lives(pid))
        assert await extractor.read(good, "pdf") == text(good, "Turn the key.")


async def test_a_cancelled_reading_leaves_no_answer_behind(good: Path, tmp_path: Path) -> None:
    """The next file must not get the text of the one before."""
    (tmp_path / "deep.html").write_text("<div>" * 200_000 + "x")
    async with Extractor(1) as extractor:
        await extractor.read(good, "pdf")
        reading = asyncio.create_task(extractor.read(tmp_path / "deep.html", "html"))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait({reading})
        assert await extractor.read(good, "pdf") == text(good, "Turn the key.")


async def test_readers_do_not_outlive_who_started_them(tmp_path: Path) -> None:
    """Not even in the middle of a file: it keeps its own time."""
    (tmp_path / "deep.html").write_text("<div>" * 200_000 + "x")
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from gateway.extractor import Extractor\n"
        "async def main():\n"
        "    async with Extractor(1, cpu_s=1) as extractor:\n"
        "        await extractor.read(Path(sys.argv[1]), 'html')\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path / "deep.html"), env=clean_environment()
    )
    await wait_until(lambda: children(parent.pid))
    started = children(parent.pid)
    parent.kill()
    await parent.wait()
    await wait_until(lambda: not any(lives(pid) for pid in started))

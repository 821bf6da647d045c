"""Fifty questions, as users would ask them, to the docstrings of Python's standard library.

The questions do not name their module. They were written before the engine, and are not to be changed to suit it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.settings import RetrieverSettings, Settings
from tests.retrieval.stdlib_docs import documents, write
from tests.stages.conftest import NewJob, Pipe

QUESTIONS = [json.loads(line) for line in (Path(__file__).parent / "questions.jsonl").read_text().splitlines()]
ENOUGH = 40
BATCH = 16


@cache
def pages() -> dict[str, str]:
    return dict(documents())


async def test_right_document_is_among_the_first_five_sources(tmp_path: Path, new_job: NewJob) -> None:
    """At least forty of fifty questions find the module that answers them, among more than a thousand chunks."""
    pipe = Pipe(Settings(retriever=RetrieverSettings(path=tmp_path)))
    await pipe.start()
    jobs = [new_job("document", document_id=name, title=name, text=text) for name, text in pages().items()]
    for start in range(0, len(jobs), BATCH):
        await pipe.run(*jobs[start : start + BATCH])
    assert await pipe.retriever.chunks() >= 1_000
    answers = await pipe.run(*(new_job("query", query=item["question"], top_k=5) for item in QUESTIONS))
    await pipe.stop()
    missed = [item for item, answer in zip(QUESTIONS, answers, strict=True) if not _is_found(item, answer)]
    assert len(QUESTIONS) - len(missed) >= ENOUGH, missed
    print(f"{len(QUESTIONS) - len(missed)} of {len(QUESTIONS)} found; missed {[item['document'] for item in missed]}")


def _is_found(item: dict[str, str], answer: dict[str, Any]) -> bool:
    return item["document"] in [source["document"] for source in answer["sources"]]


def test_questions_do_not_name_their_module() -> None:
    """Fifty different modules, none of whose names, nor any part of a dotted one, stands in its question."""
    assert len({item["document"] for item in QUESTIONS}) == len(QUESTIONS) == 50
    for item in QUESTIONS:
        for name in item["document"].split("."):
            assert name not in item["question"].lower(), item


def test_document_set_is_the_same_every_time(tmp_path: Path) -> None:
    """Two runs write the same files, and the answer to every question is among them."""
    assert write(tmp_path) == len(pages())
    assert {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == pages()
    assert {item["document"] for item in QUESTIONS} <= set(pages())

"""Words and meaning together: what either way alone misses, both find.

The dense model is a small one that can be read: it knows a few things under all their names, and nothing else. As
large ones do, it takes one error code for another. It is asked over HTTP, and both stores of an index are tried.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import AsyncQdrantClient

from pipeline.settings import EncoderSettings, RetrieverSettings, Settings
from stages.qdrant_server import ServerStore
from stages.vectors import KeywordModel, models
from tests.stages.conftest import NewJob, Pipe
from tests.stages.embeddings import EmbeddingsFake, embeddings_server

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")

THINGS = [
    {"car", "cars", "automobile", "vehicle", "driving"},
    {"doctor", "physician", "medical", "clinic"},
    {"salary", "wages", "paid", "earnings"},
    {"holiday", "vacation", "leave", "absence"},
    {"dismissed", "fired", "termination", "notice"},
    {"laptop", "notebook", "computer"},
    {"broken", "defective", "faulty", "damaged"},
    {"food", "meals", "canteen", "lunch", "eat"},
    {"kids", "children", "nursery", "childcare"},
    {"error", "code"},
]

PARAPHRASES = {
    "fleet": ("Company automobile: the fleet office hands over every vehicle.", "Where do I get cars for driving?"),
    "health": ("The site physician sees staff daily; medical files stay private.", "When may I visit a doctor?"),
    "payroll": ("Wages arrive by bank transfer; earnings statements follow.", "How is my salary paid?"),
    "absence": ("Annual leave: ask for absence three weeks ahead.", "How early must I book a vacation?"),
    "contract": ("Termination: notice runs to the end of a quarter.", "What if I am fired or dismissed?"),
    "devices": ("A defective notebook is replaced by the service desk.", "My laptop is broken, who helps?"),
    "canteen": ("The canteen serves hot meals until two.", "Where can we eat lunch?"),
    "family": ("The nursery on the ground floor takes children from age one.", "Who looks after my kids?"),
}
"""Document: its text, and a question that has no word of it."""

CODES = {f"code-{code.lower()}": (f"Error {code}: {what}.", f"What does error {code} mean?") for code, what in {
    "E4011": "the valve did not open", "E4012": "the pump ran dry", "E4013": "the filter is clogged",
    "E4014": "the belt has slipped", "E4015": "the tank overflows", "E4016": "the motor is too hot",
    "E4017": "the sensor is silent", "E4018": "the door stands open",
}.items()}  # fmt: skip
"""Document: its text, and a question that names its code."""


def things_in(text: str) -> list[float]:
    """Return how often *text* speaks of each thing; a code is a code to it, whichever it is."""
    found = re.findall(r"[a-z]+", text.lower())
    counts = [float(sum(word in names for word in found)) for names in THINGS]
    counts[-1] += len(re.findall(r"\bE\d{4}\b", text))
    return [*counts, 0.1]  # nothing known is no zero vector


@pytest.fixture
async def server() -> AsyncIterator[EmbeddingsFake]:
    async with embeddings_server(things_in) as fake:
        yield fake


def ways(url: str) -> dict[str, EncoderSettings]:
    dense: dict[str, Any] = {"embeddings_url": url, "embeddings_model": "things"}
    return {
        "words": EncoderSettings(),
        "meaning": EncoderSettings(keywords=False, **dense),
        "both": EncoderSettings(**dense),
    }


def test_paraphrases_share_no_word_with_their_documents() -> None:
    """Nor any stem, as BM25 sees them: what finds them is not their words."""
    model = KeywordModel("english")
    for text, question in PARAPHRASES.values():
        assert not set(model.query_vector(question).indices) & set(model.passage_vector(text).indices), question


@pytest.mark.parametrize("backend", ["embedded", "server"])
async def test_words_and_meaning_together_find_what_either_alone_misses(
    server: EmbeddingsFake, backend: str, tmp_path: Path, new_job: NewJob
) -> None:
    """BM25 alone finds none of eight paraphrases, meaning alone few of eight error codes; both find them all."""
    found: dict[str, tuple[int, int]] = {}
    for way, encoder in ways(server.url).items():
        settings = Settings(encoder=encoder, retriever=RetrieverSettings(path=tmp_path / way))
        pipe = Pipe(settings)
        if backend == "server":
            pipe.retriever._store = ServerStore(AsyncQdrantClient(":memory:"), "http://test", way, models(encoder))
        await pipe.start()
        texts = {name: text for name, (text, _) in (PARAPHRASES | CODES).items()}
        await pipe.run(*(new_job("document", document_id=name, title="Handbook", text=texts[name]) for name in texts))
        found[way] = (await _found(pipe, new_job, PARAPHRASES), await _found(pipe, new_job, CODES))
        await pipe.stop()
    print(found)
    assert found["words"] == (0, 8)
    assert found["meaning"][0] == 8
    assert found["meaning"][1] <= 4
    assert found["both"] == (8, 8)


async def _found(pipe: Pipe, new_job: NewJob, questions: dict[str, tuple[str, str]]) -> int:
    """Return for how many of *questions* the right document is among the first two sources."""
    answers = await pipe.run(*(new_job("query", query=question, top_k=2) for _, question in questions.values()))
    return sum(
        name in [source["document"] for source in answer["sources"]]
        for name, answer in zip(questions, answers, strict=True)
    )

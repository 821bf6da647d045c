"""The encoder stage: questions become vectors, documents become chunks with a vector each.

Encoding is written as functions of (text, model) and nothing else, so that a cache fits in front of them. A question
takes microseconds and is encoded at once; a document is cut and encoded in one thread, so that the event loop goes on.
The vectors travel beside the envelope (`stages.vectors`), the chunks' texts inside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.errors import Reject
from pipeline.job import Done, Job
from pipeline.settings import EncoderSettings, Settings
from pipeline.stage import Context, Outcome, Stage
from stages.chunks import Chunk, Chunker, opening
from stages.tokens import TokenCount, token_count
from stages.vectors import KeywordModel, Sparse, pack


def encode_query(text: str, model: KeywordModel) -> Sparse:
    """Return the vector that finds passages answering *text*."""
    return model.query_vector(text)


def encode_passage(text: str, model: KeywordModel) -> Sparse:
    """Return the vector under which the passage *text* is found."""
    return model.passage_vector(text)


def passage(title: str, opening: str, chunk: Chunk) -> str:
    """Return the text a chunk is found by: what its document is about stands around its own words.

    Args:
        opening: how the document begins, for the chunks that do not hold it; see `stages.chunks.opening`.
    """
    return "\n".join(part for part in (title, chunk.heading, chunk.text, opening) if part)


class Encoder(Stage):
    """Encodes questions and documents."""

    name = "encoder"

    def __init__(self, settings: EncoderSettings, count: TokenCount) -> None:
        """Load the model.

        Args:
            count: the token count of the prompt that the chunks will stand in.
        Raises:
            ConfigError: the language is unknown.
        """
        self.slots = settings.slots
        self.batch = settings.batch
        self._max_chunks = settings.max_chunks
        self._chunker = Chunker(count, settings.chunk_tokens, settings.overlap_tokens)
        self._model = KeywordModel(settings.language)
        self._thread: ThreadPoolExecutor | None = None

    async def start(self, context: Context) -> None:
        """Start the thread that cuts documents."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    async def handle_batch(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        """Encode questions at once, documents in the thread; a document's failure is its own."""
        if all(job.flow != "document" for job in jobs):
            return [self._encode_question(job) for job in jobs]  # without a task for each
        return await asyncio.gather(*(self.handle(job) for job in jobs), return_exceptions=True)  # type: ignore[return-value]  # cancellation is raised, not returned

    async def handle(self, job: Job) -> Done:
        """Encode one question or one document."""
        if job.flow != "document":
            return self._encode_question(job)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode_document, job)

    def _encode_question(self, job: Job) -> Done:
        vector = encode_query(job.payload["query"], self._model)
        return Done({}, vector=pack({self._model.name: [vector]}))

    def _encode_document(self, job: Job) -> Done:
        text, title, name = job.payload["text"], job.payload.get("title", ""), job.payload["document_id"]
        chunks = self._chunker.cut(text, name)
        if not chunks:
            raise Reject("the document holds nothing but white space", code="document_empty")
        if len(chunks) > self._max_chunks:
            raise self._too_long(len(chunks))
        # The first chunk holds the opening itself.
        about = [""] + [opening(text)] * (len(chunks) - 1)
        passages = [passage(title or name, *parts) for parts in zip(about, chunks, strict=True)]
        vectors = [encode_passage(text, self._model) for text in passages]
        found = [{"text": chunk.text, "heading": chunk.heading} for chunk in chunks]
        return Done({"chunks": found}, vector=pack({self._model.name: vectors}))

    def _too_long(self, chunks: int) -> Reject:
        message = f"the document makes {chunks} chunks, and {self._max_chunks} are allowed: split it into several"
        return Reject(message, code="document_too_long")

    async def stop(self) -> None:
        """End the thread; what it has not begun is dropped and belongs to jobs that were cancelled."""
        if self._thread:
            self._thread.shutdown(wait=False, cancel_futures=True)


def build(settings: Settings) -> Stage:
    """Return the stage as *settings* say."""
    return Encoder(settings.encoder, token_count(settings.retriever.tokenizer))

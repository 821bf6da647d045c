"""The encoder stage: questions become vectors, documents become chunks with a vector each.

A vector is a function of (text, model) and nothing else, so that a cache fits in front. By words (BM25), a question
takes microseconds and is encoded at once; a document is cut and encoded in one thread, so that the event loop goes
on. By meaning, an embedder makes the vectors (`stages.embedders`), which takes as long as it takes: then each job is
handled by itself, so that none waits for another, and the embedder gathers their texts.
The vectors travel beside the envelope (`stages.vectors`), the chunks' texts inside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pipeline.errors import Reject
from pipeline.job import Done, Job, Json
from pipeline.settings import EncoderSettings, Settings
from pipeline.stage import Context, Outcome, Stage
from stages.chunks import Chunk, Chunker, opening
from stages.tokens import TokenCount, token_count
from stages.vectors import Dense, KeywordModel, Models, Sparse, models, pack

if TYPE_CHECKING:
    from stages.embedders import Embedder


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

    def __init__(
        self, settings: EncoderSettings, models: Models, count: TokenCount, embedder: Embedder | None = None
    ) -> None:
        """Load the model of words; the embedder is started later.

        Args:
            models: what *settings* and *embedder* encode with.
            count: the token count of the prompt that the chunks will stand in.
            embedder: makes the dense vectors; None where there are none to make.
        Raises:
            ConfigError: the language is unknown.
        """
        self.slots = settings.slots
        self.batch = 1 if embedder else settings.batch
        self._max_chunks = settings.max_chunks
        self._chunker = Chunker(count, settings.chunk_tokens, settings.overlap_tokens)
        self._model = KeywordModel(settings.language) if settings.keywords else None
        self._models = models
        self._embedder = embedder
        self._thread: ThreadPoolExecutor | None = None

    async def start(self, context: Context) -> None:
        """Start the thread that cuts documents, and the embedder.

        Raises:
            ConfigError: the embedder cannot ever work like this.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        if self._embedder:
            await self._embedder.start()

    async def handle_batch(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        """Encode questions at once, documents in the thread; a document's failure is its own."""
        if self._embedder is None and all(job.flow != "document" for job in jobs):
            return [self._encode_question(job) for job in jobs]  # without a task for each
        return await asyncio.gather(*(self.handle(job) for job in jobs), return_exceptions=True)  # type: ignore[return-value]  # cancellation is raised, not returned

    async def handle(self, job: Job) -> Done:
        """Encode one question or one document."""
        if job.flow != "document":
            if self._embedder is None:
                return self._encode_question(job)
            return self._encode_question(job, await self._embedder.embed_question(job.payload["query"]))
        in_thread = asyncio.get_running_loop().run_in_executor
        chunks, passages, words = await in_thread(self._thread, self._cut, job)
        dense = await self._embedder.embed_passages(passages) if self._embedder else None
        return Done({"chunks": chunks}, vector=self._packed(words, dense))

    def _encode_question(self, job: Job, dense: Dense | None = None) -> Done:
        words = [encode_query(job.payload["query"], self._model)] if self._model else None
        return Done({}, vector=self._packed(words, [dense] if dense else None))

    def _cut(self, job: Job) -> tuple[list[Json], list[str], list[Sparse] | None]:
        """Return a document's chunks, the texts they are found by, and, by words, the vectors of these."""
        text, title, name = job.payload["text"], job.payload.get("title", ""), job.payload["document_id"]
        chunks = self._chunker.cut(text, name)
        if not chunks:
            raise Reject("the document holds nothing but white space", code="document_empty")
        if len(chunks) > self._max_chunks:
            raise self._too_long(len(chunks))
        # The first chunk holds the opening itself.
        about = [""] + [opening(text)] * (len(chunks) - 1)
        passages = [passage(title or name, *parts) for parts in zip(about, chunks, strict=True)]
        model = self._model
        vectors = [encode_passage(text, model) for text in passages] if model else None
        return [{"text": chunk.text, "heading": chunk.heading} for chunk in chunks], passages, vectors

    def _packed(self, words: Sequence[Sparse] | None, dense: Sequence[Dense] | None) -> bytes:
        encoded: dict[str, Sequence[Sparse] | Sequence[Dense]] = {}
        if words is not None and self._models.keywords:
            encoded[self._models.keywords] = words
        if dense is not None and self._models.dense:
            encoded[self._models.dense] = dense
        return pack(encoded)

    def _too_long(self, chunks: int) -> Reject:
        message = f"the document makes {chunks} chunks, and {self._max_chunks} are allowed: split it into several"
        return Reject(message, code="document_too_long")

    async def stop(self) -> None:
        """End the thread and the embedder; what is not begun is dropped and belongs to jobs that were cancelled."""
        if self._thread:
            self._thread.shutdown(wait=False, cancel_futures=True)
        if self._embedder:
            await self._embedder.stop()


def build(settings: Settings) -> Stage:
    """Return the stage as *settings* say.

    Raises:
        ConfigError: they cannot work.
    """
    names, embedder = models(settings.encoder), None
    if names.dense:
        from stages.embedders import embedder as new_embedder  # brings an HTTP client, which BM25 alone does not need

        embedder = new_embedder(settings.encoder)
    return Encoder(settings.encoder, names, token_count(settings.retriever.tokenizer), embedder)

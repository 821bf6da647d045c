"""Dense vectors: who makes them, and how texts travel there together.

Two kinds of model: a server that speaks OpenAI's `/v1/embeddings` (`EmbeddingsServer`), and sentence-transformers in
this process (`LocalModel`). In front of either stands an `Embedder`. It gathers texts: what comes while calls are under
way travels together in the next one, so that calls grow with the load by themselves. Questions go before chunks, and a
place for a call is kept for either, so that no question waits behind a long document, and no document for ever.

Where a server refuses a call that brings texts of several jobs, its halves are asked for: one text that cannot be
embedded must not fail the others.

    what came                                      code                             consequence
    a vector for each text                                                          done
    429; 503 with Retry-After or known to be busy  embeddings_busy                  again, uncharged
    no connection                                  embeddings_unreachable           again, uncharged
    nothing within embeddings_timeout_s            embeddings_timeout               again, charged
    400, 409, 413, 422, other 4xx                  embeddings_refused               the job fails
    401, 402, 403, 407                             embeddings_refused_credentials   again, charged
    404, 405, 501, any 1xx or 3xx                  embeddings_misconfigured         again, charged
    408, 425, other 5xx; the connection ended      embeddings_error                 again, charged
    2xx with anything else                         bad_embeddings                   again, charged
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Protocol

import orjson
from prometheus_client import Counter, Histogram

from pipeline.clock import monotonic_us
from pipeline.errors import ConfigError, PenstockError, Reject, RetryLater
from pipeline.job import new_id
from stages.http import BrokenAnswer, HungUp, Pool, Response, Target, Unreachable
from stages.openai_protocol import complaint_of, endpoint, is_loading, retry_after_s, shorten
from stages.vectors import Dense, dense, is_finite

if TYPE_CHECKING:
    from pipeline.settings import EncoderSettings

MAX_ANSWER_BYTES: Final = 256 << 20
"""Above 2,048 vectors of 8,192 dimensions as JSON numbers; a server that sends more has gone wrong."""

CONNECT_TIMEOUT_S: Final = 2.0
KEEP_ALIVE_S: Final = 4.0
"""Below the 5 s after which uvicorn (vLLM) and cpp-httplib (llama.cpp) close an idle connection."""

LOCAL_CALLS: Final = 2
"""One is computed, and one of questions may wait behind it: a model in this process does one thing at a time."""

CALLS = Counter(
    "penstock_embedding_calls", "Calls for dense vectors by outcome: ok, cancelled, or the failure's code", ["outcome"]
)
CALL_SECONDS = Histogram(
    "penstock_embedding_call_seconds",
    "From asking for dense vectors to having them, or none",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
TEXTS = Counter("penstock_embedded_texts", "Questions and chunks that got a dense vector", ["kind"])


class DenseModel(Protocol):
    """Makes dense vectors out of texts."""

    async def start(self) -> None:
        """Get ready.

        Raises:
            ConfigError: it cannot ever work like this.
        """

    async def encode(self, texts: Sequence[str], *, is_question: bool) -> Sequence[Dense]:
        """Return one vector per text, in order, all of one length.

        Raises:
            Reject: one of these texts cannot ever be encoded.
            RetryLater: not now.
        """

    async def stop(self) -> None:
        """Let go of what `start` took."""


def embedder(settings: EncoderSettings) -> Embedder | None:
    """Return what makes dense vectors according to *settings*, None where they ask for none.

    Raises:
        ConfigError: the address or the key cannot be used.
    """
    if settings.embeddings_url:
        return Embedder(EmbeddingsServer(settings), settings, settings.embeddings_calls)
    if settings.sentence_transformer:
        return Embedder(LocalModel(settings), settings, LOCAL_CALLS)
    return None


# --- Gathering -----------------------------------------------------------------------------------


class _Order:
    """The texts of one job, and who waits for their vectors."""

    __slots__ = ("_left", "_vectors", "done", "texts")

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.done: asyncio.Future[list[Dense]] = asyncio.get_running_loop().create_future()
        self._vectors: list[Dense | None] = [None] * len(texts)
        self._left = len(texts)

    def deliver(self, number: int, vector: Dense) -> None:
        self._vectors[number] = vector
        self._left -= 1
        if not self._left and not self.done.done():
            self.done.set_result([vector for vector in self._vectors if vector is not None])

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


_Item = tuple[_Order, int]


class Embedder:
    """Embeds texts through a model, gathered into calls."""

    def __init__(self, model: DenseModel, settings: EncoderSettings, calls: int) -> None:
        """Prepare; nothing is started yet.

        Args:
            calls: under way at once at most, 2 or more; one of them is kept for questions, one for chunks.
        """
        self._model = model
        self._settings = settings
        self._calls = calls
        self._questions: deque[_Item] = deque()
        self._passages: deque[_Item] = deque()
        self._under_way: dict[asyncio.Task[None], bool] = {}  # whether of questions

    async def start(self) -> None:
        """Get the model ready.

        Raises:
            ConfigError: it cannot ever work like this.
        """
        await self._model.start()

    async def embed_question(self, text: str) -> Dense:
        """Return the vector that finds passages answering *text*.

        Raises:
            Reject, RetryLater: there is none, or none for now.
        """
        [vector] = await self._embed([self._settings.query_prefix + text], self._questions)
        return vector

    async def embed_passages(self, texts: Sequence[str]) -> list[Dense]:
        """Return the vectors under which *texts* are found, in order.

        Raises:
            Reject, RetryLater: there are none, or none for now.
        """
        return await self._embed([self._settings.passage_prefix + text for text in texts], self._passages)

    async def stop(self) -> None:
        """End the calls under way; whoever waits is cancelled."""
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        for queue in (self._questions, self._passages):
            while queue:
                queue.popleft()[0].done.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._model.stop()

    async def _embed(self, texts: Sequence[str], queue: deque[_Item]) -> list[Dense]:
        order = _Order(texts)
        queue.extend((order, number) for number in range(len(texts)))
        self._start_calls()
        vectors = await order.done
        lengths = sorted({len(vector) for vector in vectors})
        if len(lengths) > 1:  # each call's were of one; packed together they would be cut at the wrong places
            message = f"the texts of one document got vectors of different lengths: {', '.join(map(str, lengths))}"
            raise RetryLater(message, code="bad_embeddings")
        return vectors

    def _start_calls(self) -> None:
        while (queue := self._whose_turn()) is not None:
            items = self._next(queue)
            if items:
                is_question = queue is self._questions
                task = asyncio.create_task(self._call(items, is_question=is_question), name="embed")
                self._under_way[task] = is_question
                task.add_done_callback(self._ended)

    def _whose_turn(self) -> deque[_Item] | None:
        """Return whose texts travel next: questions first, but each kind leaves the other one place at least."""
        most = self._calls - 1
        of_questions = sum(self._under_way.values())
        of_passages = len(self._under_way) - of_questions
        if of_questions + of_passages > most:
            return None
        if self._questions and (of_questions < most or not self._passages):
            return self._questions
        return self._passages if self._passages and of_passages < most else None

    def _next(self, queue: deque[_Item]) -> list[_Item]:
        """Take what is to travel now, without what nobody waits for any more."""
        items: list[_Item] = []
        while queue and len(items) < self._settings.embeddings_batch:
            item = queue.popleft()
            if not item[0].done.done():
                items.append(item)
        return items

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        if not task.cancelled():
            self._start_calls()

    async def _call(self, items: Sequence[_Item], *, is_question: bool) -> None:
        try:
            vectors = await self._counted([order.texts[number] for order, number in items], is_question=is_question)
        except asyncio.CancelledError:
            for order, _ in items:
                order.done.cancel()
            raise
        except Reject as error:
            await self._separate(items, error, is_question=is_question)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
            for order, _ in items:
                order.fail(error)
        else:
            for (order, number), vector in zip(items, vectors, strict=True):
                order.deliver(number, vector)

    async def _separate(self, items: Sequence[_Item], error: Reject, *, is_question: bool) -> None:
        """Fail the one job whose texts were refused; of several jobs' texts, find out whose it were."""
        if len({order for order, _ in items}) == 1:
            items[0][0].fail(error)
            return
        middle = len(items) // 2
        await self._call(items[:middle], is_question=is_question)
        await self._call(items[middle:], is_question=is_question)

    async def _counted(self, texts: Sequence[str], *, is_question: bool) -> Sequence[Dense]:
        began_us, outcome = monotonic_us(), "error"
        try:
            vectors = await self._model.encode(texts, is_question=is_question)
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except (Reject, RetryLater) as error:
            outcome = error.code
            raise
        finally:
            CALLS.labels(outcome).inc()
            CALL_SECONDS.observe((monotonic_us() - began_us) / 1e6)
        TEXTS.labels("question" if is_question else "chunk").inc(len(texts))
        return vectors

    def __repr__(self) -> str:
        waiting = len(self._questions) + len(self._passages)
        return f"<Embedder {self._model!r} waiting={waiting} under_way={len(self._under_way)}>"


# --- A server --------------------------------------------------------------------------------------


class BadEmbeddings(ValueError):
    """An answer that does not hold a vector for each text."""


class EmbeddingsServer:
    """A server that speaks OpenAI's `/v1/embeddings`."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._settings = settings
        self._request: dict[str, Any] = {"model": settings.embeddings_model, "encoding_format": "base64"}
        if settings.embeddings_dimensions:
            self._request["dimensions"] = settings.embeddings_dimensions
        self._target = _target(settings)
        self._pool: Pool | None = None

    async def start(self) -> None:
        """Open the pool; connections come with the first calls."""
        self._pool = Pool(
            connect_timeout_s=CONNECT_TIMEOUT_S, keep_alive_s=KEEP_ALIVE_S, max_answer_bytes=MAX_ANSWER_BYTES
        )

    async def stop(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.close()

    async def encode(self, texts: Sequence[str], *, is_question: bool) -> Sequence[Dense]:
        """Return one vector per text, in order, all of one length; what may be raised is told above."""
        limit_s = self._settings.embeddings_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                response = await self._post(orjson.dumps(self._request | {"input": texts}))
        except TimeoutError as error:
            message = f"the embeddings server gave no whole answer within {limit_s:g} s"
            raise RetryLater(message, code="embeddings_timeout") from error
        except Unreachable as error:
            message = f"the embeddings server cannot be reached: {shorten(str(error))}"
            raise RetryLater(message, code="embeddings_unreachable", charged=False) from error
        except HungUp as error:
            message = "the embeddings server closed the connection before it answered"
            raise RetryLater(message, code="embeddings_error") from error
        except BrokenAnswer as error:
            message = f"the embeddings server's answer is broken: {shorten(str(error))}"
            raise RetryLater(message, code="bad_embeddings") from error
        if not 200 <= response.status < 300:
            raise judge(response.status, response.headers, response.body)
        try:
            return read_vectors(response.body, len(texts), self._settings.embeddings_dimensions)
        except BadEmbeddings as error:
            message = f"the embeddings server's answer cannot be used: {error}"
            raise RetryLater(message, code="bad_embeddings") from error

    async def _post(self, body: bytes) -> Response:
        """Send the request; when its idle connection turns out to be dead, send it over a fresh one."""
        assert self._pool is not None
        request_id = new_id()
        try:
            return await self._pool.post(self._target, request_id, body)
        except HungUp as error:
            if not error.was_kept:
                raise
        return await self._pool.post(self._target, request_id, body, fresh=True)

    def __repr__(self) -> str:
        return f"<EmbeddingsServer {self._settings.embeddings_url} model={self._settings.embeddings_model!r}>"


def judge(status: int, headers: Mapping[str, str], body: bytes) -> PenstockError:
    """Return the error that follows from an answer that is no success.

    Args:
        headers: with names in lower case.
    """
    words = complaint_of(body)
    message = f"the embeddings server answered {status}" + (f": {words}" if words else "")
    after_s = retry_after_s(headers.get("retry-after"), headers.get("date"))
    if status in {401, 402, 403, 407}:
        # The server's own words are left out: some repeat parts of the key.
        message = f"the embeddings server refused our key ({status}): see PENSTOCK_ENCODER__EMBEDDINGS_API_KEY"
        return RetryLater(message, code="embeddings_refused_credentials")
    if status == 429 or (status == 503 and (after_s is not None or is_loading(body))):
        return RetryLater(message, code="embeddings_busy", after_s=after_s, charged=False)
    if status in {404, 405, 501} or status < 400:
        message += ": see PENSTOCK_ENCODER__EMBEDDINGS_URL and PENSTOCK_ENCODER__EMBEDDINGS_MODEL"
        return RetryLater(message, code="embeddings_misconfigured")
    if status in {408, 425} or status >= 500:
        return RetryLater(message, code="embeddings_error")
    return Reject(message, code="embeddings_refused")


def read_vectors(body: bytes, count: int, dimensions: int = 0) -> list[Dense]:
    """Return the *count* vectors in the body of a success, in the order of their texts.

    Args:
        dimensions: what was asked for, 0 where nothing was.
    Raises:
        BadEmbeddings: there is not one vector for each text, or one of them is none.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadEmbeddings("it is no JSON") from error
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise BadEmbeddings("it has no list `data` of objects")
    if len(data) != count:
        raise BadEmbeddings(f"it holds {len(data)} vectors for {count} texts")
    vectors: dict[int, Dense] = {}
    for place, item in enumerate(data):
        index = item.get("index", place)  # some servers leave it out and keep the order
        if type(index) is not int or not 0 <= index < count or index in vectors:
            raise BadEmbeddings(f"its `index` {index!r} is no text's, or one's that had a vector already")
        vectors[index] = _read_vector(item.get("embedding"))
    lengths = {len(vector) for vector in vectors.values()}
    if len(lengths) > 1:
        raise BadEmbeddings(f"its vectors have different lengths: {', '.join(map(str, sorted(lengths)))}")
    if dimensions and lengths != {dimensions}:
        raise BadEmbeddings(f"its vectors have {lengths.pop()} dimensions, and {dimensions} were asked for")
    return [vectors[number] for number in range(count)]


def _read_vector(value: object) -> Dense:
    """Read a vector in either form: servers that do not know base64 send numbers instead."""
    try:
        if isinstance(value, str):
            vector = dense(base64.b64decode(value, validate=True))
        else:
            vector = array("f", value) if isinstance(value, list) else array("f")
    except (binascii.Error, ValueError, TypeError, OverflowError) as error:
        raise BadEmbeddings(f"a vector cannot be read: {error}") from error
    if not vector:
        raise BadEmbeddings("a vector is missing or empty")
    if not is_finite(vector):
        raise BadEmbeddings("a vector holds what is no number")
    return vector


def _target(settings: EncoderSettings) -> Target:
    headers = {
        "content-type": "application/json",
        "accept": "application/json",
        "accept-encoding": "identity",  # vectors do not shrink
        "user-agent": "penstock",
    }
    if settings.embeddings_api_key is not None:
        key = settings.embeddings_api_key.get_secret_value()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("encoder.embeddings_api_key holds characters that no HTTP header can carry")
        headers["authorization"] = f"Bearer {key}"
    return Target.of(endpoint(settings.embeddings_url, "/embeddings"), headers)


# --- A model in this process -----------------------------------------------------------------------


class LocalModel:
    """A model of sentence-transformers, in a thread of this process."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._settings = settings
        self._model: Any = None
        self._thread: ThreadPoolExecutor | None = None

    async def start(self) -> None:
        """Load the model, from this machine only.

        Raises:
            ConfigError: the package is missing, or the model is.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dense-model")
        loop = asyncio.get_running_loop()
        self._model = await loop.run_in_executor(self._thread, load, self._settings.sentence_transformer)

    async def stop(self) -> None:
        """End the thread when the call in hand is over."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def encode(self, texts: Sequence[str], *, is_question: bool) -> Sequence[Dense]:
        """Return one vector per text, in order, all of one length."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, encode_with, self._model, texts, is_question
        )

    def __repr__(self) -> str:
        return f"<LocalModel {self._settings.sentence_transformer!r}>"


def load(name: str) -> Any:
    """Return the model that *name* names: a folder, or a model that was downloaded before. Nothing is downloaded.

    Raises:
        ConfigError: the package is missing, or the model is.
    """
    setting = f"encoder.sentence_transformer names {name}"
    try:
        from sentence_transformers import SentenceTransformer  # an optional extra, imported only when it is asked for
    except ImportError as error:
        message = f"{setting}, which needs an optional package: pip install 'penstock[sentence-transformers]'"
        raise ConfigError(message) from error
    try:
        return SentenceTransformer(name, local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"{setting}, which cannot be loaded from this machine, and nothing is downloaded at run time: name a "
            f"folder, or fetch it first (`hf download {name}`): {shorten(str(error))}"
        ) from error


def encode_with(model: Any, texts: Sequence[str], is_question: bool) -> list[Dense]:
    """Return one vector per text by a sentence-transformers *model*, in order.

    Models that tell questions from passages have a method for each (sentence-transformers 5); others have one for both.
    """
    method = getattr(model, "encode_query" if is_question else "encode_document", None) or model.encode
    rows = method(list(texts), show_progress_bar=False)
    vectors = [array("f", row.tolist()) for row in rows]
    if len(vectors) != len(texts) or not all(map(is_finite, vectors)):
        message = f"the model made {len(vectors)} vectors of {len(texts)} texts, or some that hold no numbers"
        raise RetryLater(message, code="bad_embeddings")
    return vectors

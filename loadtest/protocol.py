"""The OpenAI protocol as the mock replica speaks it: requests read and checked, answers and errors put into bytes.

Pure functions and values; the server (`mock.py`) owns connections and time. Tokens are counted as words and punctuation
marks (`extractive.count_tokens`), in `usage` and against `max_tokens` alike. Unknown fields are let through, as every
replica does; `temperature`, `seed`, `tools` and their like change nothing.
"""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from loadtest.embedding import embed, encode_base64
from loadtest.extractive import answer, count_tokens, split_tokens
from loadtest.schema import fill

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_MODEL = "mock"
DEFAULT_DIMENSIONS = 256
MAX_DIMENSIONS = 4096
MAX_INPUTS = 2048  # as OpenAI's own limit
MAX_IMAGES = 10  # likewise

JSON = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"


class ApiError(Exception):
    """A request that gets an error body. `param` names the field at fault, None when it is none in particular."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> bytes:
        """The body, in OpenAI's form."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer.

    Args:
        parts: its bytes in the order they leave; of a stream, the first at once, then one for each token.
        content_type: JSON or EVENTS.
        tokens: generated tokens, which take their time when a pace is set.
    """

    parts: list[bytes]
    content_type: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request to `/v1/chat/completions`; `text` is the answer it gets, before `max_tokens` cuts it."""

    model: str
    messages: list[dict[str, Any]]
    text: str
    stream: bool
    include_usage: bool
    max_tokens: int | None

    @property
    def asked(self) -> dict[str, object]:
        """What goes on record."""
        return {"model": self.model, "messages": self.messages, "stream": self.stream}

    def reply(self, reply_id: str, created: int) -> Reply:
        """Return the answer, plain or as server-sent events, as the request wished.

        Args:
            created: seconds since the epoch.
        """
        tokens = split_tokens(self.text)
        is_cut = self.max_tokens is not None and self.max_tokens < len(tokens)
        if is_cut:
            tokens = tokens[: self.max_tokens]
        finish = "length" if is_cut else "stop"
        prompt_tokens = sum(count_tokens(_text_of(message)) for message in self.messages)
        usage = _usage(prompt_tokens, len(tokens))
        if self.stream:
            return Reply(list(self._events(reply_id, created, tokens, finish, usage)), EVENTS, len(tokens))
        message = {"role": "assistant", "content": "".join(tokens), "refusal": None}
        body = {
            "id": reply_id,
            "object": "chat.completion",
            "created": created,
            "model": self.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
            "usage": usage,
            "system_fingerprint": "mock",
        }
        return Reply([orjson.dumps(body)], JSON, len(tokens))

    def _events(
        self, reply_id: str, created: int, tokens: list[str], finish: str, usage: dict[str, int]
    ) -> Iterator[bytes]:
        head = {
            "id": reply_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": self.model,
            "system_fingerprint": "mock",
        }
        # With include_usage every chunk has the field, null but in the last: so says OpenAI's reference.
        tail: dict[str, object] = {"usage": None} if self.include_usage else {}

        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return _event({**head, "choices": [choice], **tail})

        end = chunk({}, finish)
        if self.include_usage:
            end += _event({**head, "choices": [], "usage": usage})
        end += b"data: [DONE]\n\n"
        start = chunk({"role": "assistant", "content": ""})
        if not tokens:
            yield start + end
            return
        yield start
        for token in tokens[:-1]:
            yield chunk({"content": token})
        yield chunk({"content": tokens[-1]}) + end  # what ends the stream takes no token's time


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """A checked request to `/v1/embeddings`."""

    model: str
    inputs: list[str]
    dimensions: int
    as_base64: bool

    @property
    def asked(self) -> dict[str, object]:
        """What goes on record."""
        return {"model": self.model, "input": self.inputs}

    def reply(self, _reply_id: str, _created: int) -> Reply:
        """Return the vectors; no token is generated for them."""
        data = []
        for index, text in enumerate(self.inputs):
            vector = embed(text, self.dimensions)
            value: object = encode_base64(vector) if self.as_base64 else vector.tolist()
            data.append({"object": "embedding", "index": index, "embedding": value})
        tokens = sum(map(count_tokens, self.inputs))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Reply([orjson.dumps({"object": "list", "data": data, "model": self.model, "usage": usage})], JSON, 0)


@dataclass(frozen=True, slots=True)
class ImagesRequest:
    """A checked request to `/v1/images/generations`."""

    model: str
    prompt: str
    count: int

    @property
    def asked(self) -> dict[str, object]:
        """What goes on record."""
        return {"model": self.model, "prompt": self.prompt}

    def reply(self, _reply_id: str, created: int) -> Reply:
        """Return small images, one colour for each prompt; no token is generated for them."""
        data = [{"b64_json": base64.b64encode(paint(self.prompt)).decode()}] * self.count
        return Reply([orjson.dumps({"created": created, "data": data})], JSON, 0)


Request = ChatRequest | EmbeddingsRequest | ImagesRequest


def paint(prompt: str) -> bytes:
    """Return a PNG of 16 by 16 points, whose colour is taken from the prompt."""
    width = height = 16
    colour = zlib.crc32(prompt.encode()).to_bytes(4)[:3]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a colour, RGB
    rows = (b"\0" + colour * width) * height
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def read_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in *body*.

    Raises:
        ApiError: 400, not JSON or not an object.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return value


def read_chat(body: bytes) -> ChatRequest:
    """Return the chat request in *body*.

    Raises:
        ApiError: 400, a field is missing or has a wrong form; its name is in `param`.
    """
    fields = read_json(body)
    model = _read_model(fields)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "'messages' must be a list of at least one message.", param="messages")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(400, "A message must be an object with a 'role'.", param=f"messages.{n}.role")
        if not _is_content(message.get("content")):
            problem = "A message's 'content' must be text or a list of parts."
            raise ApiError(400, problem, param=f"messages.{n}.content")
    if fields.get("n") not in (None, 1):
        raise ApiError(400, "This replica gives one choice for each request.", param="n")
    stream = _read_flag(fields, "stream")
    options = fields.get("stream_options")
    if options is not None and not (stream and isinstance(options, dict)):
        raise ApiError(400, "'stream_options' is an object, and only for a stream.", param="stream_options")
    return ChatRequest(
        model=model,
        messages=messages,
        text=_answer_to(messages, fields.get("response_format")),
        stream=stream,
        include_usage=bool(options and options.get("include_usage")),
        max_tokens=_read_max_tokens(fields),
    )


def read_embeddings(body: bytes) -> EmbeddingsRequest:
    """Return the embeddings request in *body*; inputs given as token numbers become the text of these numbers.

    Raises:
        ApiError: 400, a field is missing or has a wrong form; its name is in `param`.
    """
    fields = read_json(body)
    model = _read_model(fields)
    given: Any = fields.get("input")
    inputs: list[Any] = given if isinstance(given, list) and not _is_tokens(given) else [given]
    if not inputs or len(inputs) > MAX_INPUTS:
        raise ApiError(400, f"'input' takes 1 to {MAX_INPUTS} texts.", param="input")
    texts = [" ".join(map(str, text)) if _is_tokens(text) else text for text in inputs]
    if not all(isinstance(text, str) and text for text in texts):
        raise ApiError(
            400, "'input' must be text, a list of texts or token numbers, none of them empty.", param="input"
        )
    dimensions = fields.get("dimensions")
    if dimensions is None:
        dimensions = DEFAULT_DIMENSIONS
    if not _is_count(dimensions) or dimensions > MAX_DIMENSIONS:
        raise ApiError(400, f"'dimensions' must be a whole number from 1 to {MAX_DIMENSIONS}.", param="dimensions")
    encoding = fields.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise ApiError(400, "'encoding_format' must be 'float' or 'base64'.", param="encoding_format")
    return EmbeddingsRequest(model, texts, dimensions, encoding == "base64")


def read_images(body: bytes) -> ImagesRequest:
    """Return the images request in *body*.

    Raises:
        ApiError: 400, a field is missing or has a wrong form; its name is in `param`.
    """
    fields = read_json(body)
    model = _read_model(fields) if "model" in fields else DEFAULT_MODEL
    prompt, count = fields.get("prompt"), 1 if fields.get("n") is None else fields["n"]
    if not isinstance(prompt, str) or not prompt:
        raise ApiError(400, "'prompt' must be text, and not empty.", param="prompt")
    if not _is_count(count) or count > MAX_IMAGES:
        raise ApiError(400, f"'n' must be a whole number from 1 to {MAX_IMAGES}.", param="n")
    if fields.get("response_format") not in (None, "b64_json"):
        raise ApiError(
            400, "'response_format' must be 'b64_json': this server keeps no files.", param="response_format"
        )
    return ImagesRequest(model, prompt, count)


def list_models(models: tuple[str, ...], created: int) -> bytes:
    """Return the body of `GET /v1/models`."""
    return orjson.dumps({"object": "list", "data": [_model(name, created) for name in models or (DEFAULT_MODEL,)]})


def one_model(name: str, models: tuple[str, ...], created: int) -> bytes:
    """Return the body of `GET /v1/models/{name}`.

    Raises:
        ApiError: 404, not one of *models*.
    """
    check_model(name, models)
    return orjson.dumps(_model(name, created))


def check_model(name: str, models: tuple[str, ...]) -> None:
    """Refuse a model that is not one of *models*; none given: any name is served.

    Raises:
        ApiError: 404, code `model_not_found`.
    """
    if models and name not in models:
        raise ApiError(404, f"The model {name!r} does not exist.", param="model", code="model_not_found")


def _model(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": "penstock"}


def _answer_to(messages: list[dict[str, Any]], wanted: Any) -> str:
    asked = next((message for message in reversed(messages) if message["role"] == "user"), messages[-1])
    text = answer(_text_of(asked))
    kind = "text" if wanted is None else wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return text
    if kind == "json_object":
        return orjson.dumps({"answer": text}).decode()
    if kind != "json_schema":
        raise ApiError(400, "'type' must be text, json_object or json_schema.", param="response_format.type")
    try:
        return orjson.dumps(fill(wanted["json_schema"].get("schema", {}), text)).decode()
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # a schema that is none fails in many ways
        problem = f"No answer can be made for this schema: {error}"
        raise ApiError(400, problem, param="response_format.json_schema") from None


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content or () if isinstance(part.get("text"), str))


def _is_content(content: Any) -> bool:
    # None: an assistant's message that only calls a tool has no text.
    return (
        content is None
        or isinstance(content, str)
        or (isinstance(content, list) and all(isinstance(part, dict) for part in content))
    )


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(token, int) for token in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _read_model(fields: dict[str, Any]) -> str:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise ApiError(400, "'model' must name a model.", param="model")
    return model


def _read_flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"'{name}' must be true or false.", param=name)
    return bool(value)


def _read_max_tokens(fields: dict[str, Any]) -> int | None:
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    value = fields.get(name)
    if value is not None and not _is_count(value):
        raise ApiError(400, f"'{name}' must be a whole number of at least 1.", param=name)
    return value


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def _event(value: dict[str, object]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"

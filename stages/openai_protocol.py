"""OpenAI's chat-completions protocol as replicas really speak it: what to send, what to make of what comes back.

Plain functions on values. Nothing here waits, and nothing here raises because of what a replica sent: every status
and every body becomes an `Answer` or a `Failure`, and a failure says what follows from it.

    status or body                                  code                          consequence   replica did its part
    2xx with text, or with an empty text            (an Answer)                                 yes
    2xx, refusal                                    model_refused                 reject        yes
    2xx, no text, cut off by a filter / by length   content_filtered / answer_cut_off  reject   yes
    2xx, tool calls and no text                     no_text                       charged       yes
    2xx, anything else (no JSON, no choices, ...)   bad_answer                    charged       no
    2xx, given up half-way (`error`, `abort`)       replica_error                 charged       no
    400, 409, 413, 422, other 4xx                   bad_request                   reject        yes
    any error that speaks of the context window     context_too_long              reject        yes
    404 or 400 that speaks of the model             model_not_found               reject        yes
    other 404, 405, 501, any 1xx or 3xx             replica_misconfigured         charged       no
    401, 402, 403, 407                              replica_refused_credentials   charged       no
    429; 503 with Retry-After or known to be busy   replica_busy                  uncharged     no
    408, 425, other 5xx                             replica_error                 charged       no

Why some of these:

- A *refusal* is the model's answer to this prompt: asking again costs and changes nothing. *Tool calls* without text
  were never asked for, so they are a stray sample of a healthy replica: another try often brings text.
- *No text and `length`*: a thinking model spent all its tokens before it began to answer. It would do so again.
- *An empty text* that ended by itself is an answer: the model had nothing to say.
- *Credentials* are the operator's business and another replica may accept ours, so it is tried elsewhere; but it is
  charged, because a wrong key should be seen as the outcome `failed` within seconds and not as `expired` a minute or
  a day later. The replica's own words are left out: OpenAI's repeat parts of the key.
- *Busy* without Retry-After is known by its words only for servers that say so while doing no work: llama.cpp loading
  its model and Ollama with a full queue. Any other 503 is an error answer.
- *A wrong address* (404 without a word of the model, a redirect) is not the sender's fault: another replica is tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import orjson
from msgspec import Struct

from pipeline.errors import Reject, RetryLater
from pipeline.job import Json

MAX_RETRY_AFTER_S: Final = 60.0
"""However long a replica asks us to stay away, it is asked again after this: the usual life of a query."""

MAX_MESSAGE_CHARS: Final = 300
"""Enough of a replica's own words to know what it means; some echo the whole prompt."""

MAX_MODEL_CHARS: Final = 256

Code = Literal[
    "answer_cut_off",
    "bad_answer",
    "bad_request",
    "connection_lost",
    "content_filtered",
    "context_too_long",
    "model_not_found",
    "model_refused",
    "no_text",
    "replica_busy",
    "replica_error",
    "replica_misconfigured",
    "replica_refused_credentials",
    "replica_timeout",
    "replica_unreachable",
]
Consequence = Literal["reject", "charged", "uncharged"]


class Answer(Struct, frozen=True):
    """What the model said.

    Attributes:
        model: the model's name as the replica gives it, else the one asked for.
        usage: token counts, None where the replica did not count.
        finish_reason: `stop`, `length`, ..., None where the replica did not say.
    """

    text: str
    model: str
    usage: Json | None = None
    finish_reason: str | None = None

    @property
    def tokens(self) -> int:
        """Completion tokens, 0 where the replica did not count."""
        return int((self.usage or {}).get("completion_tokens", 0))


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that brought no answer, and what follows from it.

    Attributes:
        message: for the sender of the job; may quote the replica, so it is not for the log.
        consequence: `reject` ends the job; `charged` and `uncharged` lead to another replica, then to a retry.
        after_s: the wait the replica asked for, in seconds.
        status: the HTTP status, None where none came.
        is_refused: the replica did not take the connection at all.
        is_healthy: the replica did its part, so this says nothing against it.
    """

    code: Code
    message: str
    consequence: Consequence = "charged"
    after_s: float | None = None
    status: int | None = None
    is_refused: bool = False
    is_healthy: bool = False

    def as_error(self) -> Reject | RetryLater:
        """Return the error that ends the handling of the job."""
        if self.consequence == "reject":
            return Reject(self.message, code=self.code)
        charged = self.consequence == "charged"
        return RetryLater(self.message, code=self.code, after_s=self.after_s, charged=charged)


Verdict = Answer | Failure


# --- What we send --------------------------------------------------------------------------------


def endpoint(base: str, path: str = "/chat/completions") -> str:
    """Return where to post, for a base address with or without its closing `/v1`."""
    base = base.rstrip("/")
    has_version = urlsplit(base).path.endswith("/v1")
    return base + (path if has_version else f"/v1{path}")


def encode_request(
    messages: Sequence[Json], *, model: str, max_tokens: int, temperature: float, response_format: Json | None = None
) -> bytes:
    """Return the body of a call that wants its answer in one piece.

    Args:
        response_format: the form that the answer must have, as the protocol spells it; None: any.
    """
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": False,
    }
    return orjson.dumps(body if response_format is None else body | {"response_format": response_format})


# --- What comes back -----------------------------------------------------------------------------


def read_response(status: int, headers: Mapping[str, str], body: bytes, *, asked_model: str) -> Verdict:
    """Judge a whole response.

    Args:
        headers: with names in lower case, or a mapping that does not care.
        asked_model: stands in where the answer does not name its model.
    """
    if 200 <= status < 300:
        return _read_answer(status, body, asked_model)
    complaint = _read_complaint(_parse(body), body)
    after_s = retry_after_s(headers.get("retry-after"), headers.get("date"))
    return _judge_error(status, complaint, after_s)


def complaint_of(body: bytes) -> str:
    """Return what an error body says, for people, on one line; empty where it says nothing."""
    return _read_complaint(_parse(body), body).message


def is_loading(body: bytes) -> bool:
    """Whether an error body is that of a server which does no work yet, or none more; see *Busy* above."""
    return _BUSY.search(_read_complaint(_parse(body), body).words) is not None


def retry_after_s(value: str | None, date: str | None = None, *, most_s: float = MAX_RETRY_AFTER_S) -> float | None:
    """Return the wait that a Retry-After header asks for, in seconds, at most *most_s*.

    Args:
        value: seconds or an HTTP date; None and anything else mean that no wait was asked for.
        date: the Date header of the same response. An HTTP date is read against it, so that neither machine's
            clock has to be right; without it an HTTP date means nothing.
    """
    if value is None:
        return None
    if _SECONDS.fullmatch(value.strip()):
        return min(float(value), most_s)
    until, now = _parse_date(value), _parse_date(date)
    if until is None or now is None:
        return None
    return min(max(0.0, (until - now).total_seconds()), most_s)


def shorten(text: str) -> str:
    """Return *text* on one line and at most `MAX_MESSAGE_CHARS` long."""
    line = " ".join(text[: 4 * MAX_MESSAGE_CHARS].split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 1] + "…"


_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

_CONTEXT = re.compile(
    r"context_length_exceeded|exceed_context_size_error"  # OpenAI's code; llama.cpp's type
    r"|maximum context length|maximum model length|model's context length"  # OpenAI, vLLM, SGLang
    r"|exceeds? (the )?(available |model's )?context|context window"  # llama.cpp, Ollama, llama-cpp-python
    r"|max_new_tokens` must be <=",  # TGI
    re.IGNORECASE,
)
_MODEL = re.compile(
    r"model_not_found|\bmodel\b.{0,200}?\b(not found|does not exist|doesn't exist)", re.IGNORECASE | re.DOTALL
)
_BUSY = re.compile(r"unavailable_error|loading model|server busy", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Complaint:
    """An error body: its message for people, and all its words for recognising it."""

    message: str
    words: str


def _judge_error(status: int, complaint: _Complaint, after_s: float | None) -> Failure:
    message = f"the replica answered {status}" + (f": {complaint.message}" if complaint.message else "")
    if status in {401, 402, 403, 407}:
        message = f"the replica refused our credentials ({status})"
        return Failure("replica_refused_credentials", message, status=status)
    if status == 429 or (status == 503 and (after_s is not None or _BUSY.search(complaint.words))):
        return Failure("replica_busy", message, "uncharged", after_s, status)
    if _CONTEXT.search(complaint.words):
        return Failure("context_too_long", message, "reject", status=status, is_healthy=True)
    if status in {400, 404} and _MODEL.search(complaint.words):
        return Failure("model_not_found", message, "reject", status=status, is_healthy=True)
    if status in {404, 405, 501} or status < 400:
        return Failure("replica_misconfigured", message, status=status)
    if status in {408, 425} or status >= 500:
        return Failure("replica_error", message, status=status)
    return Failure("bad_request", message, "reject", status=status, is_healthy=True)


def _read_answer(status: int, body: bytes, asked_model: str) -> Verdict:
    content = _parse(body)
    if not isinstance(content, dict):
        return Failure("bad_answer", "the replica's answer is not a JSON object", status=status)
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return _judge_without_choices(status, content, body)
    finish_reason = _short_text(choice.get("finish_reason"))
    if finish_reason in {"error", "abort"}:
        words = f"the replica gave up half-way (finish_reason {finish_reason})"
        return Failure("replica_error", words, status=status)
    given = choice.get("message")
    message: Json = given if isinstance(given, dict) else {"content": choice.get("text")}
    text = _text(message.get("content"))
    if text or (text == "" and not _is_unfinished(message, finish_reason)):
        model = _short_text(content.get("model")) or asked_model
        return Answer(text, model, _usage(content.get("usage")), finish_reason)
    return _judge_without_text(status, message, finish_reason)


def _judge_without_choices(status: int, content: Json, body: bytes) -> Failure:
    """Some servers and proxies answer 200 and put the error into the body (llama.cpp did, OpenRouter does)."""
    if not content.get("error"):
        return Failure("bad_answer", "the replica's answer has no choices", status=status)
    complaint = _read_complaint(content, body)
    message = f"the replica answered {status} with an error: {complaint.message}"
    if _CONTEXT.search(complaint.words):
        return Failure("context_too_long", message, "reject", status=status, is_healthy=True)
    return Failure("bad_answer", message, status=status)


def _judge_without_text(status: int, message: Json, finish_reason: str | None) -> Failure:
    refusal = _refusal(message)
    if refusal:
        words = f"the model refused: {shorten(refusal)}"
        return Failure("model_refused", words, "reject", status=status, is_healthy=True)
    if finish_reason == "content_filter":
        words = "the replica's content filter withheld the answer"
        return Failure("content_filtered", words, "reject", status=status, is_healthy=True)
    if finish_reason == "length":
        words = "the model used up its tokens before it began to answer; allow it more (max_tokens)"
        return Failure("answer_cut_off", words, "reject", status=status, is_healthy=True)
    if message.get("tool_calls") or message.get("function_call"):
        words = "the model called a tool that nobody offered, and said nothing"
        return Failure("no_text", words, status=status, is_healthy=True)
    return Failure("bad_answer", "the replica's answer holds no text", status=status)


def _is_unfinished(message: Json, finish_reason: str | None) -> bool:
    """Whether an empty text is no answer: it was refused, withheld, cut off, or replaced by a tool call."""
    calls = message.get("tool_calls") or message.get("function_call")
    return bool(calls or _refusal(message)) or finish_reason in {"content_filter", "length"}


def _text(content: object) -> str | None:
    """Return the text of a message's content, which is a string or a list of parts; None where it is neither."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [part if isinstance(part, str) else _part_text(part) for part in content]
    return "".join(text for text in texts if text is not None) if any(text is not None for text in texts) else None


def _part_text(part: object) -> str | None:
    if not isinstance(part, dict) or part.get("type") in {"thinking", "reasoning", "refusal"}:
        return None
    text = part.get("text")
    return text if isinstance(text, str) else None


def _refusal(message: Json) -> str | None:
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    for place in (message, *parts):
        refusal = place.get("refusal")
        if isinstance(refusal, str) and refusal:
            return refusal
    return None


_COUNTS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")
_DETAILS: Final = (("prompt_tokens_details", "cached_tokens"), ("completion_tokens_details", "reasoning_tokens"))


def _usage(usage: object) -> Json | None:
    """Keep the counts we know and that are counts: what a replica makes up must not reach the envelope."""
    if not isinstance(usage, dict):
        return None
    kept: Json = {name: usage[name] for name in _COUNTS if _is_count(usage.get(name))}
    for group, name in _DETAILS:
        details = usage.get(group)
        if isinstance(details, dict) and _is_count(details.get(name)):
            kept[group] = {name: details[name]}
    return kept or None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _short_text(value: object) -> str | None:
    return value[:MAX_MODEL_CHARS] if isinstance(value, str) and value else None


def _parse(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _read_complaint(content: object, body: bytes) -> _Complaint:
    """Find the message in the error bodies that are about.

    `{"error": {"message", "type", "code"}}` (OpenAI, vLLM, Ollama, llama.cpp), `{"object": "error", "message", ...}`
    (older vLLM, SGLang), `{"error": "text", "error_type"}` (TGI), `{"detail": "text" | [{"msg"}]}` (FastAPI), or plain
    text.
    """
    if not isinstance(content, dict):
        text = body[: 4 * MAX_MESSAGE_CHARS].decode(errors="replace").strip()
        text = "" if text.startswith("<") else shorten(text)  # a proxy's HTML page tells nobody anything
        return _Complaint(text, text)
    error = content.get("error")
    where: dict[str, Any] = error if isinstance(error, dict) else content
    message = error if isinstance(error, str) else where.get("message")
    if not isinstance(message, str):
        message = _detail(content.get("detail"))
    kinds = [str(where[name])[:MAX_MESSAGE_CHARS] for name in ("code", "type") if isinstance(where.get(name), str)]
    return _Complaint(shorten(message), " ".join([*kinds, message[: 16 * MAX_MESSAGE_CHARS]]))


def _detail(detail: object) -> str:
    if isinstance(detail, str):
        return detail
    if isinstance(detail, list):
        items = [item.get("msg") for item in detail if isinstance(item, dict)]
        return "; ".join(item for item in items if isinstance(item, str))
    return ""


def _parse_date(text: str | None) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text) if text else None
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment

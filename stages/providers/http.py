"""The provider that posts each delivery as JSON to a gateway of one's own.

The delivery's id goes along as `Idempotency-Key`, and the gateway promises to send a message once however often it is
told: so whatever is no clear refusal is tried again, doubts as well.

    2xx                        sent; `id` of the answer, if any, is how the gateway knows it
    401, 403                   `unauthorized`
    413                        `too_large`
    408, 425, 5xx              tried again
    429; 503 with Retry-After  tried again after that time, no attempt is charged
    any other 4xx, 3xx         `refused`, or what the answer says in `{"error": {"code": ...}}`
    409                        in doubt: the gateway is still busy with an earlier try
    502, 504                   in doubt: a proxy says it, of a gateway that may have the message
    no answer, or a broken one in doubt: the request was written, and perhaps read
"""

from __future__ import annotations

import asyncio
import base64
import re
from typing import TYPE_CHECKING, Any, ClassVar, Final

import orjson

from pipeline.errors import ConfigError, InDoubt, Reject, RetryLater
from stages.http import BrokenAnswer, HungUp, Pool, Response, Target, Unreachable
from stages.openai_protocol import retry_after_s
from stages.providers import LONGEST_AFTER_S, REFUSALS, TYPES, Outgoing, Provider, Sent, Type

if TYPE_CHECKING:
    from pipeline.settings import HttpProviderSettings, Settings

KEEP_ALIVE_S: Final = 4.0  # below the 5 s of most servers
MAX_ANSWER_BYTES: Final = 1 << 20

_CODE: Final = re.compile(r"[a-z][a-z0-9_]{0,39}")


def build(settings: Settings) -> Provider:
    """Return the provider.

    Raises:
        ConfigError: no gateway is named, or the key cannot be sent in a header.
    """
    own = settings.http_provider
    if not own.url:
        raise ConfigError("provider http: PENSTOCK_HTTP_PROVIDER__URL is empty; it says where deliveries are posted to")
    return Http(own)


class Http(Provider):
    """Posts to a gateway."""

    name = "http"
    types: ClassVar[frozenset[Type]] = frozenset(TYPES)
    is_idempotent = True

    def __init__(self, settings: HttpProviderSettings) -> None:
        self.per_s = settings.per_s
        self._timeout_s = settings.timeout_s
        self._connect_timeout_s = settings.connect_timeout_s
        self.longest_s = settings.connect_timeout_s + settings.timeout_s
        headers = {"content-type": "application/json", "accept": "application/json", "user-agent": "penstock"}
        if settings.api_key is not None:
            key = settings.api_key.get_secret_value()
            if not (key.isascii() and key.isprintable()):
                raise ConfigError("PENSTOCK_HTTP_PROVIDER__API_KEY holds characters that no HTTP header can carry")
            headers["authorization"] = f"Bearer {key}"
        self._target = Target.of(settings.url, headers)
        self._pool: Pool | None = None

    async def start(self) -> None:
        """Open the pool."""
        self._pool = Pool(
            connect_timeout_s=self._connect_timeout_s, keep_alive_s=KEEP_ALIVE_S, max_answer_bytes=MAX_ANSWER_BYTES
        )

    async def send(self, message: Outgoing) -> Sent:
        """Post the message."""
        assert self._pool is not None
        headers = {"idempotency-key": message.id}
        body, unheard = encode(message), False
        not_taken: Reject | RetryLater
        try:
            async with asyncio.timeout(self._connect_timeout_s + self._timeout_s):
                try:
                    response = await self._pool.post(self._target, message.id, body, headers=headers)
                except HungUp as error:
                    if not error.was_kept:
                        raise
                    unheard = True  # most likely it was closed while it lay idle; but the request may have been read
                    response = await self._pool.post(self._target, message.id, body, headers=headers, fresh=True)
            return judge(response)
        except Unreachable:
            not_taken = RetryLater("the gateway takes no connection", code="unreachable", charged=False)
        except TimeoutError:
            raise InDoubt(f"the gateway had the request and did not answer within {self._timeout_s:g} s") from None
        except HungUp:
            raise InDoubt("the connection to the gateway ended before an answer; the request may be read") from None
        except BrokenAnswer:
            raise InDoubt("the gateway had the request, and what it answered is not one whole HTTP answer") from None
        except (Reject, RetryLater) as told:
            not_taken = told
        if unheard:
            raise InDoubt(f"{not_taken}; and it hung up before, when it may have read the request")
        raise not_taken

    async def stop(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.close()


def encode(message: Outgoing) -> bytes:
    """Return the body of the request."""
    return orjson.dumps(
        {
            "id": message.id,
            "type": message.type,
            "from": message.sender,
            "to": message.to,
            "subject": message.subject,
            "body": message.body,
            "html": message.html,
            "attachments": [
                {
                    "filename": one.filename,
                    "content_type": one.content_type,
                    "content": None if one.content is None else base64.b64encode(one.content).decode(),
                    "url": one.url,
                }
                for one in message.attachments
            ],
            "metadata": message.metadata,
        }
    )


def judge(response: Response) -> Sent:
    """Return what a good answer says, else raise what it means."""
    status = response.status
    if 200 <= status < 300:
        said = _object(response.body).get("id")
        return Sent(said if isinstance(said, str) and len(said) <= 200 else "")
    after_s = retry_after_s(response.headers.get("retry-after"), response.headers.get("date"), most_s=LONGEST_AFTER_S)
    if status == 429 or (status == 503 and after_s is not None):
        code = "rate_limited" if status == 429 else "unavailable"
        raise RetryLater(f"the gateway asks for patience ({status})", code=code, after_s=after_s, charged=False)
    if status == 409:
        raise InDoubt("the gateway is still busy with an earlier try (409)")
    if status in {502, 504}:
        raise InDoubt(f"a proxy before the gateway answered {status}: the gateway may have the request")
    if status in {408, 425} or status >= 500:
        raise RetryLater(f"the gateway answered {status}", code="unavailable" if status == 503 else "gateway_error")
    raise _refusal(status, response.body)


def _refusal(status: int, body: bytes) -> Reject:
    if status in {401, 403}:
        return Reject(f"the gateway refused our key ({status})", code="unauthorized")
    if status == 413:
        return Reject("the gateway takes no message as large as this (413)", code="too_large")
    error = _object(body).get("error")
    code = error.get("code") if isinstance(error, dict) else None
    said = code if isinstance(code, str) and _CODE.fullmatch(code) else "refused"
    known = said if said in REFUSALS else "refused"
    return Reject(f"the gateway refused the message ({status}, {said})", code=known)


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}

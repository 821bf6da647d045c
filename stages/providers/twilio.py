"""The provider that sends sms and mms by Twilio's REST API, version 2010-04-01.

**When a message is taken.** Twilio has no idempotency key, so each call ends in one of three ways:

    no connection                             certainly not taken: tried again, no attempt is charged
    429, and 503 with Retry-After             "never processed and always safe to retry": the same
    503, 408                                  not taken: tried again
    other 4xx                                 not taken, for good; `CODES` says why
    201 with a `sid`                          taken
    500 and other 5xx                         in doubt: Twilio says itself that such a call may have sent the message
    no answer, or none that can be read       in doubt: the request was written, and perhaps read

Sources: https://www.twilio.com/docs/api/errors/20429, .../20500, .../20503.

A doubt may be resolved later: the message carries a `StatusCallback`, and when Twilio tells what became of it, it was
taken. Each call has a connection of its own: a kept one may be closed by the other end at the moment when a request is
written, and each such moment would be a doubt more.

Twilio's error texts are not passed on: they repeat numbers.
"""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import urlencode

import orjson

from pipeline.contacts import is_service
from pipeline.errors import ConfigError, InDoubt, Reject, RetryLater
from stages.http import BrokenAnswer, HungUp, Pool, Response, Target, Unreachable
from stages.openai_protocol import retry_after_s
from stages.providers import LONGEST_AFTER_S, Outgoing, Provider, Sent, Type

if TYPE_CHECKING:
    from pipeline.settings import Settings, TwilioSettings

MAX_ANSWER_BYTES: Final = 1 << 20
MAX_MEDIA: Final = 10
"""Of one message: https://www.twilio.com/docs/api/errors/21623."""

CODES: Final = {
    **dict.fromkeys((21211, 21214, 21217, 21265, 21266, 21604, 21612, 21614, 21635), "invalid_recipient"),
    **dict.fromkeys((21212, 21601, 21603, 21606, 21618, 21659, 21660, 21661, 21701, 21703, 21704), "invalid_sender"),
    **dict.fromkeys((21602, 21619), "invalid_content"),
    **dict.fromkeys((21605, 21617), "too_large"),
    **dict.fromkeys((21620, 21623), "invalid_attachment"),
    **dict.fromkeys((10001, 20003, 20005, 20008, 20403), "unauthorized"),
    21610: "unsubscribed",
    21408: "region_not_allowed",
    21608: "trial_account",
    21609: "invalid_callback_url",
}
"""Twilio's codes by what they mean to who sends; any other one is `refused`. All stand in
https://www.twilio.com/docs/api/errors; more specific ones are added there now and then."""


def build(settings: Settings) -> Provider:
    """Return the provider.

    Raises:
        ConfigError: the account or its secret is missing.
    """
    own = settings.twilio
    if not own.account_sid:
        raise ConfigError("provider twilio: PENSTOCK_TWILIO__ACCOUNT_SID is empty; the console shows it")
    if own.auth_token is None and own.api_key_secret is None:
        raise ConfigError("provider twilio: set PENSTOCK_TWILIO__AUTH_TOKEN, or ..._API_KEY_SID and ..._API_KEY_SECRET")
    return Twilio(own)


class Twilio(Provider):
    """Sends by Twilio."""

    name = "twilio"
    types: ClassVar[frozenset[Type]] = frozenset({"sms", "mms"})
    calls_back = True

    def __init__(self, settings: TwilioSettings) -> None:
        self.per_s = settings.per_s
        self._timeout_s = settings.timeout_s
        self._connect_timeout_s = settings.connect_timeout_s
        self.longest_s = settings.connect_timeout_s + settings.timeout_s
        secret = settings.api_key_secret or settings.auth_token
        user = settings.api_key_sid or settings.account_sid
        login = base64.b64encode(f"{user}:{secret.get_secret_value() if secret else ''}".encode()).decode()
        self._target = Target.of(
            f"{settings.api_url.rstrip('/')}/2010-04-01/Accounts/{settings.account_sid}/Messages.json",
            {
                "authorization": f"Basic {login}",
                "content-type": "application/x-www-form-urlencoded",
                "accept": "application/json",
                "user-agent": "penstock",
                "connection": "close",
            },
        )
        self._pool: Pool | None = None

    async def start(self) -> None:
        """Open the pool."""
        self._pool = Pool(connect_timeout_s=self._connect_timeout_s, keep_alive_s=0, max_answer_bytes=MAX_ANSWER_BYTES)

    async def send(self, message: Outgoing) -> Sent:
        """Ask Twilio to send the message."""
        assert self._pool is not None
        form = encode(message)
        try:
            # Connecting has a limit of its own: when this one is reached, the connection stood and the request was out.
            async with asyncio.timeout(self._connect_timeout_s + self._timeout_s):
                response = await self._pool.post(self._target, message.id, form, fresh=True)
        except Unreachable:
            raise RetryLater("Twilio takes no connection", code="unreachable", charged=False) from None
        except TimeoutError:
            raise InDoubt(f"Twilio had the request and did not answer within {self._timeout_s:g} s") from None
        except HungUp:
            raise InDoubt("the connection to Twilio ended before an answer; the request may have been read") from None
        except BrokenAnswer:
            raise InDoubt("Twilio had the request, and its answer cannot be read") from None
        return judge(response)

    async def stop(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.close()


def encode(message: Outgoing) -> bytes:
    """Return the form of the request.

    Raises:
        Reject: an attachment has no address, or there are too many.
    """
    if len(message.attachments) > MAX_MEDIA:
        raise Reject(f"Twilio takes {MAX_MEDIA} attachments at most", code="invalid_attachment")
    form = [
        ("To", message.to),
        ("MessagingServiceSid" if is_service(message.sender) else "From", message.sender),
    ]
    if message.body or not message.attachments:
        form.append(("Body", message.body))
    for number, one in enumerate(message.attachments, 1):
        if not one.url:
            raise Reject(
                f"attachment {number} has no `url`: Twilio fetches attachments itself", code="invalid_attachment"
            )
        form.append(("MediaUrl", one.url))
    if message.callback_url is not None:
        form.append(("StatusCallback", message.callback_url))
    return urlencode(form).encode("ascii")


def judge(response: Response) -> Sent:
    """Return what a good answer says, else raise what it means."""
    status, said = response.status, _object(response.body)
    if 200 <= status < 300:
        sid = said.get("sid")
        if isinstance(sid, str) and sid and len(sid) <= 64:
            return Sent(sid)
        raise InDoubt(f"Twilio answered {status} without a `sid`, by which it would know the message")
    code = said.get("code") if isinstance(said.get("code"), int) else None
    words = f"Twilio answered {status}" + (f", code {code}" if code is not None else "")
    after_s = retry_after_s(response.headers.get("retry-after"), response.headers.get("date"), most_s=LONGEST_AFTER_S)
    if status == 429:
        raise RetryLater(words, code="rate_limited", after_s=after_s, charged=False)
    if status == 503:
        raise RetryLater(words, code="unavailable", after_s=after_s, charged=after_s is None)
    if status == 408:
        raise RetryLater(words, code="timeout")
    if 400 <= status < 500:
        known = CODES.get(code or 0) or ("unauthorized" if status in {401, 403} else "refused")
        see = f": see https://www.twilio.com/docs/errors/{code}" if code is not None else ""
        raise Reject(words + see, code=known)
    raise InDoubt(f"{words}: the message may have been sent, or not")


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}

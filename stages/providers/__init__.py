"""Providers: who carries a delivery out of the house. One file is one provider.

A provider takes one message and says what became of it, no more: it keeps no queue, tries nothing again and knows
neither Redis nor the status of a delivery. What it owes is the truth about each failure, since all else follows it:

- **certainly not taken**, for good: `Reject`, with a code that says why;
- **certainly not taken**, for now: `RetryLater`. It charges an attempt where the receiver answered with an error, and
  none where no work was done: nobody listened, or the answer asks for patience (`after_s`, and then the provider as a
  whole should be left alone for so long);
- **perhaps taken**: `InDoubt`, where the receiver may have had the whole message and nobody heard its answer. Sent
  again it might arrive twice, so this is never said of what certainly was not taken.

Anything else that it raises is a slip of its own, and counts as a doubt: nobody knows how far it had come.

A provider whose receiver knows a message by its id (`is_idempotent`) tells of its doubts like any other. It is then
given the message again, and what it never takes after that stays in doubt.

Errors, logs and `repr()` show no text, number or address of a message, and no password.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, get_args
from urllib.parse import quote

from pipeline.errors import OUTCOME_UNKNOWN, ConfigError

if TYPE_CHECKING:
    from pipeline.settings import Settings

Type = Literal["sms", "mms", "email"]
TYPES: Final[tuple[Type, ...]] = get_args(Type)
LONGEST_AFTER_S: Final = 3_600.0
"""Retry-After is obeyed up to an hour: it holds a whole provider, and a slip of a receiver must not do so for a day."""

REFUSALS: Final = frozenset({
    "invalid_recipient", "invalid_sender", "invalid_subject", "invalid_content", "invalid_attachment", "too_large",
    "unsubscribed", "mailbox_full", "region_not_allowed", "refused",
    "unauthorized", "trial_account", "invalid_callback_url",
})  # fmt: skip
"""Why a message is refused for good. A receiver may name one of these; other words of its own become `refused`, since
codes are labels of metrics."""
CODES: Final = REFUSALS | {
    "unreachable", "connection_lost", "timeout", "tls", "deferred", "rate_limited", "unavailable", "bad_answer",
    "gateway_error", OUTCOME_UNKNOWN,
}  # fmt: skip
"""All that a failed hand-over is called."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that goes with a message: an email carries its content, an mms its address.

    Attributes:
        content: the file itself; None where only its address is known.
        url: where the receiver fetches it; None where the content is carried.
    """

    filename: str = field(repr=False)
    content_type: str
    content: bytes | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to one recipient.

    Attributes:
        id: of the delivery; the same in each attempt.
        callback_url: where the receiver tells what becomes of it; None where nobody from outside can reach us.
        metadata: the sender's own; only a gateway of one's own is told.
    """

    id: str
    type: Type
    sender: str = field(repr=False)
    to: str = field(repr=False)
    subject: str | None = field(default=None, repr=False)
    body: str = field(default="", repr=False)
    html: str | None = field(default=None, repr=False)
    attachments: tuple[Attachment, ...] = ()
    callback_url: str | None = field(default=None, repr=False)
    metadata: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Sent:
    """The receiver has taken the message.

    Attributes:
        provider_id: by which the receiver knows it; "" where it gives none.
    """

    provider_id: str


HandOver = Callable[[], Awaitable[Sent]]
"""Gives one message to the receiver, once; see `Provider.send`."""


class Provider(ABC):
    """Carries messages out.

    Attributes:
        name: of its module, in settings, metrics and the history.
        types: what it can carry.
        calls_back: the receiver tells later what became of a message, at `/api/v1/webhooks/<name>` of the gateway.
        is_idempotent: the receiver takes a message once, however often it is sent under one id.
        per_s: how many messages a second it may be given by all processes together; 0: as many as there are.
        longest_s: after which a hand-over has ended in any case; 0: nobody knows.
    """

    name: ClassVar[str]
    types: ClassVar[frozenset[Type]]
    calls_back: ClassVar[bool] = False
    is_idempotent: ClassVar[bool] = False
    per_s: float = 0.0
    longest_s: float = 0.0

    async def start(self) -> None:  # noqa: B027 - not every provider needs it
        """Open what it needs; connections may come with the first message."""

    async def prepare(self, message: Outgoing) -> HandOver:
        """Make ready what takes time, or may fail, before the message is marked as begun; return what hands it over.

        Raises:
            Reject: it can never be sent.
        """
        return partial(self.send, message)

    @abstractmethod
    async def send(self, message: Outgoing) -> Sent:
        """Give the message to the receiver, once.

        Raises:
            Reject: it was not taken and never will be.
            RetryLater: it was certainly not taken, and may be later.
            InDoubt: it may have been taken.
        """

    async def stop(self) -> None:  # noqa: B027 - not every provider needs it
        """Close what was opened."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} per_s={self.per_s:g}>"


def build(name: str, settings: Settings) -> Provider:
    """Return the provider of that name: `build(settings)` of the module `stages.providers.<name>`.

    Raises:
        ConfigError: there is no such provider, or its settings cannot work.
    """
    if not name.isidentifier():
        raise ConfigError(f"{name!r} is no provider's name")
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise ConfigError(f"there is no provider called {name!r}: stages/providers/{name}.py does not exist") from error
    built: Provider = module.build(settings)
    return built


def callback_url(provider: Provider, delivery_id: str, public_url: str) -> str | None:
    """Return where *provider* is to tell what becomes of a delivery; None where it does not, or cannot reach us."""
    if not (provider.calls_back and public_url):
        return None
    return f"{public_url.rstrip('/')}/api/v1/webhooks/{provider.name}?delivery={quote(delivery_id, safe='')}"


def chosen(settings: Settings) -> dict[Type, Provider]:
    """Return the provider of each type, as the settings name them; types that share a name share the provider.

    Raises:
        ConfigError: one does not exist, cannot work, or does not carry what it is chosen for.
    """
    names: dict[Type, str] = {kind: getattr(settings.deliveries, kind) for kind in TYPES}
    built = {name: build(name, settings) for name in dict.fromkeys(names.values())}
    for kind, name in names.items():
        if kind not in built[name].types:
            carried = ", ".join(one for one in TYPES if one in built[name].types)
            raise ConfigError(f"PENSTOCK_DELIVERIES__{kind.upper()} is {name}, which carries {carried} only")
    return {kind: built[name] for kind, name in names.items()}

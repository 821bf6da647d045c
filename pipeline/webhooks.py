"""What webhooks need from Redis: what there is to tell, and the secrets that sign it. Stages know no Redis.

A queue's secret lies in `queue:<queue>`, made when somebody sets the queue up or its first webhook needs it. When it is
rotated, the one before it signs too for a while, so that a receiver may change over when it likes (Standard Webhooks
1.0.0, "Signature scheme"); until then it is not rotated again, which would take from the receiver the one it has.
"""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipeline import keys, scripts
from pipeline.errors import RotatedLately, TooManyQueues

if TYPE_CHECKING:
    from pipeline.clock import Clock
    from pipeline.connection import Link

SECRET_BYTES: Final = 32  # what HMAC-SHA256 has use for; the standard asks for 24 to 64
OVERLAP_S: Final = 86_400
"""How long the secret before signs too: the standard's example of a rotation without a gap."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """A queue's secrets, `whsec_...`.

    Attributes:
        before: the one that was rotated away, while it still signs.
    """

    current: str
    before: str | None = None

    def __repr__(self) -> str:
        return f"<Secrets before={self.before is not None}>"


class Webhooks:
    """Results to be told and secrets to sign with; `clock` is Redis' time.

    Every method raises what `Link.call` does.
    """

    def __init__(self, link: Link, clock: Clock) -> None:
        self.clock = clock
        self._link = link

    async def size(self, batch_id: str) -> int:
        """Return the size of a batch's results in bytes, 0 when they are gone."""
        return int(await self._link.call("STRLEN", keys.BATCH_RESULTS + batch_id))

    async def results(self, batch_id: str) -> bytes | None:
        """Return the body of `GET /batch/{id}/results`, None when it is gone."""
        found: bytes | None = await self._link.call("GET", keys.BATCH_RESULTS + batch_id)
        return found

    async def secret(self, queue: str) -> str | None:
        """Return a queue's present secret; None where none was made yet, and none is made for this.

        Args:
            queue: what follows `queue:` in its key.
        """
        found: bytes | None = await self._link.call("HGET", keys.QUEUE + queue, "secret")
        return None if found is None else found.decode()

    async def secrets(self, queue: str, *, most: int | None = None) -> Secrets:
        """Return a queue's secrets; the first to ask makes one.

        Args:
            queue: what follows `queue:` in its key.
            most: queues that its tenant may have.

        Raises:
            TooManyQueues: it would be one more.
        """
        return await self._ask(queue, "", most)

    async def rotate(self, queue: str, *, most: int | None = None) -> Secrets:
        """Give a queue another secret; the present one signs too for a day. Arguments and errors as for `secrets`.

        Raises:
            RotatedLately: the one before the present one still signs, and would end at once.
        """
        return await self._ask(queue, "rotate", most)

    async def _ask(self, queue: str, verb: str, most: int | None) -> Secrets:
        args = (queue, new_secret(), verb, OVERLAP_S * 1000, "" if most is None else most)
        reply = await self._link.run(scripts.SECRET, (), args)
        if not reply:
            raise TooManyQueues
        current, before, *refused = reply
        if refused:
            raise RotatedLately
        return Secrets(current.decode(), before.decode() or None)


def new_secret() -> str:
    """Return a fresh secret, as Standard Webhooks writes one."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def new_webhook_id() -> str:
    """Return a fresh id by which a receiver knows a repetition."""
    return f"msg_{secrets.token_hex(16)}"

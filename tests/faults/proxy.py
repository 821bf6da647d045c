"""A bad network on demand: a TCP proxy between a process of ours and Redis, or a replica.

It runs in the event loop of whoever uses it and knows no protocol, only bytes. Each connection is two `_End`s, one
towards the client and one towards the server; each passes what it reads to the other.

Rules:
- Without a fault a piece goes straight to the other side's socket, so the proxy costs little where it does nothing.
- A fault may come and go at any time, also for connections that exist. Bytes are never reordered nor changed; they are
  late, or the connection ends.
- An end reads only while what it read can go somewhere, so a frozen or slow connection fills the buffers of the kernel
  as a real one does, and not our memory.
- While nothing may pass, no end of a connection passes either: neither side learns that the other has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Final, Self, cast

MOST_HELD: Final = 256 * 1024
"""Bytes that an end holds back before it stops reading."""

_DRIP_EVERY_S: Final = 0.02
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 s: closing sends RST


class Proxy:
    """Listens on a free port of 127.0.0.1 while it is used as `async with`; leaving closes everything.

    Args:
        target: the server's unix socket, or its (host, port). It need not be there yet.
        rng: where jitter comes from; None: the same jitter every time.

    Attributes:
        port: where it listens.
        accepted: connections ever accepted, without the refused ones.
        replies_lost: replies thrown away by `lose_replies`.
    """

    def __init__(self, target: Path | tuple[str, int], rng: Random | None = None) -> None:
        self.port = 0
        self.accepted = 0
        self.replies_lost = 0
        self._target = target
        self._rng = rng or Random(0)
        self._server: asyncio.Server | None = None
        self._alive: set[_Pair] = set()
        self._dead: set[_Pair] = set()  # by half_open: open for ever, and nothing passes
        self._dials: set[asyncio.Task[None]] = set()
        self._sockets = 0
        self._no_sockets = asyncio.Event()
        self._flowing = asyncio.Event()  # cleared while frozen
        self._flowing.set()
        self._refusing = False
        self._latency_s = self._jitter_s = 0.0
        self._is_late = False
        self._bytes_per_s = 0.0  # 0: as fast as it goes
        self._losses: list[_Loss] = []

    @property
    def redis_url(self) -> str:
        """The address of Redis behind it."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def http_url(self) -> str:
        """The address of a replica behind it."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections are open now, without those that `half_open` made dead."""
        return len(self._alive)

    # --- faults -------------------------------------------------------------------------------------

    def slow(self, latency_s: float, jitter_s: float = 0.0) -> None:
        """From now on each piece arrives later by *latency_s* +- *jitter_s*, in each direction, in order."""
        self._latency_s, self._jitter_s = latency_s, jitter_s
        self._is_late = latency_s > 0 or jitter_s > 0

    def drip(self, bytes_per_s: float) -> None:
        """From now on each connection passes so many bytes per second towards the client, in drops; 0: no limit."""
        self._bytes_per_s = bytes_per_s

    def cut(self) -> int:
        """Reset every connection now and return how many; those made dead by `half_open` stay as they are."""
        pairs = list(self._alive)
        for pair in pairs:
            pair.reset()
        return len(pairs)

    def refuse(self, on: bool = True) -> None:
        """Reset new connections as soon as they are made; those that exist go on."""
        self._refusing = on

    def freeze(self) -> None:
        """Let nothing pass in either direction and close nothing, until `thaw`. New connections hear nothing either."""
        self._flowing.clear()
        self._regulate()

    def thaw(self) -> None:
        """Let everything pass again, beginning with what was held back, the ends of connections included."""
        self._flowing.set()
        self._regulate()

    def half_open(self, containing: bytes = b"") -> int:
        """Make every connection dead for ever whose last command contains these bytes; return how many. New ones work.

        What the server sends is left unread and the client hears nothing, nor does the server hear of the client,
        even when that has gone: a blocked read is still served by Redis. Ends when the proxy is left.
        """
        pairs = [pair for pair in self._alive if containing in pair.asked_last]
        for pair in pairs:
            pair.is_dead = True
            pair.regulate()
        self._dead.update(pairs)
        self._alive.difference_update(pairs)
        return len(pairs)

    def lose_replies(self, containing: bytes, times: int = 1) -> None:
        """Let the next *times* commands run whose bytes contain *containing*, and lose their replies.

        When the first bytes of such a reply come they are thrown away and the connection is reset. This takes one
        command in flight per connection. A command that ends otherwise, without a reply, does not count.
        """
        self._losses.append(_Loss(containing, times))

    def heal(self) -> None:
        """Become a plain relay again, at once also for what is held back; dead connections stay dead."""
        self.slow(0)
        self.drip(0)
        self.refuse(False)
        self._losses.clear()
        for pair in self._alive:
            pair.loss = None
            pair.client.hurry()
            pair.server.hurry()
        self.thaw()

    # --- connections --------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Pair(self).client, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._refusing = True  # a connection may be on its way in
        self._server.close()
        for pair in self._alive | self._dead:
            pair.reset()
        await asyncio.gather(*self._dials, return_exceptions=True)
        if self._sockets:
            await self._no_sockets.wait()
        await self._server.wait_closed()

    def _regulate(self) -> None:
        for pair in list(self._alive):
            pair.regulate()

    def __repr__(self) -> str:
        return f"<Proxy {self.port} to {self._target} connections={self.connections} dead={len(self._dead)}>"


class _Loss:
    """Replies to be lost: to which commands, and how many are left to lose."""

    def __init__(self, containing: bytes, left: int) -> None:
        self.containing = containing
        self.left = left


class _Pair:
    """One connection: a client's end and a server's end, and what is done to both."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.client = _End(self)
        self.server = _End(self)
        self.client.other, self.server.other = self.server, self.client
        self.is_over = False
        self.is_dead = False
        self.is_broken = False  # one end was reset while nothing could pass
        self.loss: _Loss | None = None  # the reply now due is to be lost
        self.asked_last = b""  # the last piece that the client sent
        self._asked = b""  # the end of what the client sent last, where the beginning of a pattern may be
        self._dialling: asyncio.Task[None] | None = None

    @property
    def flows(self) -> bool:
        """Whether anything may pass now; not before both ends are connected."""
        return (
            self.client.transport is not None
            and self.server.transport is not None
            and not self.is_dead
            and self.proxy._flowing.is_set()
        )

    def dial(self) -> None:
        """Take the client's connection and make the server's."""
        self.proxy._alive.add(self)
        self.proxy.accepted += 1
        self._dialling = asyncio.create_task(self._dial(), name="proxy dials")
        self.proxy._dials.add(self._dialling)
        self._dialling.add_done_callback(self.proxy._dials.discard)

    async def _dial(self) -> None:
        loop, target = asyncio.get_running_loop(), self.proxy._target
        await self.proxy._flowing.wait()
        try:
            if isinstance(target, Path):
                await loop.create_unix_connection(lambda: self.server, str(target))
            else:
                await loop.create_connection(lambda: self.server, *target)
        except OSError:
            self._dialling = None
            self.breaks()
        else:
            self._dialling = None
            self.regulate()

    def regulate(self) -> None:
        """Obey what has changed: pass on what is due, and read where there is room."""
        if self.is_broken and self.proxy._flowing.is_set():
            self.breaks()
        for end in (self.client, self.server):
            end.pass_on()
            end.regulate()

    def breaks(self) -> None:
        """Reset the connection because one end of it was; later, if nothing may pass now."""
        if self.is_dead or not self.proxy._flowing.is_set():
            self.is_broken = True
        else:
            self.reset()

    def reset(self) -> None:
        """Close both ends at once; the client's sees a reset connection."""
        self.forget()
        if self._dialling is not None:
            self._dialling.cancel()
        self.client.reset()
        self.server.reset()

    def forget(self) -> None:
        """Be no connection any more."""
        self.is_over = True
        self.proxy._alive.discard(self)
        self.proxy._dead.discard(self)
        if self.loss is not None:
            self.loss.left += 1  # there was no reply to lose
            self.loss = None

    def loses(self, end: _End, data: bytes) -> bool:
        """Look at a piece that *end* has read; say whether it is a reply that was lost, and the connection with it."""
        if end is self.client:
            self.asked_last = data
            asked = self._asked + data
            for loss in self.proxy._losses:
                if self.loss is None and loss.left and loss.containing in asked:
                    loss.left -= 1
                    self.loss = loss
            longest = max((len(loss.containing) for loss in self.proxy._losses), default=1)
            self._asked = asked[max(0, len(asked) - longest + 1) :]
            return False
        self._asked = b""  # what comes next is another command
        if self.loss is None:
            return False
        self.loss = None
        self.proxy.replies_lost += 1
        self.reset()
        return True


class _End(asyncio.Protocol):
    """One side's socket: what comes from it goes to the *other* end, now or later."""

    other: _End

    def __init__(self, pair: _Pair) -> None:
        self.transport: asyncio.Transport | None = None
        self._pair = pair
        self._proxy = pair.proxy
        self._held: deque[tuple[float, memoryview | None]] = deque()  # (due, piece); None: the end of the stream
        self._held_bytes = 0
        self._last_due_s = 0.0
        self._next_drip_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_full = False  # the kernel takes no more of what is written here
        self._has_ended = False  # this side has said that it sends no more
        self._end_was_passed_on = False

    # --- what the event loop tells ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass
        self._proxy._sockets += 1
        self._proxy._no_sockets.clear()
        if self._pair.is_over or (self is self._pair.client and self._proxy._refusing):
            self.reset()
        elif self is self._pair.client:
            self._pair.dial()

    def data_received(self, data: bytes) -> None:
        pair, proxy = self._pair, self._proxy
        if (proxy._losses or pair.loss is not None) and pair.loses(self, data):
            return
        if not (self._held or proxy._is_late or proxy._bytes_per_s) and pair.flows:
            assert self.other.transport is not None
            self.other.transport.write(data)
        else:
            self._hold(memoryview(data))

    def eof_received(self) -> bool:
        self._has_ended = True
        self._hold(None)
        return True  # the other direction goes on

    def pause_writing(self) -> None:
        self._is_full = True
        self.other.regulate()

    def resume_writing(self) -> None:
        self._is_full = False
        self.other.regulate()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._stop()
        self._proxy._sockets -= 1
        if not self._proxy._sockets:
            self._proxy._no_sockets.set()
        if error is not None:
            self._pair.breaks()
        elif self.other.transport is None:
            self._pair.forget()

    # --- passing on ---------------------------------------------------------------------------------

    def regulate(self) -> None:
        """Read only while what is read can go somewhere."""
        if self.transport is None or self.transport.is_closing() or self._has_ended:
            return
        may_read = self._pair.flows and not self.other._is_full and self._held_bytes < MOST_HELD
        if may_read and not self.transport.is_reading():
            self.transport.resume_reading()
        elif not may_read and self.transport.is_reading():
            self.transport.pause_reading()

    def hurry(self) -> None:
        """Make everything that is held back due now."""
        self._held = deque((0.0, piece) for _, piece in self._held)
        self._last_due_s = self._next_drip_s = 0.0

    def _hold(self, piece: memoryview | None) -> None:
        proxy = self._proxy
        due_s = asyncio.get_running_loop().time() + proxy._latency_s
        due_s += proxy._rng.uniform(-proxy._jitter_s, proxy._jitter_s)
        self._last_due_s = due_s = max(due_s, self._last_due_s)  # what came first goes first
        self._held.append((due_s, piece))
        self._held_bytes += len(piece or b"")
        self.pass_on()
        self.regulate()

    def pass_on(self) -> None:
        """Pass on what is due, and come back when the next piece is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        drips = self._proxy._bytes_per_s if self is self._pair.server else 0.0
        while self._held and self._pair.flows:
            due_s, piece = self._held[0]
            if drips:
                due_s = max(due_s, self._next_drip_s)
            now_s = loop.time()
            if due_s > now_s:
                self._timer = loop.call_at(due_s, self._come_back)
                return
            if piece is None:
                self._held.popleft()
                self._pass_on_the_end()
                return
            drop = piece[: max(1, int(drips * _DRIP_EVERY_S))] if drips else piece
            if drips:
                self._next_drip_s = now_s + len(drop) / drips
            if len(drop) < len(piece):
                self._held[0] = (due_s, piece[len(drop) :])
            else:
                self._held.popleft()
            self._held_bytes -= len(drop)
            assert self.other.transport is not None
            self.other.transport.write(drop)

    def _come_back(self) -> None:
        self._timer = None
        self.pass_on()
        self.regulate()

    def _pass_on_the_end(self) -> None:
        self._end_was_passed_on = True
        assert self.transport is not None
        assert self.other.transport is not None
        if self.other._end_was_passed_on:  # both sides have said all they had to say
            self.transport.close()
            self.other.transport.close()
        else:
            with contextlib.suppress(OSError):  # that side is gone already, as `connection_lost` will tell
                self.other.transport.write_eof()

    # --- ending -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Close this side at once; a client behind TCP sees a reset."""
        self._stop()
        if self.transport is not None:
            link = self.transport.get_extra_info("socket")
            if link.family == socket.AF_INET:
                with contextlib.suppress(OSError):  # the socket is gone already
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._held.clear()
        self._held_bytes = 0

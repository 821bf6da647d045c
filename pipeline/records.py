"""History: what was asked and what became of it, in a database; single records and lists are read from here.

Redis holds work in flight. Its scripts append an event for each thing that is to be remembered (stream
`record:events`); the recorder takes them in bulk and writes them here. An event tells of one record of one kind: a row
of one table, named by tenant and id. It has a rank, and the columns of a table obey one of two rules:

- `first`: filled by the event of rank 0, never changed afterwards (what was asked for);
- `latest`: replaced by an event whose rank is higher than that of the row (how it stands with it);
- `earliest`: the least of what events of the row's own epoch said.

What lists do not show, and what may be long, is not read for them (`listed`): a page has hundreds of rows.

So the order in which events come does not matter, repeating them changes nothing, and any number of recorders may write
at the same time. Two events of one rank about one record must say the same.

A report is about a person, and carries their epoch. An erasure forgets an epoch: what is there of it goes, and what
comes of it later is not written. Both happen in transactions that run one after another, so neither misses the other.

A kind of record is a table and a row of `KINDS`. SQLite and PostgreSQL run the same statements. Errors of SQLAlchemy
and the drivers end in this file.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import aiosqlite
import asyncpg
import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import create_async_engine

from pipeline.errors import HistoryUnavailable, MalformedCursor, MalformedEntry, Reject
from pipeline.job import Json

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

Row = dict[str, Any]

HIGHEST: Final = 2**63 - 1
MOST: Final = 1_000
"""Rows in one page, at most."""

# --- Tables ------------------------------------------------------------------------------------

METADATA: Final = sa.MetaData()
_JSON: Final = sa.JSON(none_as_null=True)


def _first(name: str, kind: sa.types.TypeEngine[Any], *, listed: bool = True) -> sa.Column[Any]:
    return sa.Column(name, kind, info={"rule": "first", "listed": listed})


def _latest(name: str, kind: sa.types.TypeEngine[Any], *, listed: bool = True) -> sa.Column[Any]:
    return sa.Column(name, kind, info={"rule": "latest", "listed": listed})


def _table(name: str, key: str, *parts: sa.Column[Any] | sa.Index) -> sa.Table:
    return sa.Table(
        name,
        METADATA,
        sa.Column("tenant", sa.Text(), primary_key=True),
        sa.Column(key, sa.Text(), primary_key=True),
        sa.Column("rank", sa.BigInteger(), nullable=False, info={"rule": "latest"}),
        *parts,
    )


MESSAGES: Final = _table(
    "messages",
    "message_id",
    _first("batch_id", sa.Text()),
    _first("queue_id", sa.Text()),
    _first("position", sa.BigInteger()),
    _first("prompt", sa.Text()),
    _first("system_prompt", sa.Text()),
    _first("model", sa.Text()),
    _first("retrieve", sa.Boolean()),
    _first("retry_of", sa.Text()),
    _first("schedule_at_ms", sa.BigInteger()),
    _first("created_ms", sa.BigInteger()),
    _latest("status", sa.Text()),
    _latest("result", _JSON),
    _latest("error", _JSON),
    _latest("worker", sa.Text()),
    _latest("replica", sa.Text()),
    _latest("attempts", sa.BigInteger()),
    _latest("timings_ms", _JSON),
    _latest("finished_ms", sa.BigInteger()),
    sa.Index("messages_by_time", "tenant", "created_ms", "message_id"),
    sa.Index("messages_by_queue", "tenant", "queue_id", "created_ms", "message_id"),
    sa.Index("messages_by_status", "tenant", "status", "created_ms", "message_id"),
    sa.Index("messages_by_batch", "tenant", "batch_id", "position", "message_id"),
)

BATCHES: Final = _table(
    "batches",
    "batch_id",
    _first("queue_id", sa.Text()),
    _first("request_count", sa.BigInteger()),
    _first("webhook_url", sa.Text()),
    _first("webhook_event", sa.Text()),
    _first("created_ms", sa.BigInteger()),
    _latest("status", sa.Text()),
    _latest("response_count", sa.BigInteger()),
    _latest("failed_count", sa.BigInteger()),
    _latest("closed_ms", sa.BigInteger()),
    sa.Index("batches_by_time", "tenant", "created_ms", "batch_id"),
    sa.Index("batches_by_queue", "tenant", "queue_id", "created_ms", "batch_id"),
    sa.Index("batches_by_status", "tenant", "status", "created_ms", "batch_id"),
)

WEBHOOKS: Final = _table(
    "webhooks",
    "job_id",
    _first("webhook_id", sa.Text()),
    _first("queue", sa.Text()),
    _first("batch_id", sa.Text()),
    _first("message_id", sa.Text()),
    _first("url", sa.Text()),
    _first("event", sa.Text()),
    _first("retry_of", sa.Text()),
    _first("created_ms", sa.BigInteger()),
    _latest("status", sa.Text()),
    _latest("result", _JSON),
    _latest("error", _JSON),
    _latest("worker", sa.Text()),
    _latest("attempts", sa.BigInteger()),
    _latest("finished_ms", sa.BigInteger()),
    sa.Index("webhooks_by_webhook_id", "tenant", "webhook_id", "created_ms"),
)

QUEUES: Final = _table("queues", "queue_id", _latest("data", _JSON), _latest("changed_ms", sa.BigInteger()))

CHATS: Final = _table("chats", "chat_id", _latest("epoch", sa.BigInteger()), _latest("changed_ms", sa.BigInteger()))

CHAT_TURNS: Final = _table(
    "chat_turns",
    "turn_id",
    _first("chat_id", sa.Text()),
    _first("seq", sa.BigInteger()),
    _first("epoch", sa.BigInteger()),
    _first("role", sa.Text()),
    _first("message_id", sa.Text()),
    _first("user_id", sa.Text()),
    _first("text", sa.Text()),
    _first("at_ms", sa.BigInteger()),
    _first("status", sa.Text()),
    _first("is_processed", sa.Boolean()),
    _first("answered_by", sa.Text()),
    _first("about", _JSON),
    sa.Index("chat_turns_by_chat", "tenant", "chat_id", "seq"),
)

PERSONAS: Final = _table("personas", "name", _latest("data", _JSON), _latest("changed_ms", sa.BigInteger()))

API_KEYS: Final = _table(
    "api_keys",
    "name",
    _first("digest", sa.Text()),
    _first("created_ms", sa.BigInteger()),
    _latest("revoked_ms", sa.BigInteger()),
)

REPORTS: Final = _table(
    "reports",
    "report_id",
    _first("report_type", sa.Text()),
    _first("inputs", _JSON, listed=False),
    _first("language", sa.Text()),
    _first("request_id", sa.Text()),
    _latest("user_id", sa.Text()),
    _latest("epoch", sa.Text()),
    _latest("created_ms", sa.BigInteger()),
    _latest("status", sa.Text()),
    _latest("cached", sa.Boolean()),
    _latest("report", _JSON, listed=False),
    _latest("error", _JSON),
    _latest("worker", sa.Text()),
    _latest("replica", sa.Text()),
    _latest("attempts", sa.BigInteger()),
    _latest("timings_ms", _JSON),
    _latest("finished_ms", sa.BigInteger()),
    sa.Index("reports_by_user", "tenant", "user_id", "created_ms", "report_id"),
)

DELIVERIES: Final = _table(
    "deliveries",
    "delivery_id",
    _first("type", sa.Text()),
    _first("sender", sa.Text()),
    _first("recipient", sa.Text()),
    _first("subject", sa.Text()),
    _first("body", sa.Text(), listed=False),
    _first("html", sa.Text(), listed=False),
    _first("attachments", _JSON, listed=False),
    _first("metadata", _JSON, listed=False),
    _first("scheduled_ms", sa.BigInteger()),
    _first("retry_of", sa.Text()),
    _first("created_ms", sa.BigInteger()),
    _latest("status", sa.Text()),
    _latest("history", _JSON, listed=False),
    _latest("provider", sa.Text()),
    _latest("provider_id", sa.Text()),
    _latest("error", _JSON),
    _latest("attempts", sa.BigInteger()),
    _latest("changed_ms", sa.BigInteger()),
    sa.Index("deliveries_by_time", "tenant", "created_ms", "delivery_id"),
    sa.Index("deliveries_by_type", "tenant", "type", "created_ms", "delivery_id"),
    sa.Index("deliveries_by_status", "tenant", "status", "created_ms", "delivery_id"),
    sa.Index("deliveries_by_recipient", "tenant", "recipient", "created_ms", "delivery_id"),
)

INCOMING: Final = _table(
    "incoming",
    "incoming_id",
    _first("provider", sa.Text()),
    _first("provider_id", sa.Text()),
    _first("type", sa.Text()),
    _first("sender", sa.Text()),
    _first("recipient", sa.Text()),
    _first("subject", sa.Text()),
    _first("body", sa.Text()),
    _first("media", _JSON),
    _first("created_ms", sa.BigInteger()),
    _latest("status", sa.Text()),
    _latest("result", _JSON),
    _latest("error", _JSON),
    _latest("finished_ms", sa.BigInteger()),
    sa.Index("incoming_by_time", "tenant", "created_ms", "incoming_id"),
)

USERS: Final = _table(
    "users",
    "user_id",
    _latest("epoch", sa.Text()),
    sa.Column("created_ms", sa.BigInteger(), info={"rule": "earliest"}),
    _latest("updated_ms", sa.BigInteger()),
)

ERASURES: Final = _table("erasures", "epoch", _latest("erased_ms", sa.BigInteger()))

# --- Events ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """One thing to be remembered.

    Attributes:
        kind: a key of `KINDS`.
        rank: 0 for what was asked for; higher for what came of it.
        at_ms: on Redis' clock.
        data: what the columns are taken from, by name; what no column is called after is left out.
        rows: a list in Redis that holds further events, of the kind's members; "" where there is none.
    """

    kind: str
    id: str
    tenant: str
    rank: int
    at_ms: int
    data: Json
    rows: str = ""

    @classmethod
    def decode(cls, fields: Sequence[bytes]) -> Self:
        """Read a stream entry's flat list of names and values.

        Raises:
            MalformedEntry: it is no event that can be written, and never will be.
        """
        text = dict(zip(fields[::2], fields[1::2], strict=False))
        try:
            kind, record_id, tenant = (text[name].decode() for name in (b"kind", b"id", b"tenant"))
            rank, at_ms = int(text[b"rank"]), int(text[b"at_ms"])
            rows = text.get(b"rows", b"").decode()
            data = orjson.loads(text[b"data"])
        except KeyError as error:
            raise MalformedEntry(f"the event has no field {error.args[0].decode()}", code="missing_field") from error
        except ValueError as error:
            raise MalformedEntry(f"the event cannot be read: {error}", code="not_an_event") from error
        event = cls(kind, record_id, tenant, rank, at_ms, data, rows)
        event.row()
        if rows and not KINDS[kind].members:
            raise MalformedEntry(f"a {kind} names no list", code="not_an_event")
        for member in event.inner():
            member.row()
        return event

    def inner(self) -> list[Self]:
        """Return the events of members that stand in this one's own data, to be written with it.

        Raises:
            MalformedEntry: one of them cannot be written.
        """
        kind = KINDS[self.kind]
        if not kind.inline:
            return []
        rows = self.data.get(kind.inline, [])
        try:
            return [replace(self, kind=kind.members, id=member, data=data, rank=0, rows="") for member, data in rows]
        except (ValueError, TypeError) as error:
            raise MalformedEntry(f"{kind.inline} holds no rows: {error}", code="not_an_event") from error

    def fields(self) -> dict[str, str]:
        """Return the names and values of the entry that tells this event."""
        data = orjson.dumps(self.data).decode()
        fields = {"kind": self.kind, "id": self.id, "tenant": self.tenant, "rank": str(self.rank)}
        return fields | {"at_ms": str(self.at_ms), "data": data} | ({"rows": self.rows} if self.rows else {})

    def members(self, elements: Sequence[bytes]) -> list[Self | MalformedEntry]:
        """Return the events of elements of the list `rows`; each is a JSON array of an id and its data."""
        found: list[Self | MalformedEntry] = []
        for element in elements:
            try:
                member_id, data = orjson.loads(element)
                event = replace(self, kind=KINDS[self.kind].members, id=member_id, data=data, rank=0, rows="")
                event.row()
                found.append(event)
            except MalformedEntry as error:
                found.append(error)
            except (ValueError, TypeError) as error:
                found.append(MalformedEntry(f"no row of a list: {error}", code="not_an_event"))
        return found

    def row(self) -> Row:
        """Return the row this is written as, with every column of its table.

        Raises:
            MalformedEntry: no such kind, or a value that does not fit its column.
        """
        return self._row

    @cached_property
    def _row(self) -> Row:  # made when the event is read, to see whether it fits, and used when it is written
        kind = KINDS.get(self.kind)
        if kind is None:
            message = f"no such kind: {self.kind[:64]!r}; a newer version wrote it, or nobody of ours"
            raise MalformedEntry(message, code="unknown_kind")
        if not isinstance(self.data, dict):
            raise MalformedEntry("data is no JSON object", code="not_an_event")
        values = self.data | kind.more(self)
        tenant, key, *_ = columns = _columns(kind.table)
        values |= {tenant.name: self.tenant, key.name: self.id, "rank": self.rank}
        row: Row = {}
        for column in columns:
            value = None if self.rank and column.is_asked else _printable(values.get(column.name))
            row[column.name] = value
            if not (column.is_optional if value is None else column.fits(value)):
                message = f"{column.name} cannot be {str(value)[:64]!r}"
                raise MalformedEntry(message, code="unfit_value", job_id=None)
        return row


class _Column(NamedTuple):
    """What a row needs to know of a column.

    Attributes:
        is_asked: it is filled by what was asked for, and by nothing that came of it.
    """

    name: str
    is_optional: bool
    is_asked: bool
    fits: Callable[[object], bool]


@cache
def _columns(table: sa.Table) -> tuple[_Column, ...]:
    """Return the columns of *table*, those of its key first; to ask SQLAlchemy for each row takes twice the time."""
    return tuple(
        _Column(column.name, bool(column.nullable), column.info.get("rule") == "first", _judge_of(column.type))
        for column in table.columns
    )


def _judge_of(kind: sa.types.TypeEngine[Any]) -> Callable[[object], bool]:
    """Return what says whether a value fits a column of this type."""
    match kind:
        case sa.Boolean():
            return lambda value: isinstance(value, bool)
        case sa.BigInteger():
            return lambda value: type(value) is int and -HIGHEST <= value <= HIGHEST
        case sa.Text():
            return lambda value: isinstance(value, str)
    return lambda _: True


def _printable(value: Any) -> Any:
    """Return *value* without NUL characters: PostgreSQL keeps none in a text."""
    match value:
        case str():
            return value.replace("\0", "\ufffd")
        case dict():
            return {_printable(name): _printable(part) for name, part in value.items()}
        case list():
            return [_printable(part) for part in value]
    return value


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of record.

    Attributes:
        more: columns that are not called as in the event's data.
        members: the kind of the events in the list that an event may name.
        inline: where such events stand in the event's own data instead; "" where they do not.
    """

    table: sa.Table
    more: Callable[[Event], Row]
    members: str = ""
    inline: str = ""


def _outcome(event: Event) -> Row:
    """Return how it stands with a job."""
    if event.rank == 0:
        return {"status": "pending"}
    finished_us = event.data.get("finished_us")
    return {"finished_ms": finished_us // 1000 if isinstance(finished_us, int) and finished_us else event.at_ms}


def _batch(event: Event) -> Row:
    return {"status": "pending", "response_count": 0, "failed_count": 0} if event.rank == 0 else {}


def _arrival(event: Event) -> Row:
    """Return the outcome of a job that began when its event of rank 0 was written."""
    return _outcome(event) | ({"created_ms": event.at_ms} if event.rank == 0 else {})


def _report(event: Event) -> Row:
    result = event.data.get("result")
    found = {name: result.get(name) for name in ("cached", "report")} if isinstance(result, dict) else {}
    return _outcome(event) | found


def _user(event: Event) -> Row:
    """Return the row of the person that a report's event is about."""
    return {
        "tenant": event.tenant,
        "user_id": event.data.get("user_id"),
        "rank": event.at_ms,
        "epoch": event.data.get("epoch"),
        "created_ms": event.data.get("created_ms"),
        "updated_ms": event.at_ms,
    }


def _erasure(event: Event) -> Row:
    if not isinstance(event.data.get("user_id"), str) or type(event.data.get("before_ms")) is not int:
        raise MalformedEntry("an erasure needs user_id and before_ms", code="unfit_value")
    return {"erased_ms": event.at_ms}


KINDS: Final[dict[str, Kind]] = {
    "message": Kind(MESSAGES, _outcome),
    "batch": Kind(BATCHES, _batch, members="message"),
    "webhook": Kind(WEBHOOKS, _arrival),
    "queue": Kind(QUEUES, lambda event: {"data": event.data, "changed_ms": event.at_ms}),
    "chat": Kind(CHATS, lambda event: {"changed_ms": event.at_ms}, members="chat_turn", inline="rows"),
    "chat_turn": Kind(CHAT_TURNS, lambda _: {}),
    "persona": Kind(PERSONAS, lambda event: {"data": event.data, "changed_ms": event.at_ms}),
    "key": Kind(API_KEYS, lambda _: {}),
    "report": Kind(REPORTS, _report),
    "erasure": Kind(ERASURES, _erasure),
    "delivery": Kind(DELIVERIES, lambda event: {"changed_ms": event.at_ms}),
    "incoming": Kind(INCOMING, _arrival),
}

PRIVATE: Final = frozenset({"report", "delivery", "incoming"})
"""Kinds that tell of people: what an error quotes of them is for nobody's log."""

# --- The database ------------------------------------------------------------------------------


class Records:
    """The database; connects when it is first asked."""

    def __init__(self, engine: AsyncEngine, timeout_s: float, threads: set[Thread]) -> None:
        self.engine = engine
        self._timeout_s = timeout_s
        self._threads = threads  # of SQLite's connections, as they are made
        self._upserts: dict[str, sa.Executable] = {}

    @classmethod
    def open(cls, url: str, *, timeout_s: float = 10.0) -> Self:
        """Return the history kept at *url*, an address as the setting `history.url` takes it.

        Args:
            timeout_s: for one transaction, or one answer.
        """
        threads: set[Thread] = set()
        return cls(_make_engine(url, timeout_s, threads), timeout_s, threads)

    async def close(self) -> None:
        """Close all connections.

        Each of SQLite's has a thread, which may still be at work for somebody who was cancelled or waited for too long.
        It tells the event loop when it is done, so the loop must not be closed before.
        """
        await self.engine.dispose()
        for thread in [thread for thread in self._threads if thread.is_alive()]:
            await asyncio.to_thread(thread.join, self._timeout_s)

    def __repr__(self) -> str:
        return f"<Records {self.engine.url.render_as_string(hide_password=True)}>"

    # --- writing ---------------------------------------------------------------------------------

    async def apply(self, events: Sequence[Event]) -> None:
        """Write all of them, or none.

        Raises:
            HistoryUnavailable: the database is away, or its tables are not up to date.
            Reject: it refuses one of the events for what stands in it (`refused_by_database`).
        """
        async with self._connection(writes=True) as connection:
            if any(event.kind in {"report", "erasure"} for event in events):
                await connection.exec_driver_sql(_ALONE[self.engine.dialect.name])
                events = await self._unforgotten(connection, events)
            rows: dict[sa.Table, list[Row]] = {}
            for event in chain.from_iterable([event, *event.inner()] for event in events):
                rows.setdefault(KINDS[event.kind].table, []).append(event.row())
                if event.kind == "report" and event.data.get("user_id"):
                    rows.setdefault(USERS, []).append(_user(event))
            # Tables in one order, and rows in one order: recorders that write at the same time wait, but never for
            # each other.
            for table in sorted(rows, key=lambda table: table.name):
                names = [column.name for column in table.primary_key.columns]
                ordered = sorted(rows[table], key=lambda row: [row[name] for name in names])
                await connection.execute(self._upsert(table), ordered)

    async def _unforgotten(self, connection: AsyncConnection, events: Sequence[Event]) -> list[Event]:
        """Do the erasures among *events*, and return what is to be written: nothing of an epoch that is forgotten."""
        erasures = [event for event in events if event.kind == "erasure"]
        for event in erasures:
            before_ms = event.data["before_ms"]
            for table, at in ((REPORTS, REPORTS.c.created_ms), (USERS, USERS.c.updated_ms)):
                theirs = sa.and_(table.c.tenant == event.tenant, table.c.user_id == event.data["user_id"])
                await connection.execute(
                    sa.delete(table).where(theirs, sa.or_(table.c.epoch == event.id, at <= before_ms))
                )
        forgotten = {event.id for event in erasures}
        epochs = {str(event.data.get("epoch")) for event in events if event.kind == "report"} - forgotten
        if epochs:
            found = await connection.execute(sa.select(ERASURES.c.epoch).where(ERASURES.c.epoch.in_(sorted(epochs))))
            forgotten |= set(found.scalars())
        return [event for event in events if event.kind != "report" or event.data.get("epoch") not in forgotten]

    async def forget(
        self, tenant: str, *, batches: Sequence[str] = (), chats: Sequence[str] = (), deliveries: Sequence[str] = ()
    ) -> int:
        """Delete what is remembered of batches (with their messages and webhooks), chats and deliveries; return rows.

        Events of theirs that come later write their rows anew.

        Raises:
            HistoryUnavailable: the database is away, or its tables are not up to date.
        """
        gone = 0
        named = [(table, "batch_id", batches) for table in (BATCHES, MESSAGES, WEBHOOKS)]
        named += [(table, "chat_id", chats) for table in (CHATS, CHAT_TURNS)]
        named.append((DELIVERIES, "delivery_id", deliveries))
        async with self._connection(writes=True) as connection:
            for table, column, ids in named:
                which = sa.and_(table.c.tenant == tenant, table.c[column].in_(list(ids)))
                gone += (await connection.execute(sa.delete(table).where(which))).rowcount
        return gone

    def _upsert(self, table: sa.Table) -> sa.Executable:
        """Return the statement that writes one row of *table* by the rules of its columns."""
        known = self._upserts.get(table.name)
        if known is not None:
            return known
        insert = postgresql.insert(table) if self.engine.dialect.name == "postgresql" else sqlite.insert(table)
        new, old = insert.excluded, table.columns
        newer = new["rank"] > old["rank"]
        changes: dict[str, Any] = {}
        for column in old:
            rule = column.info.get("rule")
            if rule == "first":
                changes[column.name] = sa.func.coalesce(column, new[column.name])
            elif rule == "latest":
                changes[column.name] = sa.case((newer, new[column.name]), else_=column)
            elif rule == "earliest":
                is_same = sa.and_(old["epoch"] == new["epoch"], column <= new[column.name])
                keeps = sa.or_(is_same, sa.and_(old["epoch"] != new["epoch"], sa.not_(newer)))
                changes[column.name] = sa.case((keeps, column), else_=new[column.name])
        names = [column.name for column in table.primary_key.columns]
        statement = self._upserts[table.name] = insert.on_conflict_do_update(index_elements=names, set_=changes)
        return statement

    # --- reading ---------------------------------------------------------------------------------

    async def message(self, tenant: str, message_id: str) -> Row | None:
        """Return one message; None where there is none of this tenant.

        Raises:
            HistoryUnavailable: the database is away (so for all that reads).
        """
        return await self._one(MESSAGES, tenant, MESSAGES.c.message_id == message_id)

    async def batch(self, tenant: str, batch_id: str) -> Row | None:
        """Return one batch."""
        return await self._one(BATCHES, tenant, BATCHES.c.batch_id == batch_id)

    async def completed(self, tenant: str, batch_id: str) -> int:
        """Return how many messages of a batch completed."""
        query = sa.select(sa.func.count()).select_from(MESSAGES)
        query = query.where(MESSAGES.c.tenant == tenant, MESSAGES.c.batch_id == batch_id)
        async with self._connection() as connection:
            found = await connection.execute(query.where(MESSAGES.c.status == "completed"))
            return int(found.scalar_one())

    async def webhook(self, tenant: str, webhook_id: str) -> Row | None:
        """Return one webhook by its job's id, or the newest job of a webhook id."""
        found = await self._one(WEBHOOKS, tenant, WEBHOOKS.c.job_id == webhook_id)
        return found or await self._one(WEBHOOKS, tenant, WEBHOOKS.c.webhook_id == webhook_id)

    async def report(self, tenant: str, report_id: str) -> Row | None:
        """Return one report."""
        return await self._one(REPORTS, tenant, REPORTS.c.report_id == report_id)

    async def reports(
        self, tenant: str, user_id: str, *, after: str | None = None, limit: int = 50
    ) -> tuple[list[Row], str | None]:
        """Return a page of the reports about a person, without what they say, the newest first; see `messages`."""
        return await self._page(REPORTS, tenant, {"user_id": user_id}, None, None, after, limit)

    async def delivery(self, tenant: str, delivery_id: str) -> Row | None:
        """Return one delivery."""
        return await self._one(DELIVERIES, tenant, DELIVERIES.c.delivery_id == delivery_id)

    async def deliveries(
        self,
        tenant: str,
        *,
        type: str | None = None,  # noqa: A002 - the column is called so
        status: str | None = None,
        recipient: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> tuple[list[Row], str | None]:
        """Return a page of deliveries, without what they say, the newest first; see `messages`."""
        wanted = {"type": type, "status": status, "recipient": recipient}
        return await self._page(DELIVERIES, tenant, wanted, since_ms, until_ms, after, limit)

    async def incoming(self, tenant: str, incoming_id: str) -> Row | None:
        """Return one message that came from outside."""
        return await self._one(INCOMING, tenant, INCOMING.c.incoming_id == incoming_id)

    async def has_erased(self, tenant: str, epoch: str) -> bool:
        """Say whether an erasure was done under this name."""
        return await self._one(ERASURES, tenant, ERASURES.c.epoch == epoch) is not None

    async def api_keys(self) -> list[Row]:
        """Return what is known of all API keys, of every tenant, revoked ones too."""
        query = sa.select(API_KEYS).where(API_KEYS.c.digest.is_not(None), API_KEYS.c.created_ms.is_not(None))
        async with self._connection() as connection:
            return [dict(row) for row in (await connection.execute(query)).mappings()]

    async def messages(
        self,
        tenant: str,
        *,
        queue: str | None = None,
        status: str | None = None,
        batch_id: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> tuple[list[Row], str | None]:
        """Return a page of messages and the cursor of the next one, None after the last.

        The newest come first; those of one batch (`batch_id`) in the order of the batch.

        Args:
            since_ms: of creation; included.
            until_ms: of creation; left out.
            after: a cursor.

        Raises:
            MalformedCursor: it is none of this list.
        """
        wanted = {"queue_id": queue, "status": status, "batch_id": batch_id}
        return await self._page(
            MESSAGES, tenant, wanted, since_ms, until_ms, after, limit, ordered=batch_id is not None
        )

    async def batches(
        self,
        tenant: str,
        *,
        queue: str | None = None,
        status: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> tuple[list[Row], str | None]:
        """Return a page of batches, the newest first, and the cursor of the next one; see `messages`."""
        wanted = {"queue_id": queue, "status": status}
        return await self._page(BATCHES, tenant, wanted, since_ms, until_ms, after, limit)

    async def chat_turns(
        self, tenant: str, chat_id: str, *, after: int = 0, limit: int = 50
    ) -> tuple[list[Row], int | None]:
        """Return what was said in a chat, oldest first, and the `seq` to go on from, None after the last.

        Args:
            after: `seq` of the turn before the first.
        """
        table = CHAT_TURNS
        query = sa.select(table).where(table.c.tenant == tenant, table.c.chat_id == chat_id, table.c.seq > after)
        query = query.order_by(table.c.seq).limit(max(1, min(limit, MOST)) + 1)
        async with self._connection() as connection:
            rows = [_shown(row) for row in (await connection.execute(query)).mappings()]
        more = len(rows) > limit
        del rows[limit:]
        return rows, rows[-1]["seq"] if more else None

    async def persona(self, tenant: str, name: str) -> Json | None:
        """Return what was given last when a persona was set up; None when it never was."""
        row = await self._one(PERSONAS, tenant, PERSONAS.c.name == name)
        return None if row is None else row["data"]

    async def _one(self, table: sa.Table, tenant: str, which: sa.ColumnElement[bool]) -> Row | None:
        query = sa.select(table).where(table.c.tenant == tenant, which)
        if "created_ms" in table.c:
            query = query.order_by(table.c.created_ms.desc())
        async with self._connection() as connection:
            found = (await connection.execute(query.limit(1))).mappings().first()
        return None if found is None else _shown(found)

    async def _page(
        self,
        table: sa.Table,
        tenant: str,
        wanted: Mapping[str, str | None],
        since_ms: int | None,
        until_ms: int | None,
        after: str | None,
        limit: int,
        *,
        ordered: bool = False,
    ) -> tuple[list[Row], str | None]:
        limit = max(1, min(limit, MOST))
        key = list(table.primary_key.columns)[1]
        by = [table.c.position if ordered else table.c.created_ms, key]
        columns = [column for column in table.columns if column.info.get("listed", True)]
        query = sa.select(*columns).where(table.c.tenant == tenant, by[0].is_not(None))
        query = query.where(*(table.c[name] == value for name, value in wanted.items() if value is not None))
        if since_ms is not None:
            query = query.where(table.c.created_ms >= since_ms)
        if until_ms is not None:
            query = query.where(table.c.created_ms < until_ms)
        if after is not None:
            last = sa.tuple_(*(sa.literal(part, column.type) for part, column in zip(_read(after), by, strict=True)))
            query = query.where(sa.tuple_(*by) > last if ordered else sa.tuple_(*by) < last)
        query = query.order_by(*(column.asc() if ordered else column.desc() for column in by)).limit(limit + 1)
        async with self._connection() as connection:
            rows = [_shown(row) for row in (await connection.execute(query)).mappings()]
        more = len(rows) > limit
        del rows[limit:]
        return rows, _cursor(rows[-1][by[0].name], rows[-1][key.name]) if more else None

    # --- the tables ------------------------------------------------------------------------------

    async def check(self) -> None:
        """Return when the tables are there and up to date.

        Raises:
            HistoryUnavailable: they are not, or the database is away.
        """
        from pipeline import migrations  # Alembic takes as long to import as all the rest

        async with self._connection() as connection:
            if await connection.run_sync(migrations.lacks):
                raise HistoryUnavailable("the tables are not up to date: run `penstock db upgrade`")

    async def upgrade(self) -> bool:
        """Bring the tables up to date; return whether there was something to do.

        Any number may do so at the same time: one is first, and the others find nothing to do.

        Raises:
            HistoryUnavailable: the database is away.
        """
        from pipeline import migrations

        await self._prepare()
        async with self._connection(writes=True) as connection:
            await connection.exec_driver_sql(_ALONE[self.engine.dialect.name])
            if not await connection.run_sync(migrations.lacks):
                return False
            await connection.run_sync(migrations.upgrade)
        return True

    async def _prepare(self) -> None:
        """Make the file of an SQLite database, one that is read while it is written (WAL)."""
        file = self.engine.url.database
        if self.engine.dialect.name != "sqlite" or file is None:
            return
        try:
            Path(file).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HistoryUnavailable(f"the folder of {file} cannot be made: {error.strerror}") from error
        give_up_s = time.monotonic() + self._timeout_s
        while True:
            try:
                async with self._connection() as connection:
                    await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            except HistoryUnavailable as error:  # SQLite does not wait here for another that does the same
                if "locked" not in str(error) or time.monotonic() > give_up_s:
                    raise
                await asyncio.sleep(0.02)
            else:
                return

    # --- the connection --------------------------------------------------------------------------

    @asynccontextmanager
    async def _connection(self, *, writes: bool = False) -> AsyncIterator[AsyncConnection]:
        """Yield a connection for one transaction, in time, its errors being ours."""
        try:
            async with asyncio.timeout(self._timeout_s):
                begin = self.engine.begin if writes else self.engine.connect
                async with begin() as connection:
                    yield connection
        except TimeoutError as error:
            raise HistoryUnavailable(f"the database gave no answer within {self._timeout_s:g} s") from error
        except _TROUBLE as error:
            raise _translate(error) from error


def _shown(row: sa.RowMapping) -> Row:
    return {name: value for name, value in row.items() if name not in {"tenant", "rank"}}


_ALONE: Final = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": f"SELECT pg_advisory_xact_lock({0x70656E73746F636B})",  # "penstock", among all users of this database
}
"""What lets one transaction at a time change the tables, by database."""

_TROUBLE: Final = (sa.exc.SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError)


def _translate(error: Exception) -> HistoryUnavailable | Reject:
    """Return what went wrong: something with the database, or with what it was given."""
    original = error.orig if isinstance(error, sa.exc.StatementError) and error.orig is not None else error
    text = " ".join(str(original).split())[:300]
    state = getattr(original, "sqlstate", None) or ""
    refused = (
        isinstance(error, (sa.exc.DataError, sa.exc.IntegrityError))
        or isinstance(original, (ValueError, TypeError, OverflowError))
        or isinstance(original.__cause__, asyncpg.DataError)
        or state[:2] in {"22", "23", "54"}  # wrong data, a violated constraint, too long for an index
    )
    if refused and isinstance(error, sa.exc.StatementError) and error.statement is not None:  # not while connecting
        return Reject(f"the database refuses it: {text}", code="refused_by_database")
    if state in {"42P01", "42703"} or "no such table" in text or "has no column" in text or "no such column" in text:
        return HistoryUnavailable(f"the tables are not up to date, run `penstock db upgrade`: {text}")
    return HistoryUnavailable(f"the database cannot be used: {text or type(original).__name__}")


def _cursor(*last: object) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(last)).decode().rstrip("=")


def _read(cursor: str) -> tuple[int, str]:
    try:
        number, text = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, TypeError, binascii.Error) as error:
        raise MalformedCursor from error
    if type(number) is not int or abs(number) > HIGHEST or not isinstance(text, str) or "\0" in text:
        raise MalformedCursor
    return number, text


def _make_engine(url: str, timeout_s: float, threads: set[Thread]) -> AsyncEngine:
    """Return the engine for *url*; *threads* gets those of SQLite's connections."""
    address = sa.make_url(url)
    common: dict[str, Any] = {"json_serializer": _dump, "json_deserializer": orjson.loads}
    if address.get_backend_name() == "sqlite":
        # A connection waits its turn for the file as long as one answer may take.
        address = address.set(drivername="sqlite+aiosqlite")

        def connect(*args: Any, **options: Any) -> aiosqlite.Connection:
            connection = aiosqlite.connect(*args, **options)
            threads.difference_update([thread for thread in threads if not thread.is_alive()])
            threads.add(connection._thread)  # noqa: SLF001 - nobody else can wait for it
            connection._thread.daemon = True  # noqa: SLF001 - as SQLAlchemy has it
            return connection

        arguments = {"timeout": timeout_s, "async_creator_fn": connect}
        engine = create_async_engine(address, connect_args=arguments, **common)
        sa.event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        return engine
    query = dict(address.query)
    if mode := query.pop("sslmode", None):
        query["ssl"] = mode
    program = query.pop("application_name", "penstock")
    arguments = {"timeout": timeout_s, "server_settings": {"application_name": program}}
    address = address.set(drivername="postgresql+asyncpg", query=query)
    return create_async_engine(address, pool_pre_ping=True, connect_args=arguments, **common)


def _dump(value: object) -> str:
    return orjson.dumps(value).decode()


def _prepare_sqlite(connection: Any, _record: object) -> None:
    """Set what each connection to the file needs: a commit is on the disk when it returns."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()

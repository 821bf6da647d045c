"""A running system does its work, service by service, and what that left is taken away: the rest of `penstock verify`.

Each trial goes the whole way that a client's request goes. Names and texts of ours hold the run's own token, so any
number of runs at once keep out of each other's way, and nobody takes what they make for their own.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import orjson
from standardwebhooks import Webhook, WebhookVerificationError

from gateway.checks import LOOK_EVERY_S, Site, until, worker_of
from gateway.client import GatewayRefused, GatewayUnreachable, decide_wait_s
from gateway.receiver import Receiver, receiving
from gateway.verify import Check, Failed, Skipped
from pipeline import flows, keys
from pipeline.dead import DeadLetters, Letter
from pipeline.errors import HistoryUnavailable, PenstockError, Reject
from pipeline.job import Json
from pipeline.records import Records
from pipeline.traces import entries_added, tenant_of, until_recorded

T = TypeVar("T")

LETTERS: Final = 1_000
"""Dead letters that are looked through for ours; the newest."""
ENDED: Final = frozenset({"completed", "completed_with_errors", "failed", "expired", "cancelled"})
NOWHERE: Final = "http://penstock-verify.invalid/hook"
"""No name ends like this (RFC 6761), so telling this receiver fails, and is tried again."""
NOBODY: Final = {
    "sms": ("+12025550100", "+12025550199"),
    "mms": ("+12025550100", "+12025550199"),
    "email": ("verify@penstock-verify.invalid", "verify@penstock-verify.invalid"),
}
"""From whom and to whom the console is told: numbers that are kept for fiction, and a name that leads nowhere."""
REPEATS: Final = 3
UNSENT: Final = frozenset({"scheduled", "pending", "sending"})
SENT_S: Final = 15.0
RECORDED_S: Final = 5.0
ENDS_S: Final = 5.0
HISTORY_S: Final = 3.0


# --- Services ----------------------------------------------------------------------------------


async def _query(site: Site) -> str:
    _needs_a_replica(site)
    question = f"What happens to a job when its worker dies? ({site.token})"
    answer = (await _ask(site, "POST", "/query", {"query": question, "timeout_s": 25})).json()
    site.traces.jobs.append(answer["job_id"])
    if not answer["answer"]:
        raise Failed("the answer is empty", f"ask the replica {answer['replica']} itself: what does it answer?")
    sources = len(answer["sources"])
    found = f"{sources} sources" if sources else "no sources: nothing that is indexed fits (`penstock ingest`)"
    return f"answered by {answer['replica']} in {answer['timings_ms']['total']:.0f} ms, from {found}"


async def _message(site: Site) -> str:
    stream = keys.stream("llm")
    before = await entries_added(site.link, stream)
    created = await _create(site, {"prompt": _prompt(site)})
    shown = await until(lambda: _get(site, f"/message/{created['message_id']}"), _has_ended)
    _completed(shown, "the message")
    grown = await entries_added(site.link, stream) - before
    if grown < 1:
        raise Failed(f"it was accepted, but {stream} has not grown", "name the Redis of this gateway: --redis-url")
    return f"{stream} grew by {grown}; completed in {_spent(shown)} by {shown['replica']}"


async def _batch(site: Site) -> str:
    began_s = time.monotonic()
    created = await _create(site, {"messages": [{"prompt": _prompt(site)} for _ in range(3)]})
    await until(lambda: _get(site, f"/batch/{created['batch_id']}"), lambda batch: batch["status"] in ENDED)
    results = (await _get(site, f"/batch/{created['batch_id']}/results"))["results"]
    for number, shown in enumerate(results, 1):
        _completed(shown, f"message {number} of the batch")
    if [shown["message_id"] for shown in results] != created["message_ids"]:
        raise Failed("its results are not those of its messages, in their order", "report this: it must never be")
    return f"{len(results)} of {created['message_count']} completed in {_since(began_s)}, results in order"


async def _history(site: Site) -> str:
    batch_id, messages = list(site.traces.batches.items())[-1]
    began_s = time.monotonic()
    await until(
        lambda: _get(site, f"/message?batch_id={batch_id}"),
        lambda page: [row["status"] for row in page["messages"]] == ["completed"] * len(messages),
    )
    return f"{len(messages)} messages are in the database, {_since(began_s)} later"


async def _chat(site: Site) -> str:
    _needs_a_replica(site)
    chat = f"/chat/{site.token}"
    site.traces.chats.append(site.token)
    began_s = time.monotonic()
    said = await _ask(site, "POST", f"{chat}/messages", {"user_id": site.token, "text": f"Hello! ({site.token})"})
    message_id = said.json()["message_id"]
    await _learn_tenant(site, keys.CHAT)
    chat_key = keys.of_tenant(site.traces.tenant, site.token)
    if lock := await site.link.call("GET", keys.CHAT_LOCK + chat_key):
        site.traces.jobs.append(lock.decode().partition(":")[0])
    kind, told = await _heard(site, f"{chat}/events?after=0-0", message_id)
    await until(lambda: site.link.call("EXISTS", keys.CHAT_LOCK + chat_key), lambda found: not found)  # its run is over
    if kind != "reply":
        error = told.get("error") or {}
        raise Failed(f"instead of a reply comes `{kind}`: {error.get('message', 'no reason is told')}", _LETTERS_TODO)
    if not told["text"]:
        raise Failed("the reply is empty", "look at what the replicas answer to a chat's prompt")
    return f"said, and answered as an event in {_since(began_s)}"


async def _heard(site: Site, path: str, message_id: str) -> tuple[str, Json]:
    """Return the event that is about a message, and its kind."""
    async with aclosing(site.client.events(path)) as events:
        async for kind, told in events:
            if message_id in told.get("message_ids", ()):
                return kind, told
    raise GatewayUnreachable("the gateway has ended its events")


async def _report(site: Site) -> str:
    inputs = {"age": 44, "sex": "female", "symptoms": ["headache for two days"], "notes": site.token}
    _needs_a_replica(site)
    site.traces.users.append(site.token)
    began_s = time.monotonic()
    asked = {"user_id": site.token, "inputs": inputs}
    report_id = (await _ask(site, "POST", "/reports", asked)).json()["report_id"]
    site.traces.jobs.append(report_id)
    site.traces.reports.append(report_id)
    shown = await until(lambda: _get(site, f"/reports/{report_id}"), _has_ended)
    _completed(shown, "the report")
    return f"{len(shown['report']['markdown'])} characters written in {_since(began_s)}"


# --- Deliveries --------------------------------------------------------------------------------


async def _delivery(site: Site) -> str:
    if site.deliver_to is not None:
        kind = "email" if "@" in site.deliver_to else "sms"
        asked = {kind: (site.deliver_from or site.deliver_to, site.deliver_to)}
    else:
        deliveries = site.settings.deliveries
        asked = {kind: to for kind, to in NOBODY.items() if getattr(deliveries, kind) == "console"}
    unseen = _unseen(site, asked)
    if not asked:
        raise Skipped(f"every type goes out for real here: {unseen}")
    said = [await _deliver(site, kind, *who) for kind, who in asked.items()]
    return "; ".join(filter(None, [*said, unseen]))


def _unseen(site: Site, asked: Collection[str]) -> str:
    """Say which providers nothing is known of when the types *asked* have gone out; "" of none."""
    providers = {kind: getattr(site.settings.deliveries, kind) for kind in NOBODY if kind not in asked}
    real = [f"{kind} by {provider}" for kind, provider in providers.items() if provider != "console"]
    return f"whether {', '.join(real)} works stays unseen without --deliver-to ADDRESS" if real else ""


async def _deliver(site: Site, kind: str, sender: str, recipient: str) -> str:
    """Have one message go out; return how its status went."""
    stream = keys.stream(kind)
    before = await entries_added(site.link, stream)
    body = {"type": kind, "from": sender, "to": recipient, "body": f"`penstock verify` tries this ({site.token})"}
    delivery_id = await _made(site, _send(site, body))
    path = f"/api/v1/messages/{delivery_id}"
    try:
        async with asyncio.timeout(SENT_S):
            shown = await until(lambda: _get(site, path), lambda shown: shown["status"] not in UNSENT)
    except TimeoutError:
        shown = await _get(site, path)
    steps = {step["status"]: step["at_ms"] for step in shown["history"]}
    error = f": {shown['error']['message']}" if shown.get("error") else ""
    provider = shown.get("provider") or "its provider"
    if not {"pending", "sending", "sent"} <= steps.keys():
        still = f"still {shown['status']} after {SENT_S:g} s" if shown["status"] in UNSENT else shown["status"]
        said = f"an {kind} that is given to {provider} is {still}{error}"
        raise Failed(said, _PROVIDER_TODO.format(provider=provider))
    if not steps["pending"] <= steps["sending"] <= steps["sent"]:
        raise Failed(f"an {kind} has had its statuses in another order: {steps}", "report this: it must never be")
    if await entries_added(site.link, stream) <= before:
        raise Failed(f"it was accepted, but {stream} has not grown", "name the Redis of this gateway: --redis-url")
    since = {name: steps[name] - steps["pending"] for name in ("sending", "sent")}
    return f"{kind} by {provider}: pending, sending {since['sending']} ms later, sent after {since['sent']} ms"


async def _send(site: Site, body: Json) -> str:
    delivery_id = str((await _ask(site, "POST", "/api/v1/messages/send", body)).json()["id"])
    site.traces.deliveries.append(delivery_id)
    tenant = await site.link.call("HGET", keys.DELIVERY + delivery_id, "tenant")
    site.traces.tenant = tenant.decode() if tenant else site.traces.tenant
    return delivery_id


_PROVIDER_TODO: Final = (
    "does {provider} run, and do the delivery workers reach it? Their log has each attempt; it is tried again by itself"
)

# --- Webhooks ----------------------------------------------------------------------------------


async def _webhook(site: Site) -> str:
    workers = [worker for worker in (await site.seen()).workers if "webhook" in worker.stages]
    if socket.gethostname() not in {worker.host for worker in workers}:
        hosts = ", ".join(sorted({worker.host for worker in workers}))
        raise Skipped(f"the webhook stage runs on {hosts} and cannot call a receiver here: run `penstock verify` there")
    async with _receiver(site) as receiver:
        began_s = time.monotonic()
        try:
            created = await _create(site, {"prompt": _prompt(site), "webhook_url": receiver.url})
        except GatewayRefused as error:
            if error.status != 422:
                raise
            raise Skipped(
                "only public addresses are called, and ours is none; `penstock up` on loopback makes an exception for "
                "`penstock verify` with its --data-dir, and PENSTOCK_WEBHOOK__ALLOW_PRIVATE=true, for gateways and "
                "webhook workers, makes it for everybody on a machine for development"
            ) from None
        news = await _told(site, receiver, created["batch_id"])
        if news["data"]["message_id"] != created["message_id"]:
            raise Failed("the news is of another message", "report this: it must never be")
        return f"`{news['type']}` was told {_since(began_s)} after it was asked for, with a signature that is right"


@asynccontextmanager
async def _receiver(site: Site) -> AsyncIterator[Receiver]:
    async with AsyncExitStack() as stack:
        try:
            receiver = await stack.enter_async_context(receiving(site.trial_url))
        except OSError as error:
            raise Skipped(f"our receiver cannot listen on its port: {error.strerror or error}") from None
        yield receiver


async def _told(site: Site, receiver: Receiver, batch_id: str) -> Json:
    """Return what our receiver is told of a batch, once that is known to be from Penstock."""
    telling = asyncio.create_task(_failed_attempt(site, batch_id), name="watch the webhook")
    hearing = asyncio.create_task(receiver.told.get(), name="hear the webhook")
    try:
        done, _ = await asyncio.wait({telling, hearing}, return_when=asyncio.FIRST_COMPLETED)
        if hearing not in done:
            raise Failed(f"our receiver at {receiver.url} was not reached: {telling.result()}", _WAY_OUT)
        request = hearing.result()
        await _learn_tenant(site, keys.QUEUE)
        secret = (await _get(site, f"/queue/{site.token}"))["webhook_secret"]
        news: Json = Webhook(secret).verify(request.body, request.headers)
    except WebhookVerificationError as error:
        todo = "do gateways and webhook workers use one Redis? Does a proxy in between change bodies or headers?"
        raise Failed(f"the signature is wrong: {error}", todo) from None
    finally:
        for task in (telling, hearing):
            task.cancel()
        await asyncio.wait({telling, hearing})
    webhook_id = request.headers["webhook-id"]
    await until(lambda: _get(site, f"/webhook/{webhook_id}"), _has_ended)  # it knows that it has told
    return news


async def _failed_attempt(site: Site, batch_id: str) -> str:
    """Wait until telling of a batch has failed once; return why."""
    webhook = await _webhook_of(site, batch_id)
    failed = await until(
        lambda: _get(site, f"/webhook/{webhook['id']}"),
        lambda shown: shown["status"] == "failed" or any(_is_bad(attempt) for attempt in shown["attempts"]),
    )
    if failed["attempts"]:
        return str(failed["attempts"][-1].get("error") or f"status {failed['attempts'][-1]['status']}")
    return str((failed["error"] or {}).get("message"))


def _is_bad(attempt: Json) -> bool:
    return not 200 <= (attempt.get("status") or 0) < 300


async def _webhook_of(site: Site, batch_id: str) -> Json:
    """Return the webhook that tells of a batch, once there is one."""
    batch = await until(lambda: _get(site, f"/batch/{batch_id}"), lambda batch: batch["webhook_id"] is not None)
    return await _get(site, f"/webhook/{batch['webhook_id']}")


# --- Queues ------------------------------------------------------------------------------------


async def _queue(site: Site) -> str:
    due = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    created = await _create(site, {"prompt": _prompt(site), "schedule_at": due})
    message_id = created["message_id"]
    if await site.link.call("ZSCORE", keys.DELAYED, message_id) is None:
        raise Failed(f"a message for later does not wait in {keys.DELAYED}", "name this gateway's Redis: --redis-url")
    shown = await _get(site, f"/message/{message_id}")
    if shown["status"] != "pending":
        raise Failed(f"a message for in an hour is {shown['status']} now", "report this: it must never be")
    await _repeatedly(site, "POST", f"/message/{message_id}/cancel")
    if await site.link.call("ZSCORE", keys.DELAYED, message_id) is not None:
        raise Failed(f"a cancelled message still waits in {keys.DELAYED}", "report this: it must never be")
    await until(lambda: _get(site, f"/batch/{created['batch_id']}"), lambda batch: batch["status"] in ENDED)
    return f"a message for in an hour waits in {keys.DELAYED}, can be cancelled, and is gone then"


async def _retry(site: Site) -> str:
    created = await _create(site, {"prompt": _prompt(site), "webhook_url": NOWHERE})
    webhook = await _webhook_of(site, created["batch_id"])
    path = f"/webhook/{webhook['id']}"
    first = await until(lambda: _get(site, path), lambda shown: shown["attempts"] and shown["next_attempt_at"])
    if first["status"] != "pending":
        raise Failed(f"an attempt has failed, and the webhook is {first['status']}, not pending", _LETTERS_TODO)
    again = await until(lambda: _get(site, path), lambda shown: len(shown["attempts"]) > 1)
    one, two = again["attempts"][:2]
    await _repeatedly(site, "POST", f"/jobs/{webhook['id']}/cancel")
    await until(lambda: _get(site, path), _has_ended)
    after_s = (two["at_ms"] - one["at_ms"]) / 1000
    return f"a webhook to nowhere failed ({one.get('error')}), was tried again {after_s:.1f} s later, and cancelled"


async def _dead_letter(site: Site) -> str:
    letters = DeadLetters(site.link, site.settings)
    job_id, stream = f"{site.token}-dead", keys.stream("llm")
    site.traces.jobs.append(job_id)
    await site.link.call("XADD", stream, "*", "data", orjson.dumps({"id": job_id, "prompt": 7}))

    async def ours() -> Letter | None:
        return next((letter for letter in await letters.list(LETTERS) if letter.job_id == job_id), None)

    found: Letter = await until(ours, lambda letter: letter is not None)
    site.traces.letters.append(found.id)
    outcome = orjson.loads(await until(lambda: site.link.call("GET", keys.COMPLETION + job_id), bool))
    if outcome["status"] != "failed":
        raise Failed(f"what can never be done has the outcome {outcome['status']}", "report this: it must never be")
    await letters.discard(found.id)
    try:
        await letters.show(found.id)
    except Reject:
        return f"an entry that is no job was buried ({found.reason}), its sender told, and the letter discarded"
    raise Failed(f"dead letter {found.id} was discarded and is still there", "is this the primary of this Redis?")


# --- Asking ------------------------------------------------------------------------------------

_LETTERS_TODO: Final = "`penstock dead list` tells what failed and why, `penstock status` how replicas and workers do"
_WAY_OUT: Final = (
    "the webhook workers need PENSTOCK_WEBHOOK__ALLOW_PRIVATE=true, too, and must reach the loopback of this machine"
)


async def _ask(site: Site, method: str, path: str, body: Json) -> Any:
    """Send one request; what a job failed of is told in the job's words."""
    try:
        return await site.client.send_once(method, path, body, timeout_s=60)
    except GatewayRefused as error:
        if error.status not in {502, 504}:
            raise
        raise Failed(f"it failed ({error.code}): {error}", _LETTERS_TODO) from None


async def _get(site: Site, path: str) -> Json:
    return await _repeatedly(site, "GET", path)


async def _repeatedly(site: Site, method: str, path: str) -> Json:
    """Send what may be sent twice: a few times where the gateway says "later", for a moment is no failure."""
    failures = 0
    while True:
        try:
            found: Json = (await site.client.send_once(method, path)).json()
        except GatewayRefused as refusal:
            wait_s = decide_wait_s(refusal.status, refusal.headers, failures)
            failures += 1
            if wait_s is None or failures > REPEATS:
                raise
            await asyncio.sleep(min(wait_s, 1.0))
        else:
            return found


async def _create(site: Site, asked: Json) -> Json:
    """Create a message or a batch in the queue of this run."""
    if "schedule_at" not in asked:
        _needs_a_replica(site)
    return await _made(site, _make(site, asked))


async def _made(site: Site, making: Coroutine[Any, Any, T]) -> T:
    """Return what was made. Whoever waits may be cancelled, but not the making: it must be known to be removed."""
    task = asyncio.create_task(making, name="make something")
    site.making.add(task)
    return await asyncio.shield(task)


async def _make(site: Site, asked: Json) -> Json:
    if "webhook_url" in asked:  # its queue gets a secret
        site.traces.queues.append(site.token)
    created: Json = (await _ask(site, "POST", "/message/create", {"queue_id": site.token, **asked})).json()
    site.traces.batches[created["batch_id"]] = created.get("message_ids") or [created["message_id"]]
    tenant = await site.link.call("HGET", keys.BATCH + created["batch_id"], "tenant")
    site.traces.tenant = tenant.decode() if tenant else site.traces.tenant
    return created


async def _learn_tenant(site: Site, kind: str) -> None:
    """Note whose we are: it stands in the key that begins with *kind* and was just made under our name."""
    site.traces.tenant = await tenant_of(site.link, kind, site.token) or site.traces.tenant


def _needs_a_replica(site: Site) -> None:
    if site.usable == 0:
        raise Skipped("not tried without a replica")


def _prompt(site: Site) -> str:
    return f"Which colour has the sky? Answer in one word. ({site.token})"


def _has_ended(shown: Json) -> bool:
    return shown["status"] in ENDED


def _completed(shown: Json, what: str) -> None:
    if shown["status"] != "completed":
        error = shown.get("error") or {}
        raise Failed(f"{what} {shown['status']} ({error.get('code')}): {error.get('message')}", _LETTERS_TODO)


def _spent(shown: Json) -> str:
    return f"{sum(shown['timings_ms'].values()):.0f} ms"


def _since(began_s: float) -> str:
    return f"{time.monotonic() - began_s:.2f} s"


# --- Afterwards --------------------------------------------------------------------------------


async def _clean_up(site: Site) -> str:
    traces = site.traces
    if not traces:
        return "nothing was made"
    try:
        trouble = await _end(site)
        rows = await _forget(site)
        traces.letters += await _letters_of(site)
        gone = await traces.remove(site.link)
        left = [*await traces.unfinished(site.link), *await traces.left(site.link)]
    except PenstockError as error:
        raise Failed(f"what was made could not be removed: {error}", _LEFT_TODO.format(site.token)) from None
    if left or trouble:
        raise Failed(
            f"{trouble or 'some of it goes on'}; left: {', '.join(left) or 'nothing in Redis'}",
            _LEFT_TODO.format(site.token),
        )
    return f"{gone} keys and dead letters are removed; {rows}"


_LEFT_TODO: Final = (
    "nothing: it is small, holds {0} in its text, and goes by itself once it has ended, in 30 days at most"
)


async def _end(site: Site) -> str:
    """Have everything end that goes on; return what stood in the way."""
    traces = site.traces
    if site.making:
        await asyncio.wait(site.making, timeout=ENDS_S)
    asked = [("DELETE", f"/users/{user}") for user in traces.users]
    asked += [("POST", f"/chat/{chat}/clear") for chat in traces.chats]
    trouble = ""
    done: set[str] = set()
    give_up_s = time.monotonic() + ENDS_S
    while True:
        unfinished = await traces.unfinished(site.link)
        asked += [
            ("POST", f"/{'batch' if name in traces.batches else 'jobs'}/{name}/cancel")
            for name in unfinished
            if name not in done
        ]
        done |= set(unfinished)
        for method, path in asked:
            try:
                await site.client.send_once(method, path, timeout_s=ENDS_S)
            except GatewayRefused as error:
                if error.status not in {404, 409}:  # it has ended meanwhile
                    trouble = str(error)
            except GatewayUnreachable as error:
                return str(error)
        asked.clear()
        if not unfinished or time.monotonic() > give_up_s:
            return trouble
        await asyncio.sleep(LOOK_EVERY_S)


async def _letters_of(site: Site) -> list[str]:
    """Return the dead letters that jobs of ours have become: they hold the run's token, or a delivery's id."""
    found = await DeadLetters(site.link, site.settings).list(LETTERS)
    ours = site.traces.deliveries
    return [letter.id for letter in found if letter.job_id in ours or site.token in (letter.original or "")]


async def _forget(site: Site) -> str:
    """Take what was made out of the history; say what became of that."""
    traces = site.traces
    if not traces.batches and not traces.chats and not traces.deliveries:
        return "the history was told nothing"
    if site.database_url is None:
        return "what the history knows of it stays there, since DATABASE_URL is not set here"
    records = Records.open(site.database_url, timeout_s=HISTORY_S)
    try:
        async with asyncio.timeout(RECORDED_S):
            await until_recorded(site.link)
        rows = await records.forget(
            traces.tenant, batches=list(traces.batches), chats=traces.chats, deliveries=traces.deliveries
        )
    except TimeoutError:
        return "what the history will know of it stays there, since nobody writes it now"
    except HistoryUnavailable as error:
        return f"what the history knows of it stays there: {error}"
    finally:
        await records.close()
    return f"{rows} rows of the history too"


# --- The table ---------------------------------------------------------------------------------


def _trial(
    name: str,
    about: str,
    run: Callable[[Site], Awaitable[str]],
    within_s: float,
    *stages: str,
    after: tuple[str, ...] = (),
) -> Check[Site]:
    """Return a check that has these stages work."""
    needs = ("gateway", "redis", "key", *(worker_of(stage) for stage in stages), *after)
    return Check(name, about, run, within_s, needs, stages)


_TELLS: Final = ("llm", "aggregator", "webhook")

TRIALS: Final = (
    _trial("query", "a question is answered", _query, 30.0, *flows.FLOWS["query"].route),
    _trial("message", "a message is queued and answered", _message, 30.0, "llm", "aggregator"),
    _trial("batch", "a batch is answered and closed", _batch, 30.0, "llm", "aggregator"),
    _trial(
        "history", "the batch is in the database", _history, 15.0, after=("database", worker_of("recorder"), "batch")
    ),
    _trial("chat", "a chat gets its reply", _chat, 40.0, "chat", "llm"),
    _trial("report", "a report is written", _report, 120.0, *dict.fromkeys(flows.FLOWS["report"].route)),
    _trial("delivery", "a message goes out, step by step", _delivery, 60.0, after=(worker_of("delivery"),)),
    _trial("webhook", "a receiver is told, and knows who tells", _webhook, 30.0, *_TELLS),
    _trial("queue", "what is for later waits, and can be cancelled", _queue, 15.0, "aggregator"),
    _trial("retry", "what fails is tried again", _retry, 45.0, *_TELLS),
    _trial("dead-letter", "what can never be done is put aside", _dead_letter, 15.0, "llm"),
)
CLEAN_UP: Final = Check("clean-up", "what this run has made is removed", _clean_up, 30.0)

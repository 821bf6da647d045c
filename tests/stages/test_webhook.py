"""The webhook stage: one attempt at a time, against receivers of every kind, each a real server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from standardwebhooks import Webhook as Verifier

from pipeline.clock import Clock
from pipeline.errors import Reject, RetryLater
from pipeline.job import Job
from pipeline.settings import WebhookSettings
from pipeline.webhooks import Secrets, Webhooks, new_secret, new_webhook_id
from stages import addresses
from stages.webhook import LARGE_AT_ONCE, LARGE_BYTES, Shares, Webhook, judge, read_retry_after, signed_headers
from tests.conftest import PATIENCE_S, wait_until
from tests.receivers import (
    Behaviour,
    Receiver,
    answer,
    flood,
    flood_of_headers,
    receiving,
    say,
    stay_silent,
)

SECRET = new_secret()
RESULTS = {
    "batch_id": "b1",
    "status": "completed_with_errors",
    "results": [
        {"message_id": "m1", "status": "completed", "result": {"answer": "Grüße aus Köln"}},
        {"message_id": "m2", "status": "failed", "error": {"type": "failed", "code": "lost", "message": "gone"}},
    ],
}
NAME = "receiver.example.com"
HAPPENED_MS = 1_764_000_000_123


class Kept(Webhooks):
    """Results and secrets in memory."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.batches: dict[str, bytes] = {"b1": orjson.dumps(RESULTS)}
        self.both = Secrets(SECRET)

    async def size(self, batch_id: str) -> int:
        return len(self.batches.get(batch_id, b""))

    async def results(self, batch_id: str) -> bytes | None:
        return self.batches.get(batch_id)

    async def secrets(self, queue: str, *, most: int | None = None) -> Secrets:
        assert queue == "acme:orders"
        return self.both


@dataclass
class FakeContext:
    webhooks: Kept = field(default_factory=Kept)
    reports: Any = None
    deliveries: Any = None
    replicas: Any = None
    batches: Any = None
    chats: Any = None
    clock: Any = None
    worker: str = "worker-1"


class Names(AbstractResolver):
    """Knows what a name means, differently each time where more than one meaning is given."""

    def __init__(self, *meanings: Sequence[str]) -> None:
        self.meanings = list(meanings)
        self.asked = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        meaning = self.meanings[min(self.asked, len(self.meanings) - 1)]
        self.asked += 1
        if not meaning:
            raise OSError(socket.EAI_NONAME, "no such name")
        kinds = {4: socket.AF_INET, 6: socket.AF_INET6}
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kinds[ip_address(address).version], proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in meaning
        ]  # fmt: skip

    async def close(self) -> None:
        pass


class Bench:
    """Started stages, one context for all."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.context = FakeContext()
        self._stack = stack

    async def stage(
        self, *, tls: ssl.SSLContext | None = None, resolver: AbstractResolver | None = None, **settings: Any
    ) -> Webhook:
        one = Webhook(WebhookSettings.model_validate({"allow_private": True} | settings), tls=tls, resolver=resolver)
        await one.start(self.context)
        self._stack.push_async_callback(one.stop)
        return one


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        yield Bench(stack)


def job(url: str, **payload: Any) -> Job:
    """A webhook's job, as the worker hands it over."""
    told: dict[str, Any] = {
        "url": url,
        "event": "batch.completed",
        "webhook_id": new_webhook_id(),
        "queue": "acme:orders",
    }
    told |= {"batch_id": "b1", "at_ms": HAPPENED_MS} | payload
    return Job("w1", "webhook", told, [], deadline_ms=0, tenant="acme", accepted_us=Clock().now_us())


async def failed(stage: Webhook, one: Job) -> RetryLater:
    """Make an attempt that fails, and may be repeated."""
    with pytest.raises(RetryLater) as caught:
        await stage.handle(one)
    assert caught.value.charged
    return caught.value


# --- what is told -------------------------------------------------------------------------------


async def test_a_receiver_is_told_and_can_verify_it(bench: Bench) -> None:
    """The body says what, when, and everything that `GET /batch/{id}/results` says, byte by byte the same."""
    stage = await bench.stage()
    async with receiving() as receiver:
        one = job(receiver.url + "?x=%20y")
        done = await stage.handle(one)
    (news,) = receiver.got
    assert news.path == "/hook?x=%20y"
    assert news.id == one.payload["webhook_id"]
    assert news.headers["content-type"] == "application/json"
    body = news.verified(SECRET)
    assert body == {"type": "batch.completed", "timestamp": "2025-11-24T16:00:00.123Z", "data": RESULTS}
    assert orjson.dumps(RESULTS) in news.raw
    (attempt,) = (one.state | done.value)["attempts"]
    assert attempt["status"] == 204
    assert attempt["duration_ms"] >= 0
    assert abs(attempt["at_ms"] - bench.context.webhooks.clock.now_ms()) < 60_000


async def test_one_message_is_told_by_itself(bench: Bench) -> None:
    """Of all results just its own."""
    stage = await bench.stage()
    async with receiving() as receiver:
        await stage.handle(job(receiver.url, event="message.completed", message_id="m2"))
    body = receiver.got[0].verified(SECRET)
    assert (body["type"], body["data"]) == ("message.completed", RESULTS["results"][1])


async def test_a_message_from_outside_is_told_as_its_job_carries_it(bench: Bench) -> None:
    """There is no batch whose results could be read; what it says stands in no story of the job."""
    stage = await bench.stage()
    data = {"message_id": "m1", "from": "+1500", "to": "+1501", "body": "Thanks!"}
    async with receiving() as receiver:
        one = job(receiver.url, event="message.received", message_id="m1", data=data)
        del one.payload["batch_id"]
        await stage.handle(one)
    body = receiver.got[0].verified(SECRET)
    assert (body["type"], body["data"]) == ("message.received", data)
    assert "Thanks!" not in repr(one.state)


async def test_the_news_is_the_same_in_every_attempt(bench: Bench) -> None:
    """Same id, same body; only the time of sending and with it the signature are its own."""
    stage = await bench.stage()
    async with receiving([answer(500)]) as receiver:
        one = job(receiver.url)
        await failed(stage, one)
        await stage.handle(one)
    first, second = receiver.got
    assert (first.id, first.raw) == (second.id, second.raw)
    assert [attempt["status"] for attempt in one.state["attempts"]] == [500, 204]
    for news in (first, second):
        news.verified(SECRET)


def test_the_signature_is_what_the_standard_says() -> None:
    """HMAC-SHA256 over id, time and body, computed here without the library; and the standard's own example."""
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    digest = hmac.digest(key, b'msg_1.1764000000.{"x":1}', hashlib.sha256)
    headers = signed_headers("msg_1", 1_764_000_000, b'{"x":1}', Secrets(SECRET))
    assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    assert headers["webhook-timestamp"] == "1764000000"
    known = Secrets("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, b'{"test": 2432232314}', known)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_a_rotated_secret_goes_on_signing_for_a_while(bench: Bench) -> None:
    """A receiver that knows either of both believes it; one that knows neither does not."""
    other = new_secret()
    bench.context.webhooks.both = Secrets(SECRET, before=other)
    stage = await bench.stage()
    async with receiving() as receiver:
        await stage.handle(job(receiver.url))
    (news,) = receiver.got
    assert news.verified(SECRET) == news.verified(other)
    with pytest.raises(Exception, match="No matching signature"):
        Verifier(new_secret()).verify(news.raw, news.headers)


@pytest.mark.parametrize("payload", [{"batch_id": "b2"}, {"event": "message.completed", "message_id": "m9"}])
async def test_nothing_to_tell_ends_it(bench: Bench, payload: dict[str, Any]) -> None:
    """Results are kept for days, not for ever: a job that comes later says so, and calls nobody."""
    stage = await bench.stage()
    async with receiving() as receiver:
        with pytest.raises(Reject) as caught:
            await stage.handle(job(receiver.url, **payload))
    assert caught.value.code == "data_gone"
    assert receiver.got == []


# --- what receivers answer ----------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_2xx_is_good(bench: Bench, status: int) -> None:
    """All of them."""
    stage = await bench.stage()
    async with receiving([answer(status)]) as receiver:
        await stage.handle(job(receiver.url))


@pytest.mark.parametrize(
    ("behaviour", "code", "noted"),
    [
        (answer(500), "bad_status", 500),
        (answer(404, body=b"no such page"), "bad_status", 404),
        (answer(401), "bad_status", 401),
        (answer(304), "redirected", 304),
        (say(b""), "connection_lost", "connection_lost"),
        (say(b"HTTP/1.1 200 OK\r\ncontent-le"), "connection_lost", "connection_lost"),
        (say(b"SSH-2.0-OpenSSH_9.2\r\n"), "bad_answer", "bad_answer"),
        (say(b"\x00\xff" * 40_000), "bad_answer", "bad_answer"),
        (say(b"HTTP/1.1 abc OK\r\n\r\n"), "bad_answer", "bad_answer"),
        (say(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nno chunk"), "bad_answer", "bad_answer"),
        (flood_of_headers, "bad_answer", "bad_answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_anything_else_is_a_failed_attempt(
    bench: Bench, behaviour: Behaviour, code: str, noted: int | str
) -> None:
    """It is noted, and tried again later."""
    stage = await bench.stage()
    async with receiving([behaviour]) as receiver:
        one = job(receiver.url)
        error = await failed(stage, one)
        assert (error.code, error.after_s) == (code, None)
        (attempt,) = one.state["attempts"]
        assert attempt.get("status", attempt.get("error")) == noted
        await asyncio.wait_for(receiver.gone.wait(), PATIENCE_S)


async def test_a_redirect_is_refused(bench: Bench) -> None:
    """Wherever it leads: that address was not looked at, and a secret receiver is not told to a stranger."""
    stage = await bench.stage()
    async with receiving() as other, receiving([answer(307, f"location: {other.url}")]) as receiver:
        error = await failed(stage, job(receiver.url))
    assert error.code == "redirected"
    assert (len(receiver.got), other.got) == (1, [])


async def test_410_ends_it(bench: Bench) -> None:
    """The receiver wants no more; the attempt is noted all the same."""
    stage = await bench.stage()
    async with receiving([answer(410)]) as receiver:
        one = job(receiver.url)
        with pytest.raises(Reject) as caught:
            await stage.handle(one)
    assert caught.value.code == "gone"
    assert [attempt["status"] for attempt in one.state["attempts"]] == [410]


@pytest.mark.parametrize(("status", "obeyed"), [(429, True), (503, True), (500, False)])
async def test_retry_after_is_obeyed(bench: Bench, status: int, obeyed: bool) -> None:
    """Where it has a meaning."""
    stage = await bench.stage()
    async with receiving([answer(status, "retry-after: 700")]) as receiver:
        error = await failed(stage, job(receiver.url))
    assert error.after_s == (700 if obeyed else None)


def test_retry_after_may_be_seconds_a_date_or_nonsense() -> None:
    """A slip of a receiver (a year, a date in the past) costs a day at most, and never less than nothing."""
    now = datetime(2026, 11, 28, 12, tzinfo=UTC)
    assert read_retry_after("120", now) == 120
    assert read_retry_after(format_datetime(now + timedelta(minutes=3), usegmt=True), now) == 180
    assert read_retry_after(format_datetime(now - timedelta(minutes=3), usegmt=True), now) == 0
    assert read_retry_after("31536000", now) == 86_400
    assert read_retry_after("9" * 400, now) is None
    for nonsense in (None, "", "soon", "-5", "1.5"):
        assert read_retry_after(nonsense, now) is None


@pytest.mark.parametrize("status", [100, 199, 300, 399, 400, 409, 411, 499, 500, 599])
def test_no_other_status_is_good(status: int) -> None:
    """2xx only, and only 410 ends it."""
    found = judge(status, None, datetime.now(UTC))
    assert not isinstance(found, int)
    assert found.code in {"bad_status", "redirected"}


@pytest.mark.parametrize(
    "behaviour",
    [
        say(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf"),
        say(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf", then_close=False),
        say(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nno!"),
        flood,
    ],
    ids=["half-then-close", "half-then-silence", "broken-gzip", "flood"],
)
async def test_the_head_of_an_answer_decides(bench: Bench, behaviour: Behaviour) -> None:
    """Who has said 2xx has the news; of what follows only a little is read, whatever it is."""
    stage = await bench.stage()
    async with receiving([behaviour]) as receiver:
        await stage.handle(job(receiver.url))
        await asyncio.wait_for(receiver.gone.wait(), PATIENCE_S)


@pytest.mark.parametrize("behaviour", [stay_silent, say(b"HTTP/1.1 200", then_close=False)], ids=["silent", "half-way"])
async def test_an_attempt_is_bounded_in_time(bench: Bench, behaviour: Behaviour) -> None:
    """And the receiver sees it end."""
    stage = await bench.stage(timeout_s=0.2)
    async with receiving([behaviour]) as receiver:
        one = job(receiver.url)
        error = await failed(stage, one)
        await asyncio.wait_for(receiver.gone.wait(), PATIENCE_S)
    assert error.code == "timeout"
    assert [attempt["error"] for attempt in one.state["attempts"]] == ["timeout"]


async def test_a_cancelled_attempt_ends_at_once(bench: Bench) -> None:
    """The receiver sees that too, and nothing is noted: nobody knows how it would have gone."""
    stage = await bench.stage()
    async with receiving([stay_silent]) as receiver:
        one = job(receiver.url)
        handling = asyncio.create_task(stage.handle(one))
        await receiver.told.wait()
        handling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handling
        await asyncio.wait_for(receiver.gone.wait(), PATIENCE_S)
    assert one.state["attempts"] == []


async def test_a_port_where_nobody_listens_is_unreachable(bench: Bench) -> None:
    """Refused connections count as attempts: else a dead receiver would be called again for days without a pause."""
    stage = await bench.stage()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        error = await failed(stage, job(f"http://127.0.0.1:{probe.getsockname()[1]}/"))
    assert error.code == "unreachable"


async def test_large_results_go_a_few_at_a_time(bench: Bench) -> None:
    """However many slots there are: memory is bounded. Small ones pass them by."""
    large = b'{"results":[],"x":"' + b"x" * LARGE_BYTES + b'"}'
    bench.context.webhooks.batches["large"] = large
    stage = await bench.stage()
    opened = asyncio.Event()

    async def wait(receiver: Receiver, writer: asyncio.StreamWriter) -> None:
        await opened.wait()
        await answer(204)(receiver, writer)

    async with receiving([wait] * (LARGE_AT_ONCE + 3)) as receiver, receiving() as small:
        handling = [
            asyncio.create_task(stage.handle(job(receiver.url, batch_id="large"))) for _ in range(LARGE_AT_ONCE + 3)
        ]
        await wait_until(lambda: len(receiver.got) == LARGE_AT_ONCE)
        await stage.handle(job(small.url))
        assert len(receiver.got) == LARGE_AT_ONCE
        opened.set()
        await asyncio.gather(*handling)
    assert all(orjson.loads(news.raw)["data"]["x"] == "x" * LARGE_BYTES for news in receiver.got)


async def test_a_slow_receiver_has_its_share_of_the_slots_only(bench: Bench) -> None:
    """What comes above it waits, uncharged and for longer the more there is; others are told; then it goes on."""
    stage = await bench.stage(concurrency=5, per_receiver=3)
    opened = asyncio.Event()

    async def wait(receiver: Receiver, writer: asyncio.StreamWriter) -> None:
        await opened.wait()
        await answer(204)(receiver, writer)

    async with receiving([wait] * 3) as slow, receiving() as quick:
        handling = [asyncio.create_task(stage.handle(job(slow.url))) for _ in range(3)]
        await wait_until(lambda: len(slow.got) == 3)
        turned_away = job(slow.url)
        with pytest.raises(RetryLater) as caught:
            await stage.handle(turned_away)
        assert (caught.value.code, caught.value.charged) == ("receiver_busy", False)
        assert 0 < (caught.value.after_s or 0) <= 1
        assert turned_away.state["attempts"] == []
        await stage.handle(job(quick.url))
        assert len(slow.got) == 3
        opened.set()
        await asyncio.gather(*handling)
        await stage.handle(turned_away)
        assert (len(slow.got), len(quick.got)) == (4, 1)


def test_a_backlog_for_one_receiver_comes_again_when_there_may_be_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand jobs for one whose calls take ten seconds, two at a time, are not read again every second."""
    now_us = 0
    monkeypatch.setattr("stages.webhook.monotonic_us", lambda: now_us)
    shares = Shares(2, Random(1))
    waits: list[float] = []
    with shares.one_of("a:443"):
        with shares.one_of("a:443"):
            now_us += 10_000_000
        with shares.one_of("a:443"):
            for _ in range(1_000):
                with pytest.raises(RetryLater) as caught, shares.one_of("a:443"):
                    pass
                waits.append(caught.value.after_s or 0)
            with shares.one_of("b:443"):
                pass
    assert 2.5 <= waits[0] <= 5
    assert all(30 <= wait <= 60 for wait in waits[20:])
    with shares.one_of("a:443"):
        pass


# --- where it leads -----------------------------------------------------------------------------


async def test_a_private_url_is_refused_before_anybody_is_called(bench: Bench) -> None:
    """By its text; development is another matter."""
    stage = await bench.stage(allow_private=False)
    async with receiving() as receiver:
        with pytest.raises(Reject) as caught:
            await stage.handle(job(receiver.url))
    assert caught.value.code == "bad_url"
    assert receiver.got == []


async def test_one_private_url_may_be_allowed_and_no_other(bench: Bench) -> None:
    """The very address by which `penstock verify` listens; a letter more, and it is refused as any."""
    async with receiving() as receiver:
        stage = await bench.stage(allow_private=False, trial_url=receiver.url)
        await stage.handle(job(receiver.url))
        assert len(receiver.got) == 1
        for other in (f"{receiver.url}x", f"{receiver.url}?a=b", receiver.url.rpartition("/")[0] + "/"):
            with pytest.raises(Reject):
                await stage.handle(job(other))
    assert len(receiver.got) == 1


@pytest.mark.parametrize("meaning", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"]])
async def test_a_name_that_leads_inside_is_refused(bench: Bench, meaning: list[str]) -> None:
    """One such address among others is enough; nobody is called, not even the public ones."""
    stage = await bench.stage(allow_private=False, resolver=Names(meaning))
    async with receiving(host=NAME) as receiver:
        error = await failed(stage, job(receiver.url))
    assert error.code == "address_refused"
    assert receiver.got == []


async def test_the_real_resolver_is_judged_too() -> None:
    """A name of this machine, asked of the system; by its text it might be anybody's."""
    judged = addresses.Judged(addresses.System(1))
    with pytest.raises(addresses.NotPublic):
        await judged.resolve("localhost", 80)
    await judged.close()


async def test_a_name_is_looked_up_and_the_receiver_told(bench: Bench) -> None:
    """By the system, as in production."""
    stage = await bench.stage()
    async with receiving(host="localhost") as receiver:
        await stage.handle(job(receiver.url))
    assert len(receiver.got) == 1


async def test_a_silent_name_server_holds_up_no_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many names at once as there are slots; the event loop has a handful of threads only."""
    opened = threading.Event()
    really = socket.getaddrinfo

    def ask(host: str, *args: Any, **options: Any) -> Any:
        if host != "localhost":
            opened.wait(PATIENCE_S)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return really(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    system = addresses.System(64)
    slow = [asyncio.create_task(system.resolve(f"slow{number}.example.com", 80)) for number in range(63)]
    await asyncio.sleep(0)
    assert (await asyncio.wait_for(system.resolve("localhost", 80), PATIENCE_S))[0]["host"] in {"127.0.0.1", "::1"}
    opened.set()
    assert all(isinstance(error, socket.gaierror) for error in await asyncio.gather(*slow, return_exceptions=True))
    await system.close()


async def test_the_connection_goes_to_the_address_that_was_judged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that says something good first and something bad then gains nothing: it is asked once per attempt."""
    monkeypatch.setattr(
        addresses, "is_public", lambda address: str(address) == "127.0.0.1"
    )  # it stands for a public one
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    stage = await bench.stage(allow_private=False, resolver=names)
    async with receiving(host=NAME) as receiver:
        port = int(receiver.url.rsplit(":", 1)[1].removesuffix("/hook"))
        inside = Receiver()
        async with await asyncio.start_server(inside.serve, "127.0.0.2", port):
            await stage.handle(job(receiver.url))
            assert (len(receiver.got), names.asked) == (1, 1)
            error = await failed(stage, job(receiver.url))
            assert (error.code, names.asked) == ("address_refused", 2)
            assert (len(receiver.got), inside.got) == (1, [])


async def test_a_name_that_leads_nowhere_is_a_failed_attempt(bench: Bench) -> None:
    """It may lead somewhere tomorrow."""
    stage = await bench.stage(resolver=Names([]))
    assert (await failed(stage, job(f"https://{NAME}/"))).code == "name_unknown"


# --- TLS ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    """Of our receiver's name: one that an authority vouches for, one that nobody does."""

    authority: Path
    good: ssl.SSLContext
    self_signed: ssl.SSLContext


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    openssl("req", "-x509", *new, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    (folder / "names").write_text(f"subjectAltName=DNS:{NAME}\nauthorityKeyIdentifier=keyid\n")
    openssl("req", *new[:-2], "-subj", f"/CN={NAME}", "-keyout", "good.key", "-out", "good.csr")
    openssl(
        "x509", "-req", "-in", "good.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
        "-extfile", "names", "-out", "good.pem",
    )  # fmt: skip
    openssl(
        "req", "-x509", *new, "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", "self.key",
        "-out", "self.pem",
    )  # fmt: skip

    def server(name: str) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
        return context

    return Certificates(folder / "ca.pem", server("good"), server("self"))


async def test_tls_is_checked_against_the_name(bench: Bench, certificates: Certificates) -> None:
    """Though the connection goes to an address; the server is asked for by its name, too."""
    asked: list[str | None] = []
    certificates.good.sni_callback = lambda connection, name, context: asked.append(name)
    trust = ssl.create_default_context(cafile=str(certificates.authority))
    stage = await bench.stage(tls=trust, resolver=Names(["127.0.0.1"]))
    async with receiving(tls=certificates.good, host=NAME) as receiver:
        await stage.handle(job(receiver.url))
        receiver.got[0].verified(SECRET)
        assert asked == [NAME]
        error = await failed(stage, job(receiver.url.replace(NAME, "another.example.com")))
    assert error.code == "tls"
    assert len(receiver.got) == 1


async def test_a_certificate_that_nobody_vouches_for_is_refused(bench: Bench, certificates: Certificates) -> None:
    """The receiver is told nothing."""
    stage = await bench.stage(resolver=Names(["127.0.0.1"]))
    async with receiving(tls=certificates.self_signed, host=NAME) as receiver:
        error = await failed(stage, job(receiver.url))
    assert error.code == "tls"
    assert receiver.got == []

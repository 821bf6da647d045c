"""The image stage against a server whose answers a test gives."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest
from aiohttp import web

from pipeline.errors import NotReady, Reject, RetryLater
from pipeline.job import Job
from pipeline.settings import ImagesSettings
from pipeline.stage import Context
from stages.image import Image

PNG = b"\x89PNG\r\n\x1a\nrest"


class Server:
    """Speaks `/v1/images/generations`.

    Attributes:
        answer: status and body of the next answers.
        asked: what it was asked, and the authorization it was shown.
    """

    def __init__(self) -> None:
        self.url = ""
        self.answer: tuple[int, Any] = (200, image_body(PNG))
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[dict[str, Any], str | None]] = []

    async def handle(self, request: web.Request) -> web.Response:
        self.asked.append((await request.json(), request.headers.get("authorization")))
        status, body = self.answer
        text = body if isinstance(body, bytes) else orjson.dumps(body)
        return web.Response(status=status, body=text, headers=self.headers)


class Kept:
    """The chats, as far as an image is concerned."""

    def __init__(self) -> None:
        self.images: list[tuple[Any, ...]] = []

    async def keep_image(self, *given: Any) -> str:
        self.images.append(given)
        return "kept"


def image_body(data: bytes) -> dict[str, Any]:
    return {"created": 1, "data": [{"b64_json": base64.b64encode(data).decode()}]}


def job() -> Job:
    payload = {"chat": "acme:c", "epoch": 7, "message_id": "r1", "message_ids": ["a", "b"], "prompt": "a lease"}
    return Job("r1-image", "image", payload, [], 0)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    one = Server()
    app = web.Application()
    app.router.add_post("/v1/images/generations", one.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    one.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield one
    await runner.cleanup()


async def run(kept: Kept, **settings: Any) -> dict[str, Any]:
    stage = Image(ImagesSettings.model_validate(settings))
    await stage.start(cast("Context", SimpleNamespace(chats=kept)))
    try:
        return (await stage.handle(job())).value
    finally:
        await stage.stop()


async def test_an_image_is_made_and_kept(server: Server) -> None:
    """Under its reply, with the type that its bytes say; the address may have its `/v1` or not."""
    kept = Kept()
    for url in (server.url, server.url + "/v1"):
        done = await run(kept, url=url, model="m", api_key="k")
        assert done == {"image_id": "r1", "ended": "kept", "bytes": len(PNG)}
    assert kept.images == [("acme:c", 7, "r1", PNG, "image/png", ["a", "b"])] * 2
    wish, authorization = server.asked[0]
    assert wish == {"prompt": "a lease", "n": 1, "size": "512x512", "response_format": "b64_json", "model": "m"}
    assert authorization == "Bearer k"


@pytest.mark.parametrize(
    ("status", "body", "error", "code"),
    [
        (400, {"error": "no"}, Reject, "image_refused"),
        (429, {}, RetryLater, "image_server_busy"),
        (500, {}, RetryLater, "image_server_error"),
        (200, b"<html>", RetryLater, "bad_answer"),
        (200, {"data": []}, RetryLater, "bad_answer"),
        (200, {"data": [{"b64_json": "%%"}]}, RetryLater, "bad_answer"),
        (200, image_body(b"<svg onload=alert(1)>"), Reject, "not_an_image"),
        (200, image_body(PNG + b"x" * 1_100), Reject, "image_too_large"),
    ],
)
async def test_what_is_no_image_is_not_kept(server: Server, status: int, body: Any, error: Any, code: str) -> None:
    """Refused for good, or tried again, with a reason for each."""
    kept = Kept()
    server.answer = (status, body)
    server.headers = {"retry-after": "7"}
    with pytest.raises(error) as refused:
        await run(kept, url=server.url, max_bytes=1_024)
    assert refused.value.code == code
    assert kept.images == []
    if code == "image_server_busy":
        assert refused.value.after_s == 7


async def test_a_server_that_is_away_costs_no_attempt() -> None:
    """Its operator is at work."""
    with pytest.raises(RetryLater) as refused:
        await run(Kept(), url="http://127.0.0.1:9")
    assert not refused.value.charged


async def test_without_a_server_the_stage_is_not_ready() -> None:
    """And says which setting is missing."""
    with pytest.raises(NotReady, match="PENSTOCK_IMAGES__URL"):
        await run(Kept())

"""The image stage: an image that follows a chat's reply, by a server that speaks OpenAI's `/v1/images/generations`.

The job begins when the reply has been sent, at low priority, and is nobody's way: the chat goes on meanwhile, and the
image comes as an event of its own. Failing, it is tried again like any job; in the end there is no image, and a dead
letter says why.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import TYPE_CHECKING, Final

import orjson
from prometheus_client import Counter

from pipeline.errors import ConfigError, NotReady, Reject, RetryLater
from pipeline.flows import ImagePayload
from pipeline.job import Done, Job
from pipeline.stage import Context, Stage
from stages.http import BrokenAnswer, HungUp, Pool, Response, Target, Unreachable

if TYPE_CHECKING:
    from pipeline.settings import ImagesSettings, Settings

KINDS: Final = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
"""What an image begins with, and what it is called: a browser is never told what the server calls it."""
SAID_CHARS: Final = 200  # of a refusal
KEEP_ALIVE_S: Final = 4.0

IMAGES = Counter("penstock_chat_images_total", "Images after replies of chats, by what became of them", ["outcome"])
for _outcome in ("kept", "already", "lost"):  # a counter that begins at 1 shows no increase
    IMAGES.labels(_outcome)


def build(settings: Settings) -> Stage:
    """Return the stage."""
    return Image(settings.images)


class Image(Stage):
    """Makes images."""

    name = "image"

    def __init__(self, settings: ImagesSettings) -> None:
        self.slots = settings.slots
        self._settings = settings
        self._context: Context
        self._pool: Pool | None = None
        self._target: Target

    async def start(self, context: Context) -> None:
        """Open the pool.

        Raises:
            NotReady: no server is named; nothing asks for images then.
            ConfigError: the API key cannot be sent in a header.
        """
        settings = self._settings
        if not settings.url:
            raise NotReady("no server makes images: PENSTOCK_IMAGES__URL names one")
        headers = {"content-type": "application/json", "accept": "application/json", "user-agent": "penstock"}
        if settings.api_key is not None:
            key = settings.api_key.get_secret_value()
            if not (key.isascii() and key.isprintable()):
                raise ConfigError("images.api_key holds characters that no HTTP header can carry")
            headers["authorization"] = f"Bearer {key}"
        self._context = context
        base = settings.url.rstrip("/")
        path = "/images/generations" if base.endswith("/v1") else "/v1/images/generations"
        self._target = Target.of(base + path, headers)
        self._pool = Pool(
            connect_timeout_s=settings.connect_timeout_s,
            keep_alive_s=KEEP_ALIVE_S,
            max_answer_bytes=2 * settings.max_bytes,  # as base64, and what stands around it
        )

    async def stop(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.close()

    async def handle(self, job: Job) -> Done:
        """Have an image made, keep it and tell of it.

        Raises:
            Reject: the server will never make this one, or what it makes is no image.
            RetryLater: it may later.
        """
        payload = ImagePayload.model_validate(job.payload)
        data = read_image(await self._post(job, payload), self._settings.max_bytes)
        kind = next(kind for beginning, kind in KINDS.items() if data.startswith(beginning))
        word = await self._context.chats.keep_image(
            payload.chat, payload.epoch, payload.message_id, data, kind, payload.message_ids
        )
        IMAGES.labels(word).inc()
        return Done({"image_id": payload.message_id, "ended": word, "bytes": len(data)})

    async def _post(self, job: Job, payload: ImagePayload) -> Response:
        assert self._pool is not None
        settings = self._settings
        wish = {"prompt": payload.prompt, "n": 1, "size": settings.size, "response_format": "b64_json"}
        body = orjson.dumps(wish | ({"model": settings.model} if settings.model else {}))
        try:
            async with asyncio.timeout(settings.timeout_s):
                response = await self._pool.post(self._target, job.id, body)
        except TimeoutError:
            raise RetryLater(f"no image came within {settings.timeout_s:g} s", code="image_timeout") from None
        except Unreachable as error:
            message = f"the image server cannot be reached: {error}"
            raise RetryLater(message, code="image_server_unreachable", charged=False) from error
        except (HungUp, BrokenAnswer) as error:
            raise RetryLater(f"the image server gave no whole answer: {error}", code="bad_answer") from error
        if response.status == 200:
            return response
        said = response.body[:SAID_CHARS].decode(errors="replace")
        message = f"the image server answered {response.status}: {said}"
        if response.status in {429, 503}:
            after = response.headers.get("retry-after", "")
            raise RetryLater(message, code="image_server_busy", after_s=float(after) if after.isdigit() else None)
        if response.status >= 500:
            raise RetryLater(message, code="image_server_error")
        raise Reject(message, code="image_refused")


def read_image(response: Response, most_bytes: int) -> bytes:
    """Return the image in an answer.

    Raises:
        RetryLater: there is none in it.
        Reject: it is too large, or of a kind that is not passed on.
    """
    try:
        data = base64.b64decode(orjson.loads(response.body)["data"][0]["b64_json"], validate=True)
    except (orjson.JSONDecodeError, binascii.Error, KeyError, IndexError, TypeError, ValueError) as error:
        raise RetryLater(f"the image server's answer holds no image: {error}", code="bad_answer") from error
    if len(data) > most_bytes:
        raise Reject(f"the image has {len(data)} bytes, and may have {most_bytes}", code="image_too_large")
    if not any(data.startswith(beginning) for beginning in KINDS):
        raise Reject("what the image server made is neither PNG nor JPEG nor WebP", code="not_an_image")
    return data

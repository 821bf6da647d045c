"""The stock openai client talks to a real mock replica: what it accepts, any OpenAI-compatible client should."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from pydantic import BaseModel

from loadtest.embedding import embed
from loadtest.extractive import answer, count_tokens
from loadtest.protocol import paint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.loadtest.conftest import Mock

PROMPT = "Sources:\n[1] France\nParis is the capital of France.\n\nQuestion: What is the capital of France?"
ASKED: list[Any] = [{"role": "system", "content": "Answer from the sources."}, {"role": "user", "content": PROMPT}]


@pytest.fixture
async def client(mock: Mock) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{mock.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_chat_is_answered_from_its_sources(client: openai.AsyncOpenAI) -> None:
    """The answer is a sentence of the sources, and usage counts words and punctuation marks."""
    completion = await client.chat.completions.create(
        model="m", messages=ASKED, extra_headers={"x-request-id": "job-7"}
    )
    choice = completion.choices[0]
    assert choice.message.content == answer(PROMPT) == "Paris is the capital of France. [1]"
    assert choice.finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == count_tokens(answer(PROMPT))
    assert completion.usage.prompt_tokens == sum(count_tokens(message["content"]) for message in ASKED)
    assert completion._request_id == "job-7"


async def test_a_stream_brings_the_plain_answer_token_by_token(client: openai.AsyncOpenAI) -> None:
    """Joined, the pieces are what the plain answer says; the last chunk carries the usage that was asked for."""
    stream = await client.chat.completions.create(
        model="m", messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == answer(PROMPT)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == count_tokens(answer(PROMPT)) == sum(map(bool, pieces))


async def test_an_answer_is_cut_at_max_tokens_and_says_so(client: openai.AsyncOpenAI) -> None:
    """The finish reason tells a cut answer from a whole one."""
    completion = await client.chat.completions.create(model="m", messages=ASKED, max_tokens=2)
    assert completion.choices[0].message.content == "Paris is"
    assert completion.choices[0].finish_reason == "length"


async def test_structured_answers_fit_the_schema_they_were_asked_for(client: openai.AsyncOpenAI) -> None:
    """The client's own parser accepts them."""

    class Capital(BaseModel):
        name: str
        sure: bool
        sources: list[int]

    completion = await client.chat.completions.parse(model="m", messages=ASKED, response_format=Capital)
    parsed = completion.choices[0].message.parsed
    assert parsed is not None
    assert parsed.name == answer(PROMPT)
    loose = await client.chat.completions.create(model="m", messages=ASKED, response_format={"type": "json_object"})
    assert json.loads(loose.choices[0].message.content or "") == {"answer": answer(PROMPT)}


async def test_embeddings_are_the_hash_vectors_in_either_encoding(client: openai.AsyncOpenAI) -> None:
    """The client asks for base64 by itself; plain floats are the same numbers."""
    texts = ["one text", "another"]
    packed = await client.embeddings.create(model="m", input=texts)
    plain = await client.embeddings.create(model="m", input=texts, encoding_format="float")
    assert [item.embedding for item in packed.data] == [embed(text, 256).tolist() for text in texts]
    assert [item.embedding for item in packed.data] == [item.embedding for item in plain.data]
    assert packed.usage.total_tokens == 3
    short = await client.embeddings.create(model="m", input="one text", dimensions=64)
    assert short.data[0].embedding == embed("one text", 64).tolist()


async def test_images_are_small_pngs_one_colour_for_each_prompt(client: openai.AsyncOpenAI) -> None:
    """As many as were asked for, as base64; a link to a file is refused, since none is kept."""
    made = await client.images.generate(model="m", prompt="a lease", n=2, response_format="b64_json")
    assert made.data is not None
    assert [base64.b64decode(image.b64_json or "") for image in made.data] == [paint("a lease")] * 2
    assert paint("a lease") != paint("a river")
    assert paint("a lease").startswith(b"\x89PNG\r\n\x1a\n")
    for param, wish in (("prompt", {"prompt": ""}), ("n", {"n": 11}), ("response_format", {"response_format": "url"})):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/images/generations", body={"model": "m", "prompt": "x"} | wish, cast_to=object)
        assert caught.value.param == param


async def test_models_are_listed_and_found_by_name(client: openai.AsyncOpenAI) -> None:
    """A client that looks first finds the model it may use."""
    assert [model.id async for model in client.models.list()] == ["m"]
    assert (await client.models.retrieve("m")).id == "m"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        await client.models.retrieve("other")


async def test_an_unknown_model_is_a_404_with_its_code(client: openai.AsyncOpenAI) -> None:
    """As from vLLM, when the model was spelled wrongly."""
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="other", messages=ASKED)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_a_bad_request_names_its_field(client: openai.AsyncOpenAI) -> None:
    """Each wrong field comes back in `param`, in OpenAI's form of an error."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("model", {"model": 7}),
        ("messages", {"messages": []}),
        ("messages.0.role", {"messages": [{"content": "x"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": 7}]}),
        ("max_tokens", {"max_tokens": 0}),
        ("n", {"n": 2}),
        ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ]
    for param, fields in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/chat/completions", body={"model": "m", "messages": ASKED, **fields}, cast_to=object)
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    cases = [
        ("input", {"input": []}),
        ("input", {"input": [""]}),
        ("dimensions", {"dimensions": 0}),
        ("encoding_format", {"encoding_format": "hex"}),
    ]
    for param, fields in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/embeddings", body={"model": "m", "input": "x", **fields}, cast_to=object)
        assert caught.value.param == param


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ({"fail_rate": 1}, openai.InternalServerError),
        ({"status": 503}, openai.InternalServerError),
        ({"status": 429, "retry_after_s": 2}, openai.RateLimitError),
        ({"status": 401}, openai.AuthenticationError),
        ({"mode": "truncated"}, openai.APIConnectionError),
    ],
)
async def test_each_failure_is_the_clients_own_error_for_it(
    client: openai.AsyncOpenAI, mock: Mock, behaviour: dict[str, Any], error: type[openai.OpenAIError]
) -> None:
    """Status codes and broken bodies come out as the exceptions that callers already catch."""
    await mock.behave(**behaviour)
    with pytest.raises(error) as caught:
        await client.chat.completions.create(model="m", messages=ASKED)
    if isinstance(caught.value, openai.RateLimitError):
        assert caught.value.response.headers["retry-after"] == "2"


async def test_a_stream_comes_at_its_pace_and_not_at_once(client: openai.AsyncOpenAI, mock: Mock) -> None:
    """Between the first token and the last lies the time that the tokens between them take."""
    loop = asyncio.get_running_loop()
    await mock.behave(tokens_per_second=50)
    tokens = count_tokens(answer(PROMPT))
    asked = loop.time()
    arrivals = [
        loop.time() - asked
        async for chunk in await client.chat.completions.create(model="m", messages=ASKED, stream=True)
        if chunk.choices[0].delta.content
    ]
    plain = loop.time()
    await client.chat.completions.create(model="m", messages=ASKED)
    plain = loop.time() - plain
    assert len(arrivals) == tokens
    # Lower bounds alone: a busy machine may be late, never early; a millisecond is the timers' grain.
    assert all(arrival >= n / 50 - 0.002 for n, arrival in enumerate(arrivals, start=1))
    assert plain >= tokens / 50 - 0.002

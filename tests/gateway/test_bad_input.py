"""Bad input gets a clear error, as JSON, with a request id, and leaves nothing behind."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from gateway.client import Client, GatewayRefused
from tests.gateway.conftest import Running, Start
from tests.gateway.fake import completed

WRONG_FIELDS: list[tuple[str, Any, str]] = [
    ("query missing", {}, "query"),
    ("query empty", {"query": ""}, "query"),
    ("query blank", {"query": " \n\t "}, "query"),
    ("query too long", {"query": "x" * 16_001}, "query"),
    ("query a number", {"query": 5}, "query"),
    ("query null", {"query": None}, "query"),
    ("unknown field", {"query": "?", "topk": 3}, "topk"),
    ("top_k text", {"query": "?", "top_k": "3"}, "top_k"),
    ("top_k fraction", {"query": "?", "top_k": 2.5}, "top_k"),
    ("top_k too small", {"query": "?", "top_k": 0}, "top_k"),
    ("top_k too large", {"query": "?", "top_k": 51}, "top_k"),
    ("model empty", {"query": "?", "model": ""}, "model"),
    ("timeout zero", {"query": "?", "timeout_s": 0}, "timeout_s"),
    ("timeout too long", {"query": "?", "timeout_s": 601}, "timeout_s"),
    ("timeout a switch", {"query": "?", "timeout_s": True}, "timeout_s"),
    ("priority unknown", {"query": "?", "priority": "urgent"}, "priority"),
    ("on_disconnect unknown", {"query": "?", "on_disconnect": "wait"}, "on_disconnect"),
    ("background text", {"query": "?", "background": "yes"}, "background"),
    ("metadata a list", {"query": "?", "metadata": []}, "metadata"),
    ("metadata nested", {"query": "?", "metadata": {"a": {"b": 1}}}, "metadata.a"),
    ("metadata too many", {"query": "?", "metadata": {str(n): n for n in range(65)}}, "metadata"),
]


@pytest.mark.parametrize(("body", "param"), [row[1:] for row in WRONG_FIELDS], ids=[row[0] for row in WRONG_FIELDS])
async def test_a_wrong_field_is_named_by_its_path(gateway: Running, body: Any, param: str) -> None:
    """422, `param` is the path, the message begins with it, and no job was made."""
    reply = await gateway.http.post("/query", json=body)
    assert reply.status_code == 422, reply.text
    error = _error(reply)
    assert (error["param"], error["code"], error["type"]) == (param, "invalid_field", "invalid_request")
    assert error["message"].startswith(f"{param}: ")
    assert gateway.front.jobs == {}


async def test_a_question_of_white_space_is_told_so(gateway: Running) -> None:
    """Not that it lacks characters, which it does not."""
    reply = await gateway.http.post("/query", json={"query": "   "})
    assert _error(reply)["message"] == "query: there is only white space in it"


async def test_the_client_names_a_field_once(start: Start) -> None:
    """Also where the message begins with it, as most do."""
    running = await start()
    async with Client(f"http://127.0.0.1:{running.address[1]}") as client:
        with pytest.raises(GatewayRefused, match=r"^top_k: (?!top_k)"):
            await client.send_once("POST", "/query", {"query": "?", "top_k": 0})


async def test_every_wrong_field_is_named_at_once(gateway: Running) -> None:
    """One round trip tells all that is wrong, in a message of bounded length."""
    reply = await gateway.http.post("/query", json={"top_k": 0, "priority": 1, "nonsense": 1})
    assert all(f"{name}: " in _error(reply)["message"] for name in ("query", "top_k", "priority", "nonsense"))
    flood = await gateway.http.post("/query", json={f"f{number}" + "x" * 500: 1 for number in range(1_000)})
    assert flood.status_code == 422
    assert len(flood.content) < 4_000


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "not_json"),
        (b"query=why", "not_json"),
        (b'{"query": "?"', "not_json"),
        (b'{"query": NaN}', "not_json"),
        (b'{"query": "\xff"}', "not_json"),
        (b'{"query": "\\ud800"}', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'["query"]', "not_an_object"),
        (b'"query"', "not_an_object"),
        (b"null", "not_an_object"),
    ],
)
async def test_a_body_that_is_no_json_object_is_400(gateway: Running, body: bytes, code: str) -> None:
    """Broken JSON, broken UTF-8, broken surrogates and bottomless nesting are all the sender's."""
    reply = await gateway.http.post("/query", content=body)
    assert (reply.status_code, _error(reply)["code"]) == (400, code)
    assert gateway.front.jobs == {}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "no_such_path"),
        ("GET", "/query/", 404, "no_such_path"),
        ("POST", "/queries", 404, "no_such_path"),
        ("GET", "/query/a/b/c", 404, "no_such_path"),
        ("GET", "/%ff%00", 404, "no_such_path"),
        ("GET", "/query", 405, "method_not_allowed"),
        ("PUT", "/documents", 405, "method_not_allowed"),
        ("OPTIONS", "/query", 405, "method_not_allowed"),
        ("GET", "/query/unknown", 404, "job_not_found"),
        ("GET", "/query/not%20an%20id", 404, "job_not_found"),
        ("GET", "/query/" + "x" * 129, 404, "job_not_found"),
        ("POST", "/query/unknown/cancel", 404, "job_not_found"),
        ("POST", "/query/%0a/cancel", 404, "job_not_found"),
    ],
)
async def test_a_path_or_method_that_is_none_is_a_json_error(
    gateway: Running, method: str, path: str, status: int, code: str
) -> None:
    """404 and 405 look like every other error."""
    reply = await gateway.http.request(method, path)
    assert (reply.status_code, _error(reply)["code"]) == (status, code)
    if status == 405:
        assert "POST" in reply.headers["allow"]


async def test_a_body_over_the_limit_is_413(start: Start) -> None:
    """Announced or not, it is refused, and the limit itself is accepted."""
    gateway = await start(max_body_bytes=4096)
    gateway.front.answer = completed
    frame = len(json.dumps({"query": ""}))
    fits = json.dumps({"query": "x" * (4096 - frame)}).encode()
    too_large = json.dumps({"query": "x" * (4097 - frame)}).encode()
    assert (len(fits), len(too_large)) == (4096, 4097)

    async def in_pieces(body: bytes) -> Any:
        for start_at in range(0, len(body), 1000):
            yield body[start_at : start_at + 1000]

    assert (await gateway.http.post("/query", content=fits)).status_code == 200
    assert (await gateway.http.post("/query", content=in_pieces(fits))).status_code == 200
    for content in (too_large, in_pieces(too_large)):
        reply = await gateway.http.post("/query", content=content)
        assert (reply.status_code, _error(reply)["code"]) == (413, "body_too_large")
    assert len(gateway.front.jobs) == 2


async def test_a_body_far_over_the_limit_still_gets_its_answer(start: Start) -> None:
    """What is refused is read on and thrown away, so that a client that sends first and reads then sees the 413."""
    gateway = await start(max_body_bytes=4096)
    reply = await gateway.http.post("/query", content=b"x" * (8 << 20))
    assert reply.status_code == 413
    assert (await gateway.http.get("/livez")).status_code == 200


async def test_a_request_id_is_kept_or_made(gateway: Running) -> None:
    """A valid one comes back; any other is replaced by one of ours."""
    kept = await gateway.http.get("/livez", headers={"x-request-id": "me:42"})
    assert kept.headers["x-request-id"] == "me:42"
    for bad in ("", "a b", "x" * 129, "\u00e9"):
        made = await gateway.http.get("/nowhere", headers=[(b"x-request-id", bad.encode())])
        assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])


async def test_an_unforeseen_fault_is_a_500_without_its_story(
    gateway: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log has the traceback and the request's id; the client has the id only."""

    def fault(*_: object) -> Any:
        raise ZeroDivisionError("inner details")

    gateway.front.answer = fault
    reply = await gateway.http.post("/query", json={"query": "?"})
    assert (reply.status_code, _error(reply)["code"]) == (500, "internal_error")
    assert "inner details" not in reply.text
    logged = capsys.readouterr().out
    assert "ZeroDivisionError" in logged
    assert reply.headers["x-request-id"] in logged


def _error(reply: Any) -> dict[str, Any]:
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    error: dict[str, Any] = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error

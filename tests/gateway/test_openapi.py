"""The description is made from what routes and validates."""

from __future__ import annotations

import re
from typing import Any

import pytest
from openapi_spec_validator import validate
from pydantic import TypeAdapter, ValidationError

from gateway import idempotency
from gateway.app import operations
from gateway.errors import TYPES
from gateway.jobs import JOB_ID, MAX_IDS
from pipeline.job import is_valid_id
from tests.gateway.conftest import Running

ABOUT_ITSELF = {"/openapi.json", "/docs"}


async def test_the_description_is_valid(gateway: Running) -> None:
    """By the published schema of OpenAPI 3.1."""
    described = (await gateway.http.get("/openapi.json")).json()
    validate(described)
    described["paths"]["/query"]["post"]["responses"]["200"].pop("description")
    with pytest.raises(Exception, match="description"):
        validate(described)


async def test_every_operation_is_described(gateway: Running) -> None:
    """Path by path and method by method, each with its answers and its errors."""
    described = (await gateway.http.get("/openapi.json")).json()
    assert described["openapi"].startswith("3.1")
    for operation in operations():
        if operation.path in ABOUT_ITSELF:
            continue
        row = described["paths"][operation.path][operation.method.lower()]
        assert row["summary"]
        assert {str(status) for status in operation.answers} <= row["responses"].keys()
        assert all(int(status) < 300 or int(status) in TYPES for status in row["responses"])
        in_path = [p for p in row.get("parameters", []) if p["in"] == "path"]
        assert [p["name"] for p in in_path] == re.findall(r"{(\w+)}", operation.path)
        assert all(p["description"] for p in row.get("parameters", []))


async def test_every_reference_leads_somewhere(gateway: Running) -> None:
    """No schema is named that is not there."""
    described = (await gateway.http.get("/openapi.json")).json()
    there = {f"#/components/{kind}/{name}" for kind, parts in described["components"].items() for name in parts}
    names = set(_references(described))
    wanted = {"schemas/QueryRequest", "schemas/QueryAnswer", "schemas/DocumentRequest", "schemas/ErrorAnswer"}
    assert {f"#/components/{name}" for name in wanted} <= names <= there


async def test_the_description_shows_the_bounds_that_validate(gateway: Running) -> None:
    """Limits of fields come from the models themselves."""
    schemas = (await gateway.http.get("/openapi.json")).json()["components"]["schemas"]
    query = schemas["QueryRequest"]["properties"]["query"]
    assert (query["minLength"], query["maxLength"]) == (1, 16_000)
    assert schemas["QueryRequest"]["additionalProperties"] is False
    assert schemas["DocumentRequest"]["required"] == ["id", "text"]


async def test_the_bounds_of_parameters_are_those_that_validate(gateway: Running) -> None:
    """An id, a list of ids, a key: each is described by the type that checks it."""
    paths = (await gateway.http.get("/openapi.json")).json()["paths"]
    (ids,) = paths["/jobs"]["get"]["parameters"]
    assert (ids["schema"]["minItems"], ids["schema"]["maxItems"]) == (1, MAX_IDS)
    (key,) = paths["/query"]["post"]["parameters"]
    assert key["schema"] == {"type": "string", "pattern": f"^[\\x21-\\x7e]{{1,{idempotency.MAX_CHARS}}}$"}
    (job_id,) = paths["/jobs/{job_id}"]["get"]["parameters"]
    assert job_id["schema"]["maxLength"] == 128
    for text in ("", "a" * 128, "a" * 129, "a b", "a\n", "A.1_b:c-d", "\u00e9", "a/b"):
        assert _is_valid(JOB_ID.type, text) == is_valid_id(text), repr(text)


async def test_an_example_is_accepted(gateway: Running) -> None:
    """What the description proposes works as it stands."""
    found = [operation for operation in operations() if operation.body]
    assert found
    for operation in found:
        reply = await gateway.http.request(operation.method, operation.path, json={**(operation.example or {}), "x": 1})
        assert reply.json()["error"]["message"] == "x: there is no such field", operation.path


def _references(value: Any) -> list[str]:
    match value:
        case {"$ref": str(reference)}:
            return [reference]
        case dict():
            return [name for part in value.values() for name in _references(part)]
        case list():
            return [name for part in value for name in _references(part)]
    return []


def _is_valid(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True

"""The description is made from what routes and validates."""

from __future__ import annotations

import re
from typing import Any

from gateway.app import operations
from gateway.errors import TYPES
from tests.gateway.conftest import Running


async def test_every_operation_is_described(gateway: Running) -> None:
    """Path by path and method by method, each with its answers and its errors."""
    described = (await gateway.http.get("/openapi.json")).json()
    assert described["openapi"].startswith("3.1")
    for operation in operations():
        if operation.path == "/openapi.json":
            continue
        row = described["paths"][operation.path][operation.method.lower()]
        assert row["summary"]
        assert {str(status) for status in operation.answers} <= row["responses"].keys()
        assert all(int(status) < 300 or int(status) in TYPES for status in row["responses"])
        assert [p["name"] for p in row.get("parameters", []) if p["in"] == "path"] == re.findall(
            r"{(\w+)}", operation.path
        )


async def test_every_reference_leads_somewhere(gateway: Running) -> None:
    """No schema is named that is not there."""
    described = (await gateway.http.get("/openapi.json")).json()
    schemas = described["components"]["schemas"]
    names = set(_references(described))
    assert {"QueryRequest", "QueryAnswer", "DocumentRequest", "ErrorAnswer"} <= names
    assert names <= schemas.keys()


async def test_the_description_shows_the_bounds_that_validate(gateway: Running) -> None:
    """Limits of fields come from the models themselves."""
    schemas = (await gateway.http.get("/openapi.json")).json()["components"]["schemas"]
    query = schemas["QueryRequest"]["properties"]["query"]
    assert (query["minLength"], query["maxLength"]) == (1, 16_000)
    assert schemas["QueryRequest"]["additionalProperties"] is False
    assert schemas["DocumentRequest"]["required"] == ["id", "text"]


def _references(value: Any) -> list[str]:
    match value:
        case {"$ref": str(reference)}:
            return [reference.removeprefix("#/components/schemas/")]
        case dict():
            return [name for part in value.values() for name in _references(part)]
        case list():
            return [name for part in value for name in _references(part)]
    return []

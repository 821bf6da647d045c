"""`/openapi.json`, made from the same rows and models that route and validate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from inspect import getdoc
from typing import Any, Final

import orjson
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from gateway.errors import TYPES
from gateway.operation import Operation
from pipeline.job import Json

_ANYWHERE: Final = (400, 408, 431, 500, 503)
_GUARDED: Final = (401, 429)
_CHANGING: Final = (403,)
_WITH_BODY: Final = (413, 422)
_REF: Final = "#/components/schemas/{model}"
_PARAMETER: Final = re.compile(r"\{(\w+)\}")

_MEANING: Final[dict[int, str]] = {
    200: "Done",
    202: "Accepted; to be done",
    400: "Not HTTP, or not JSON",
    401: "No API key, or none of ours",
    403: "Sent by a browser on behalf of another site",
    404: "Not found",
    408: "The request took too long to arrive",
    409: "Cancelled, or finished already",
    413: "The body is too large",
    422: "A field is wrong; `param` is its path",
    429: "The caller has too many jobs in flight",
    431: "The request's head is too large",
    500: "A fault of the gateway's own",
    502: "The job failed",
    503: "Overloaded, or Redis cannot be reached",
    504: "The job expired",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="for people")
    type: str = Field(description="class of failure")
    param: str | None = Field(description="path of the field at fault, e.g. `messages[17].prompt`")
    code: str = Field(description="for programs; stable")


class ErrorAnswer(BaseModel):
    """Every error looks like this."""

    error: ErrorDetail
    job_id: str | None = Field(None, description="the job this is about; absent where none was accepted")


def describe(operations: Sequence[Operation]) -> bytes:
    """Return the OpenAPI 3.1 description of *operations* as JSON."""
    requests = {operation.body for operation in operations if operation.body}
    answers = {model for operation in operations for model in operation.answers.values() if model} | {ErrorAnswer}
    _, schemas = models_json_schema(
        [
            *((model, "validation") for model in sorted(requests, key=lambda model: model.__name__)),
            *((model, "serialization") for model in sorted(answers, key=lambda model: model.__name__)),
        ],
        ref_template=_REF,
    )
    paths: dict[str, Json] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _describe_one(operation)
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Penstock",
                "version": _version(),
                "description": "A pipeline over Redis Streams that leads requests to language models.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "components": {
                "schemas": schemas["$defs"],
                "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


def _describe_one(operation: Operation) -> Json:
    summary, _, text = (getdoc(operation.run) or "").partition("\n")
    described: Json = {
        "operationId": _operation_id(operation),
        "summary": summary.rstrip("."),
        "tags": [operation.path.split("/")[1]],
        "responses": _responses(operation),
    }
    if text.strip():
        described["description"] = text.strip()
    parameters = _parameters(operation)
    if parameters:
        described["parameters"] = parameters
    if operation.body:
        content = {"application/json": {"schema": _ref(operation.body)}}
        described["requestBody"] = {"required": True, "content": content}
    if operation.guarded:
        described["security"] = [{"bearer": []}, {}]
    return described


def _operation_id(operation: Operation) -> str:
    words = [part.strip("{}") for part in operation.path.split("/") if part]
    return "_".join([operation.method.lower(), *words]).replace(".", "_")


def _responses(operation: Operation) -> Json:
    responses: Json = {}
    for status, model in operation.answers.items():
        responses[str(status)] = {"description": _MEANING[status]}
        if model:
            responses[str(status)]["content"] = {"application/json": {"schema": _ref(model)}}
    for status in sorted(errors_of(operation)):
        content = {"application/json": {"schema": _ref(ErrorAnswer)}}
        responses[str(status)] = {"description": _MEANING[status], "content": content}
    return responses


def errors_of(operation: Operation) -> set[int]:
    """Return every error status that *operation* may answer."""
    statuses = {*_ANYWHERE, *operation.errors}
    if operation.guarded:
        statuses |= {*_GUARDED}
    if operation.method != "GET":
        statuses |= {*_CHANGING}
    if operation.body:
        statuses |= {*_WITH_BODY}
    assert statuses <= TYPES.keys()
    return statuses


def _parameters(operation: Operation) -> list[Json]:
    parameters: list[Json] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(operation.path)
    ]
    parameters += [
        {
            "name": parameter.name,
            "in": "query",
            "required": parameter.required,
            "description": parameter.description,
            "schema": {"type": "string"},
        }
        for parameter in operation.parameters
    ]
    if operation.idempotent:
        text = "the same key and body within 24 h repeat the first answer instead of doing the work again"
        schema: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": 255}
        parameters.append({"name": "Idempotency-Key", "in": "header", "description": text, "schema": schema})
    return parameters


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": _REF.format(model=model.__name__)}


def _version() -> str:
    try:
        return version("penstock")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0"

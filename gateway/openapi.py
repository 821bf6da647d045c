"""The description of the API, made from the same rows and models that route and validate.

`/openapi.json` shows it to programs, `/docs` to people (`gateway.page`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from inspect import getdoc
from typing import Final

from pydantic import BaseModel, Field, TypeAdapter
from pydantic.json_schema import models_json_schema

from gateway import idempotency
from gateway.errors import TYPES
from gateway.operation import Operation, Parameter
from pipeline.job import Json

_ANYWHERE: Final = (400, 408, 431, 500, 503)
_GUARDED: Final = (401, 403, 429)
_CHANGING: Final = (403,)
_WITH_BODY: Final = (413, 422)
_WITH_PARAMETER: Final = (404,)  # an id with a slash in it leads nowhere
_RETRY_AFTER: Final = frozenset({429, 503})
_TEXT: Final[Json] = {"type": "string"}
_REF: Final = "#/components/schemas/{model}"
_PARAMETER: Final = re.compile(r"\{(\w+)\}")

_MEANING: Final[dict[int, str]] = {
    200: "Done",
    202: "Accepted; to be done",
    400: "Not HTTP, or not JSON",
    401: "No API key, or none of ours",
    403: "The API key was revoked, a vendor's signature is missing or wrong, or a browser sends this for another site",
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


_HEADERS: Final[Json] = {
    "RequestId": {
        "description": "names the request in the gateway's log: the caller's own `x-request-id`, or one made here",
        "required": True,
        "schema": {"type": "string"},
    },
    "RetryAfter": {"description": "seconds after which trying again may help", "schema": {"type": "integer"}},
}


def describe(operations: Sequence[Operation]) -> Json:
    """Return the OpenAPI 3.1 description of *operations*."""
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
    return {
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
            "headers": _HEADERS,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe_one(operation: Operation) -> Json:
    summary, _, text = (getdoc(operation.run) or "").partition("\n")
    described: Json = {
        "operationId": _operation_id(operation),
        "summary": summary.rstrip("."),
        "tags": [operation.path.split("/")[1] if operation.guarded else "health"],
        "responses": _responses(operation),
    }
    if text.strip():
        described["description"] = text.strip()
    parameters = _parameters(operation)
    if parameters:
        described["parameters"] = parameters
    if operation.body:
        media: Json = {"schema": _ref(operation.body)}
        if operation.example is not None:
            media["example"] = operation.example
        described["requestBody"] = {"required": True, "content": {"application/json": media}}
    if operation.guarded:
        described["security"] = [{"bearer": []}, {}]
    return described


def _operation_id(operation: Operation) -> str:
    words = [part.strip("{}") for part in operation.path.split("/") if part]
    return "_".join([operation.method.lower(), *words]).replace(".", "_")


def _responses(operation: Operation) -> Json:
    answers: dict[int, type[BaseModel] | None] = {**operation.answers}
    answers.update((status, ErrorAnswer) for status in sorted(errors_of(operation)))
    return {str(status): _response(status, model, operation.media) for status, model in answers.items()}


def _response(status: int, model: type[BaseModel] | None, media: str) -> Json:
    headers = {"x-request-id": {"$ref": "#/components/headers/RequestId"}}
    if status in _RETRY_AFTER:
        headers["retry-after"] = {"$ref": "#/components/headers/RetryAfter"}
    content: Json = {"application/json": {"schema": _ref(model)}} if model else {media: {"schema": _TEXT}}
    return {"description": _MEANING[status], "headers": headers, "content": content}


def errors_of(operation: Operation) -> set[int]:
    """Return every error status that *operation* may answer."""
    statuses = {*_ANYWHERE, *operation.errors}
    if operation.guarded:
        statuses |= {*_GUARDED}
    if operation.method != "GET":
        statuses |= {*_CHANGING}
    if operation.body:
        statuses |= {*_WITH_BODY}
    if _PARAMETER.search(operation.path):
        statuses |= {*_WITH_PARAMETER}
    assert statuses <= TYPES.keys()
    return statuses


def _parameters(operation: Operation) -> list[Json]:
    in_path = _PARAMETER.findall(operation.path)
    known = {parameter.name: parameter for parameter in operation.parameters}
    rows = [*(known.get(name, Parameter(name, "")) for name in in_path)]
    rows += [parameter for parameter in operation.parameters if parameter.name not in in_path]
    parameters = [_parameter(row, "path" if row.name in in_path else "query") for row in rows]
    if operation.idempotent:
        hours = idempotency.TTL_S / 3600
        text = f"the same key and body within {hours:g} h repeat the first answer instead of doing the work again"
        parameters.append(_parameter(Parameter("Idempotency-Key", text, type=idempotency.Key), "header"))
    return parameters


def _parameter(parameter: Parameter, place: str) -> Json:
    schema = TypeAdapter(parameter.type).json_schema()
    described: Json = {
        "name": parameter.name,
        "in": place,
        "required": parameter.required or place == "path",
        "description": parameter.description,
        "schema": schema,
    }
    if schema.get("type") == "array":
        described |= {"style": "form", "explode": False}
    return described


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": _REF.format(model=model.__name__)}


def _version() -> str:
    try:
        return version("penstock")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0"

"""`/docs`: the description of the API as one page that people read, and that asks nobody outside.

Made from what `/openapi.json` says, so it knows nothing of its own. Style and script are written into the page, and its
Content-Security-Policy names them by their hashes and forbids everything else: nothing is loaded from anywhere, and a
text from the description that found its way into the markup could not run. The script sends the reader's own tries to
this gateway; the page is whole without it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from html import escape
from importlib import resources
from typing import Final

import orjson

from gateway.errors import Headers
from pipeline.job import Json

CONTENT_TYPE: Final = b"text/html; charset=utf-8"

_BOUNDS: Final = (
    ("minLength", "maxLength", " characters"),
    ("minItems", "maxItems", " of them"),
    ("minProperties", "maxProperties", " entries"),
    ("minimum", "maximum", ""),
)
_CODE: Final = re.compile(r"`([^`]+)`")


def render(description: Json) -> bytes:
    """Return the page for an OpenAPI description as `gateway.openapi` makes it."""
    info = description["info"]
    groups: dict[str, list[str]] = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            groups.setdefault(operation["tags"][0], []).append(_operation(method, path, operation))
    models = (_model(name, schema) for name, schema in description["components"]["schemas"].items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(info["title"])}: the HTTP API</title>
<style>{_asset("page.css")}</style>
</head>
<body>
<header>
<h1>{escape(info["title"])} <small>{escape(info["version"])}</small></h1>
<p>{_prose(info["description"])} For programs: <a href="/openapi.json">openapi.json</a>.</p>
<label>API key, where the gateway asks for one; it stays in this page
<input id="key" type="password" autocomplete="off" spellcheck="false"></label>
</header>
<main>
{"".join(f"<h2>{escape(tag)}</h2>{''.join(operations)}" for tag, operations in groups.items())}
<h2>models</h2>
{"".join(models)}
</main>
<script>{_asset("page.js")}</script>
</body>
</html>
""".encode()


def headers() -> Headers:
    """Return what keeps a browser from loading anything for this page, from anywhere."""
    policy = (
        "default-src 'none'",
        f"style-src {_hash('page.css')}",
        f"script-src {_hash('page.js')}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return [
        (b"content-security-policy", "; ".join(policy).encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]


@cache
def _asset(name: str) -> str:
    return resources.files("gateway").joinpath(name).read_text()


def _hash(name: str) -> str:
    digest = base64.b64encode(hashlib.sha256(_asset(name).encode()).digest()).decode()
    return f"'sha256-{digest}'"


# --- Operations --------------------------------------------------------------------------------


def _operation(method: str, path: str, operation: Json) -> str:
    parameters = operation.get("parameters", [])
    media = operation.get("requestBody", {}).get("content", {}).get("application/json")
    parts = [_prose(paragraph) for paragraph in operation.get("description", "").split("\n\n") if paragraph]
    inside = "".join(f"<p>{part}</p>" for part in parts)
    if parameters:
        inside += "<h3>Parameters</h3>" + _list(_parameter(parameter) for parameter in parameters)
    if media:
        inside += f"<h3>Body</h3><p>JSON: {_type(media['schema'])}</p>"
    answers = (_answer(status, answer) for status, answer in operation["responses"].items())
    inside += "<h3>Answers</h3>" + _list(answers, "narrow")
    inside += "<h3>Try it</h3>" + _form(method, path, parameters, media)
    return (
        f'<details id="{escape(operation["operationId"])}"><summary><b class="{method}">{method.upper()}</b> '
        f"<code>{escape(path)}</code> <span>{_prose(operation['summary'])}</span></summary>"
        f'<div class="inside">{inside}</div></details>\n'
    )


def _parameter(parameter: Json) -> tuple[str, str]:
    need = "required" if parameter["required"] else "optional"
    place = f"in the {parameter['in']}, {need}"
    text = f"{_type(parameter['schema'])}<br>{_prose(parameter['description'])}"
    return f"<code>{escape(parameter['name'])}</code> <small class=type>{place}</small>", text


def _answer(status: str, answer: Json) -> tuple[str, str]:
    bodies = [
        _type(media["schema"]) if kind == "application/json" else f"<code>{escape(kind)}</code>"
        for kind, media in answer["content"].items()
    ]
    return f"<code>{status}</code>", f"{_prose(answer['description'])} <small>{', '.join(bodies)}</small>"


def _form(method: str, path: str, parameters: list[Json], media: Json | None) -> str:
    fields = ""
    for parameter in parameters:
        name = escape(parameter["name"])
        required = " required" if parameter["required"] else ""
        fields += f'<label>{name}<input name="{name}" data-in="{parameter["in"]}"{required}></label>'
    if media:
        example = orjson.dumps(media.get("example", {}), option=orjson.OPT_INDENT_2).decode()
        fields += f'<label>body<textarea spellcheck="false">{escape(example)}</textarea></label>'
    return (
        f'<form data-method="{method.upper()}" data-path="{escape(path)}">{fields}'
        '<button>Send</button><output aria-live="polite"></output></form>'
    )


# --- Models ------------------------------------------------------------------------------------


def _model(name: str, schema: Json) -> str:
    required = set(schema.get("required", ()))
    fields = _list(_field(key, value, key in required) for key, value in schema.get("properties", {}).items())
    fields = fields if schema.get("properties") else f"<p>{_type(schema)}</p>"
    text = "".join(f"<p>{_prose(part)}</p>" for part in schema.get("description", "").split("\n\n") if part)
    # The id stands inside, so that following a link to it opens what is folded.
    return (
        f"<details><summary><code>{escape(name)}</code></summary>"
        f'<div class="inside" id="{escape(name)}">{text}{fields}</div></details>\n'
    )


def _field(name: str, schema: Json, required: bool) -> tuple[str, str]:
    mark = " <small class=type>required</small>" if required else ""
    text = _type(schema)
    if schema.get("default") is not None:
        text += f", <span class=type>default</span> {_value(schema['default'])}"
    if "description" in schema:
        text += f"<br>{_prose(schema['description'])}"
    return f"<code>{escape(name)}</code>{mark}", text


def _type(schema: Json) -> str:
    """Return a schema in words, with links to the models it names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(_value(value) for value in schema["enum"])
    if "const" in schema:
        return _value(schema["const"])
    kind = escape(str(schema.get("type", "anything")))
    if kind == "array":
        kind = f"list of {_type(schema.get('items', {}))}"
    elif isinstance(inner := schema.get("additionalProperties"), dict):
        kind = f"object of {_type(inner)}"
    return f"<span class=type>{', '.join([kind, *_bounds(schema)])}</span>"


def _bounds(schema: Json) -> Iterator[str]:
    if "exclusiveMinimum" in schema:
        yield f"above {_number(schema['exclusiveMinimum'])}"
    for low, high, unit in _BOUNDS:
        if low in schema and high in schema:
            yield f"{_number(schema[low])} to {_number(schema[high])}{unit}"
        elif low in schema:
            yield f"{_number(schema[low])}{unit} or more"
        elif high in schema:
            yield f"at most {_number(schema[high])}{unit}"
    if "pattern" in schema:
        yield f"matching {_value(schema['pattern'])}"


# --- Words -------------------------------------------------------------------------------------


def _list(rows: Iterator[tuple[str, str]], kind: str = "") -> str:
    return f'<dl class="{kind}">' + "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in rows) + "</dl>"


def _value(value: object) -> str:
    return f"<code>{escape(orjson.dumps(value).decode() if not isinstance(value, str) else value)}</code>"


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _prose(text: str) -> str:
    """Return plain text as markup; what stands between backticks is code."""
    return _CODE.sub(r"<code>\1</code>", escape(text.replace("\n", " ")))

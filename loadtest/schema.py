"""A JSON value for a JSON schema, without a model: every string that is free says the same text.

Understood: type, properties, required, items, prefixItems, enum, const, default, anyOf and oneOf (the first that
works), allOf (merged), `$ref` inside the document, bounds of numbers, lengths and counts, and the formats date,
date-time, time, email, uri and uuid. `pattern` and other formats are not obeyed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_DEPTH = 32
_FULL_DEPTH = 6  # below this only what is required is filled in: a tree that may hold trees has to end
_NESTING = ("$ref", "properties", "items", "prefixItems", "anyOf", "oneOf", "allOf")

_FORMATS = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "email": "someone@example.org",
    "uri": "https://example.org/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def fill(schema: Mapping[str, Any], text: str) -> Any:
    """Return a value that *schema* accepts, with *text* in its free strings.

    Raises:
        ValueError: no value can be made: an unknown type, an empty enum, a `$ref` that leads nowhere or round for ever.
    """
    return _Filler(schema, text).value(schema, 0)


class _Filler:
    def __init__(self, root: Mapping[str, Any], text: str) -> None:
        self._root = root
        self._text = text

    def value(self, schema: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("the schema requires values inside values without an end")
        if schema is True or schema == {}:
            return self._text
        if not isinstance(schema, dict):
            raise ValueError(f"not a schema: {schema!r}")  # noqa: TRY004 - what a client sent, no caller's mistake
        for name in ("const", "default"):
            if name in schema:
                return schema[name]
        if "enum" in schema:
            if not schema["enum"]:
                raise ValueError("an enum without values accepts nothing")
            return schema["enum"][0]
        if "$ref" in schema:
            return self.value({**self._resolve(schema["$ref"]), **_without(schema, "$ref")}, depth + 1)
        if "allOf" in schema:
            return self.value(self._merge(schema), depth + 1)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._first_of(schema[name], _without(schema, name), depth)
        return self._typed(schema, depth)

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type") or (
            "object" if "properties" in schema else "array" if "items" in schema else "string"
        )
        match kind[0] if isinstance(kind, list) else kind:
            case "object":
                required = schema.get("required", [])
                properties = schema.get("properties", {})
                names = [name for name in properties if name in required or depth < _FULL_DEPTH]
                names += [name for name in required if name not in properties]
                return {name: self.value(properties.get(name, True), depth + 1) for name in names}
            case "array":
                return self._array(schema, depth)
            case "string":
                return self._string(schema)
            case "integer" | "number" as number:
                return _number(schema, whole=number == "integer")
            case "boolean":
                return True
            case "null":
                return None
            case unknown:
                raise ValueError(f"unknown type {unknown!r} in the schema")

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        leading = schema.get("prefixItems", [])
        at_least = schema.get("minItems", 0)
        wanted = max(at_least, len(leading), 1 if depth < _FULL_DEPTH else 0)
        wanted = min(wanted, schema.get("maxItems", wanted))
        items = schema.get("items", True)
        return [self.value(leading[n] if n < len(leading) else items, depth + 1) for n in range(wanted)]

    def _string(self, schema: dict[str, Any]) -> str:
        text = _FORMATS.get(schema.get("format", ""), self._text)
        return text.ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength")]

    def _first_of(self, choices: list[Any], rest: dict[str, Any], depth: int) -> Any:
        problem = ValueError("a choice without alternatives accepts nothing")
        # Deep down the plainest goes first: a tree whose every node may have two more would double at each step.
        for choice in sorted(choices, key=_is_nested) if depth >= _FULL_DEPTH else choices:
            try:
                return self.value({**rest, **choice} if isinstance(choice, dict) else choice, depth + 1)
            except ValueError as error:
                problem = error
        raise problem

    def _merge(self, schema: dict[str, Any]) -> dict[str, Any]:
        merged: dict[str, Any] = _without(schema, "allOf")
        for part in schema["allOf"]:
            if "$ref" in part:
                part = {**self._resolve(part["$ref"]), **_without(part, "$ref")}
            properties = {**merged.get("properties", {}), **part.get("properties", {})}
            required = [*merged.get("required", []), *part.get("required", [])]
            merged |= part
            if properties:
                merged["properties"] = properties
            if required:
                merged["required"] = required
        return merged

    def _resolve(self, ref: Any) -> dict[str, Any]:
        node: Any = self._root
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise ValueError(f"$ref {ref!r} leads out of the schema")
        for part in ref.removeprefix("#").split("/")[1:]:
            try:
                node = node[part.replace("~1", "/").replace("~0", "~")]
            except (KeyError, TypeError):
                raise ValueError(f"$ref {ref!r} leads nowhere") from None
        return dict(node)


def _number(schema: dict[str, Any], *, whole: bool) -> float:
    step = schema.get("multipleOf") or (1 if whole else 0)
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    if step:
        # The multiple nearest to 0 that lies within the bounds.
        first = max(_steps(low, step, math.ceil), _steps(above, step, math.floor) + 1)
        last = min(_steps(high, step, math.floor), _steps(below, step, math.ceil) - 1)
        if first > last:
            raise ValueError("no number lies between the schema's bounds")
        return step * int(min(max(0, first), last))
    first, last = max(low, above), min(high, below)
    number = min(max(0.0, first), last)
    if number in (above, below):  # on a bound that is itself shut out: go inside, half-way where there is an other end
        number = (first + last) / 2 if math.isfinite(first + last) else above + 1 if number == above else below - 1
    if not (low <= number <= high and above < number < below):
        raise ValueError("no number lies between the schema's bounds")
    return float(number)


def _steps(bound: float, step: float, rounding: Callable[[float], int]) -> float:
    return rounding(bound / step) if math.isfinite(bound) else bound


def _is_nested(schema: Any) -> bool:
    return isinstance(schema, dict) and not schema.keys().isdisjoint(_NESTING)


def _without(schema: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != name}

"""Values for JSON schemas; pydantic, which writes the schemas, also judges what was made of them."""

from __future__ import annotations

from datetime import date, datetime
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from loadtest.schema import fill


class Mood(Enum):
    GLAD = "glad"
    SAD = "sad"


class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, Field(min_length=3, max_length=20)]
    rank: Annotated[int, Field(gt=2, le=10, multiple_of=2)]
    share: Annotated[float, Field(gt=0, lt=1)]
    mood: Mood
    kind: Literal["a", "b"]


class Tree(BaseModel):
    name: str
    left: Tree | None
    right: Tree | None
    more: list[Tree]


class Plan(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: Annotated[list[Step], Field(min_length=2, max_length=3)]
    by: AwareDatetime
    on: date
    pair: tuple[int, str]
    extra: dict[str, int]
    either: int | str
    note: str | None = None
    sure: bool


@pytest.mark.parametrize("model", [Step, Tree, Plan])
def test_a_value_is_valid_for_the_schema_it_was_made_for(model: type[BaseModel]) -> None:
    """Nested, referenced and recursive models get something they accept."""
    model.model_validate(fill(model.model_json_schema(), "Paris is the capital."))


def test_free_strings_say_the_text() -> None:
    """An extractive answer goes through a structured one."""
    assert fill({"type": "object", "properties": {"answer": {"type": "string"}}}, "Paris.") == {"answer": "Paris."}


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(1, 9), st.booleans())
def test_whole_numbers_keep_their_bounds_and_steps(low: int, high: int, step: int, shut: bool) -> None:
    """Inside the bounds, on a step, or refused when there is no such number."""
    names = ("exclusiveMinimum", "exclusiveMaximum") if shut else ("minimum", "maximum")
    schema = {"type": "integer", names[0]: low, names[1]: high, "multipleOf": step}
    fitting = [n for n in range(low + shut, high + 1 - shut) if n % step == 0]
    if fitting:
        assert fill(schema, "") in fitting
    else:
        with pytest.raises(ValueError, match="no number"):
            fill(schema, "")


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_numbers_lie_inside_bounds_that_are_shut_out(low: float, high: float) -> None:
    """An exclusive bound is not met by the bound itself."""
    assume(high - low > 1e-3)
    assert low < fill({"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}, "") < high


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "colour"},
        {"enum": []},
        {"anyOf": []},
        {"$ref": "#/$defs/nowhere"},
        {"$ref": "https://example.org/schema"},
        {"$ref": "#"},
        {"type": "object", "properties": {"again": {"$ref": "#"}}, "required": ["again"]},
    ],
)
def test_a_schema_that_accepts_nothing_is_refused(schema: dict[str, Any]) -> None:
    """References that lead nowhere, or round for ever, end in an error and not in a hang."""
    with pytest.raises(ValueError):
        fill(schema, "")


def test_parts_of_all_of_are_taken_together() -> None:
    """Inheritance as some generators write it."""
    schema = {
        "$defs": {"named": {"type": "object", "properties": {"name": {"const": "x"}}, "required": ["name"]}},
        "allOf": [{"$ref": "#/$defs/named"}, {"properties": {"on": {"format": "date"}}, "required": ["on"]}],
    }
    made = fill(schema, "t")
    assert made["name"] == "x"
    assert datetime.fromisoformat(made["on"])

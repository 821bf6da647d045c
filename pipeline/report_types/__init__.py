"""The kinds of reports, one file each: dropping a file in here adds one, called like the file.

A kind says what it is asked with, what the model has to answer, how it is asked, which collection of the index it knows
from, and how the finished report looks as Markdown. It is a value of plain functions: it knows no Redis, no HTTP and no
job, and needs no change anywhere else.

What is said of wrong values names fields and quotes none: it appears in answers, and in listings of dead letters.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Final, Generic, TypeVar, cast

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import Reject, WrongField
from pipeline.flows import describe, field_path, plain_message
from pipeline.job import Json

In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)

SOURCES: Final = "Sources:"
Cited = Annotated[
    list[int],
    Field(
        description="numbers of the sources that this rests on; empty when on none", json_schema_extra={"cites": True}
    ),
]
"""Numbers of sources. The schema that a model is given allows those that there are."""


class Strict(BaseModel):
    """What inputs and reports are made of: unknown fields are refused, texts lose the blanks around them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, str_strip_whitespace=True)


@dataclass(frozen=True, slots=True)
class Source:
    """One passage of the knowledge base; the model cites it by its number."""

    number: int
    title: str
    document: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Written(Generic[In, Out]):
    """A finished report with what a reader must know of it.

    Attributes:
        on: the day it was written, `2026-11-29`.
    """

    inputs: In
    content: Out
    sources: Sequence[Source]
    model: str
    on: str
    language: str


@dataclass(frozen=True, slots=True)
class ReportType(Generic[In, Out]):
    """One kind of report.

    Attributes:
        version: raise it when reports written before should not serve any more although the model would be asked the
            same (a change of what it is asked is seen without).
        collection: what `penstock ingest --collection` filled; None: no knowledge base.
        top_k: passages at most.
        query: what the knowledge base is searched for.
        instructions: what the model is told to do, in one text; the form of the answer and the sources are added.
        question: what the model is given to do it with.
        check: what is wrong with an answer that fits its model; None: nothing. It is given the number of sources.
        markdown: the report for people.
    """

    name: str
    version: int
    inputs: type[In]
    report: type[Out]
    collection: str | None
    top_k: int
    query: Callable[[In], str]
    instructions: Callable[[str], str]
    question: Callable[[In], str]
    check: Callable[[Out, int], str | None]
    markdown: Callable[[Written[In, Out]], str]

    def schema(self, sources: int) -> Json:
        """Return the JSON schema of the model's answer, where there are so many sources."""
        return _schema(self.report, sources)

    def response_format(self, sources: int) -> Json:
        """Return the form of the answer, as OpenAI's protocol asks for it."""
        return {
            "type": "json_schema",
            "json_schema": {"name": self.name, "strict": True, "schema": self.schema(sources)},
        }

    def read_inputs(self, given: Json, prefix: str = "") -> In:
        """Return the inputs in *given*.

        Args:
            prefix: put before the paths of wrong fields.

        Raises:
            WrongField: some are missing, unknown or cannot be.
        """
        try:
            return self.inputs.model_validate(given)
        except ValidationError as error:
            paths = [prefix + field_path(item["loc"]) for item in error.errors()]
            lines = [
                f"{path}: {plain_message(e['type'], e['msg'])}" for path, e in zip(paths, error.errors(), strict=True)
            ]
            raise WrongField("; ".join(lines[:10]), param=paths[0]) from None

    def ask(self, inputs: In, sources: Sequence[Source], language: str) -> list[Json]:
        """Return the turns that ask the model for this report."""
        schema = orjson.dumps(self.schema(len(sources))).decode()
        instructions = (
            f"{self.instructions(language)}\n\nAnswer with one JSON object and nothing else. Its schema: {schema}"
        )
        listing = "\n\n".join(f"[{source.number}] {source.title}\n{source.text}" for source in sources)
        material = f"{SOURCES}\n{listing or '(none were found)'}\n\nQuestion: {self.question(inputs)}"
        return [{"role": "system", "content": instructions}, {"role": "user", "content": material}]

    def read_answer(self, text: str, sources: int) -> Out:
        """Return the report in the model's answer; what a model thought, or said, around it is let pass.

        Raises:
            Reject: it is none; the message says why, for the model that is asked once more.
        """
        try:
            content = self.report.model_validate(_object_in(text))
        except orjson.JSONDecodeError as error:
            raise Reject(f"the answer is not JSON: {error.msg}", code="invalid_output") from None
        except ValidationError as error:
            raise Reject(describe(error), code="invalid_output") from None
        if problem := self.check(content, sources):
            raise Reject(problem, code="invalid_output")
        return content


@cache
def _schema(report: type[BaseModel], sources: int) -> Json:
    """Return the schema of *report*; it takes milliseconds to make, and is asked for with each look for a report."""
    return cast("Json", _bounded(report.model_json_schema(), sources))


def _bounded(schema: Any, sources: int) -> Any:
    """Return a copy of *schema* in which every `Cited` allows the sources there are, and nothing else."""
    if isinstance(schema, list):
        return [_bounded(part, sources) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = {name: _bounded(part, sources) for name, part in schema.items() if name not in _UNSENT}
    if schema.get("cites") is True:
        bounded |= {"items": {"type": "integer", "minimum": 1, "maximum": sources}} if sources else {"maxItems": 0}
    return bounded


_UNSENT: Final = frozenset({"cites", "minLength", "maxLength"})
"""Our own mark, and what OpenAI refuses in a strict schema; lengths are checked when the answer is read."""


def _object_in(text: str) -> Any:
    """Return the JSON in *text*: all of it, else from the first brace after the model's thoughts to the last one.

    Raises:
        orjson.JSONDecodeError: there is none.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        said = text.rpartition("</think>")[2]
        first, last = said.find("{"), said.rfind("}")
        if not 0 <= first < last:
            raise
        return orjson.loads(said[first : last + 1])


@cache
def all_types() -> dict[str, ReportType[Any, Any]]:
    """Return every kind there is, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").TYPE for name in names}


def find(name: str) -> ReportType[Any, Any]:
    """Return the kind of that name.

    Raises:
        WrongField: there is none.
    """
    kind = all_types().get(name)
    if kind is None:
        raise WrongField(
            f"report_type: there is none of that name; known are {', '.join(all_types())}", param="report_type"
        )
    return kind

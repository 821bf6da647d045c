"""Kinds of reports: what they take, what they ask, what they accept, and how they look."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadtest.schema import fill
from pipeline import report_types
from pipeline.errors import Reject, WrongField
from pipeline.report_types import Source, Written, medical

MEDICAL = medical.TYPE
PATIENT: dict[str, Any] = {"age": 44, "sex": "female", "symptoms": ["headache"]}
SOURCES = [Source(1, "Headache", "headache.md", "It hurts."), Source(2, "Vision", "vision.md", "It blurs.")]


def report(**changes: Any) -> dict[str, Any]:
    """A good answer of the model, with changes."""
    return {
        "summary": "A woman of 44 with headache.",
        "findings": [{"finding": "Headache", "meaning": "It hurts.", "sources": [1]}],
        "assessment": "Unsure.",
        "recommendations": [
            {"what": "Measure again.", "urgency": "routine", "sources": []},
            {"what": "Look at the eyes.", "urgency": "urgent", "sources": [1, 2]},
        ],
        "warning_signs": ["Weakness of one side"],
        "missing": ["Blood pressure"],
    } | changes


def rendered(inputs: dict[str, Any] | None = None, sources: list[Source] | None = None, **changes: Any) -> str:
    """The Markdown of a report."""
    content = MEDICAL.read_answer(orjson.dumps(report(**changes)).decode(), 2)
    some = SOURCES if sources is None else sources
    written = Written(MEDICAL.read_inputs(PATIENT | (inputs or {})), content, some, "a-model", "2026-11-29", "en")
    return MEDICAL.markdown(written)


def test_every_file_is_a_kind() -> None:
    """Dropping one in is all; it is called like its file."""
    folder = Path(report_types.__path__[0])
    assert set(report_types.all_types()) == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    for name, kind in report_types.all_types().items():
        assert kind.name == name
        assert kind.version >= 1


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    """As a field of the request."""
    with pytest.raises(WrongField, match="known are medical") as caught:
        report_types.find("horoscope")
    assert caught.value.param == "report_type"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"age": -3}, "age"),
        ({"age": 131}, "age"),
        ({"age": "44"}, "age"),
        ({"age": True}, "age"),
        ({"sex": "f"}, "sex"),
        ({"symptoms": []}, "symptoms"),
        ({"symptoms": ["  "]}, "symptoms[0]"),
        ({"vitals": {"heart_rate_bpm": 999}}, "vitals.heart_rate_bpm"),
        ({"labs": [{"name": "HbA1c", "value": float("nan")}]}, "labs[0].value"),
        ({"shoe_size": 39}, "shoe_size"),
    ],
)
def test_absurd_values_are_refused_by_name_and_not_quoted(changes: dict[str, Any], param: str) -> None:
    """What is said of them appears where others may read it."""
    with pytest.raises(WrongField) as caught:
        MEDICAL.read_inputs(PATIENT | changes | {"notes": "Zyxwquorn"}, "inputs.")
    assert caught.value.param == f"inputs.{param}"
    assert str(caught.value).startswith(f"inputs.{param}: ")
    assert "Zyxwquorn" not in str(caught.value)


@pytest.mark.parametrize("sources", [0, 1, 7])
def test_the_schema_allows_the_sources_there_are(sources: int) -> None:
    """So a replica that keeps to it cannot cite another; what fits the schema is a report."""
    filled = fill(MEDICAL.schema(sources), "Something.")
    assert filled["findings"][0]["sources"] == ([1] if sources else [])
    MEDICAL.read_answer(orjson.dumps(filled).decode(), sources)
    text = orjson.dumps(MEDICAL.response_format(sources)).decode()
    assert not {"minLength", "maxLength", "cites"} & set(text.split('"'))
    assert text.count('"additionalProperties":false') == 3


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not JSON"),
        ("I am sorry.", "not JSON"),
        ("{}", "summary: Field required"),
        (orjson.dumps(report(summary=" ")).decode(), "summary: "),
        (orjson.dumps(report(findings=[])).decode(), "findings: "),
        (orjson.dumps(report(mood="good")).decode(), "mood: there is no such field"),
        (
            orjson.dumps(report(findings=[{"finding": "a", "meaning": "b", "sources": [3]}])).decode(),
            "findings[0].sources: there are sources 1 to 2",
        ),
        (
            orjson.dumps(report(recommendations=[{"what": "a", "urgency": "soon", "sources": [0]}])).decode(),
            "recommendations[0].sources: there are sources 1 to 2",
        ),
    ],
)
def test_what_is_no_report_is_refused_with_the_reason(text: str, complaint: str) -> None:
    """The model is told it, once."""
    with pytest.raises(Reject) as caught:
        MEDICAL.read_answer(text, 2)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "around",
    ["```json\n@\n```", "Here you are:\n@\nIt is short.", "<think>{It?}</think>@", "Sure.\n```\n@\n```\nBye."],
)
def test_what_stands_around_the_answer_is_let_pass(around: str) -> None:
    """Models like to say something more; what is asked for once more costs another call."""
    text = orjson.dumps(report()).decode()
    assert MEDICAL.read_answer(around.replace("@", text), 2) == MEDICAL.read_answer(text, 2)


def test_the_prompt_holds_data_sources_and_form() -> None:
    """In two turns; the sources are numbered as they are cited."""
    system, user = MEDICAL.ask(MEDICAL.read_inputs(PATIENT), SOURCES, "de")
    assert "Write in this language: de." in system["content"]
    assert '"additionalProperties":false' in system["content"]
    assert user["content"].startswith("Sources:\n[1] Headache\nIt hurts.\n\n[2] Vision\nIt blurs.\n\nQuestion: ")
    assert "- Age: 44\n- Sex: female\n- Symptoms: headache" in user["content"]
    assert "(none were found)" in MEDICAL.ask(MEDICAL.read_inputs(PATIENT), [], "en")[1]["content"]


def test_a_rendered_report_is_complete_marked_and_names_its_sources() -> None:
    """Word for word."""
    inputs: dict[str, Any] = {
        "question": "What *must* happen today?",
        "allergies": ["none | known"],
        "vitals": {"systolic_mmhg": 185, "diastolic_mmhg": 121, "temperature_c": 37.5},
        "labs": [
            {"name": "HbA1c", "value": 6.5, "unit": "%", "reference": "below 6"},
            {"name": "Platelets", "value": 1_234_567, "unit": "/µL"},
            {"name": "Troponin T", "value": 0.0000123, "unit": "g/L"},
        ],
    }
    found = [*SOURCES, Source(3, "Feet", "feet.md", "They carry.")]
    assert rendered(inputs, found) == (Path(__file__).with_name("medical_report.md")).read_text()


@pytest.mark.parametrize(
    ("value", "digits"),
    [
        (0, "0"),
        (-1.0, "-1"),
        (6.5, "6.5"),
        (1_234_567, "1234567"),
        (0.0000123, "0.0000123"),
        (70.25, "70.25"),
        (1e300, "1e+300"),
    ],
)
def test_measured_values_keep_their_digits(value: float, digits: str) -> None:
    """In what the model is told, too."""
    inputs = MEDICAL.read_inputs(PATIENT | {"labs": [{"name": "X", "value": value, "unit": "u"}]})
    assert f"- Laboratory: X {digits} u" in MEDICAL.question(inputs)
    assert f"| X | {digits} u |  |" in rendered({"labs": [{"name": "X", "value": value, "unit": "u"}]})


def test_without_sources_it_says_so() -> None:
    """Nobody shall believe that there were some."""
    nothing: list[dict[str, Any]] = [{"finding": "a", "meaning": "b", "sources": []}]
    quiet = report()["recommendations"][:1]
    assert "None: no passage of the knowledge base fitted" in rendered(
        sources=[], findings=nothing, recommendations=quiet
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# Not a heading", "\\# Not a heading"),
        ("one\n\n## two", "one ## two"),
        ("> said", "\\> said"),
        ("1. first", "1\\. first"),
        ("<script>alert(1)</script>", "&lt;script>alert(1)&lt;/script>"),
        ("![x](http://evil.example/?q=1)", "![x]\\(http://evil.example/?q=1)"),
        ("[1]: http://evil.example", "\\[1]: http://evil.example"),  # else each citation would lead there
        ("see [x][1]", "see [x]\\[1]"),
        ("5*3*2 and **this**", "5\\*3\\*2 and \\*\\*this\\*\\*"),
        ("a_b and _c_", "a_b and \\_c\\_"),
        ("`code` ~~no~~", "\\`code\\` \\~\\~no\\~\\~"),
        ("a\\|b &lt; R&D", "a\\\\|b &amp;lt; R&D"),
    ],
)
def test_what_the_model_says_stays_text(text: str, shown: str) -> None:
    """It cannot look like another part of the report, or call anybody when it is shown."""
    assert f"\n## Summary\n\n{shown}\n\n## Findings\n" in rendered(summary=text)


@pytest.mark.parametrize("text", ["|x", "a|b", "a\\|b", "a\\", "- x"])
def test_what_a_sender_says_stays_in_its_cell(text: str) -> None:
    """A bar would begin another one, and a backslash before a bar would let it."""
    [line] = [line for line in rendered({"notes": text}).splitlines() if line.startswith("| Notes ")]
    assert len(re.findall(r"(?:\\.|[^|\\])*\|", line)) == 3
    cell = line.removeprefix("| Notes | ").removesuffix(" |")
    assert re.sub(r"\\([\\|])", r"\1", cell) == text


def test_a_long_name_of_a_field_is_cut() -> None:
    """A sender may make up a name of a megabyte, and is told of it."""
    with pytest.raises(WrongField) as caught:
        MEDICAL.read_inputs(PATIENT | {"x" * 5_000: 1})
    assert len(str(caught.value)) < 200

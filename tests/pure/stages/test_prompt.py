"""Prompts: numbered sources and a question inside a token budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import Reject
from stages.prompt import INSTRUCTIONS, MESSAGE_TOKENS, NO_SOURCES, Prompt, Source, build_prompt
from stages.tokens import estimate

SLUICE = Source("Sluices", "A sluice has a gate. The gate is lifted with a wheel.")
WEIR = Source("Weirs", "A weir has none.")
texts = st.text("abc def.!?\n", max_size=200)
sources = st.lists(st.builds(Source, texts, texts), max_size=6)


def spent(prompt: Prompt) -> int:
    return sum(estimate(message["content"]) + MESSAGE_TOKENS for message in prompt.messages)


def test_user_message_has_one_exact_form() -> None:
    """Replicas, tests and people rely on it."""
    prompt = build_prompt("Which has a gate?", [SLUICE, WEIR], 1000, estimate)
    assert prompt.messages == [
        {"role": "system", "content": INSTRUCTIONS},
        {
            "role": "user",
            "content": (
                "Sources:\n"
                "[1] Sluices\nA sluice has a gate. The gate is lifted with a wheel.\n\n"
                "[2] Weirs\nA weir has none.\n\n"
                "Question: Which has a gate?"
            ),
        },
    ]
    assert prompt.texts == [SLUICE.text, WEIR.text]


def test_question_without_sources_says_so() -> None:
    """The replica is told that nothing was found, and is not left to guess."""
    prompt = build_prompt("Which has a gate?", [], 1000, estimate)
    assert prompt.messages[1]["content"] == f"Sources:\n{NO_SOURCES}\n\nQuestion: Which has a gate?"
    assert prompt.texts == []


@given(st.text("abc de?", min_size=1, max_size=80), sources, st.integers(64, 600))
def test_budget_is_never_exceeded_and_never_costs_the_question(query: str, found: list[Source], budget: int) -> None:
    """Whatever was found, the prompt fits and ends with the whole question; or the question is refused."""
    try:
        prompt = build_prompt(query, found, budget, estimate)
    except Reject:
        return
    assert spent(prompt) <= budget
    assert prompt.messages[1]["content"].endswith(f"\n\nQuestion: {query}")


@given(sources, st.integers(130, 400))
def test_only_the_last_source_is_ever_cut(found: list[Source], budget: int) -> None:
    """The best sources stand whole; what is cut is a beginning; what follows it is left out."""
    used = build_prompt("Why?", found, budget, estimate).texts
    assert used[:-1] == [source.text for source in found[: max(0, len(used) - 1)]]
    if used:
        assert found[len(used) - 1].text.startswith(used[-1])


def test_last_source_is_cut_at_a_sentence() -> None:
    """Half a sentence would be quoted as if it were one."""
    whole = spent(build_prompt("Why?", [WEIR, SLUICE], 1000, estimate))
    prompt = build_prompt("Why?", [WEIR, SLUICE], whole - 1, estimate)
    assert prompt.texts == [WEIR.text, "A sluice has a gate."]


def test_source_of_which_no_sentence_fits_is_left_out() -> None:
    """Better one source fewer than a stump."""
    one = spent(build_prompt("Why?", [WEIR], 1000, estimate))
    assert build_prompt("Why?", [WEIR, SLUICE], one + 2, estimate).texts == [WEIR.text]


def test_question_over_the_budget_is_refused_with_both_numbers() -> None:
    """A question is never cut silently."""
    with pytest.raises(Reject, match=r"takes \d+ tokens, and the prompt leaves \d+") as refusal:
        build_prompt("why " * 200, [WEIR], 200, estimate)
    assert refusal.value.code == "query_too_long"

"""Prompts: numbered sources and a question inside a token budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import Reject
from stages.prompt import INSTRUCTIONS, MESSAGE_TOKENS, NO_SOURCES, Source, augment, fit
from stages.tokens import estimate

SLUICE = Source("Sluices", "A sluice has a gate. The gate is lifted with a wheel.")
WEIR = Source("Weirs", "A weir has none.")
texts = st.text("abc def.!?\n", max_size=200)
sources = st.lists(st.builds(Source, texts, texts), max_size=6)


def spent(query: str, used: list[Source]) -> int:
    return sum(estimate(message["content"]) + MESSAGE_TOKENS for message in augment(query, used))


def test_user_message_has_one_exact_form() -> None:
    """Replicas, tests and people rely on it."""
    used = fit("Which has a gate?", [SLUICE, WEIR], 1000, estimate)
    assert used == [SLUICE, WEIR]
    assert augment("Which has a gate?", used) == [
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


def test_question_without_sources_says_so() -> None:
    """The replica is told that nothing was found, and is not left to guess."""
    assert fit("Which has a gate?", [], 1000, estimate) == []
    assert augment("Which has a gate?", [])[1]["content"] == f"Sources:\n{NO_SOURCES}\n\nQuestion: Which has a gate?"


@given(st.text("abc de?", min_size=1, max_size=80), sources, st.integers(64, 600))
def test_budget_is_never_exceeded_and_never_costs_the_question(query: str, found: list[Source], budget: int) -> None:
    """Whatever was found, the prompt fits and ends with the whole question; or the question is refused."""
    try:
        used = fit(query, found, budget, estimate)
    except Reject:
        return
    assert spent(query, used) <= budget
    assert augment(query, used)[1]["content"].endswith(f"\n\nQuestion: {query}")


@given(sources, st.integers(130, 400))
def test_only_the_last_source_is_ever_cut(found: list[Source], budget: int) -> None:
    """The best sources stand whole; what is cut is a beginning; what follows it is left out."""
    used = fit("Why?", found, budget, estimate)
    assert used[:-1] == found[: max(0, len(used) - 1)]
    if used:
        assert found[len(used) - 1].text.startswith(used[-1].text)


def test_last_source_is_cut_at_a_sentence() -> None:
    """Half a sentence would be quoted as if it were one."""
    whole = spent("Why?", [WEIR, SLUICE])
    assert fit("Why?", [WEIR, SLUICE], whole - 1, estimate) == [WEIR, Source("Sluices", "A sluice has a gate.")]


def test_source_of_which_no_sentence_fits_is_left_out() -> None:
    """Better one source fewer than a stump."""
    one = spent("Why?", [WEIR])
    assert fit("Why?", [WEIR, SLUICE], one + 2, estimate) == [WEIR]


def test_question_over_the_budget_is_refused_with_both_numbers() -> None:
    """A question is never cut silently."""
    with pytest.raises(Reject, match=r"takes \d+ tokens, and the prompt leaves \d+") as refusal:
        fit("why " * 200, [WEIR], 200, estimate)
    assert refusal.value.code == "query_too_long"

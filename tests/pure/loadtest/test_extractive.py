"""The extractive answer: which sentence is chosen, and how a prompt, a text and its tokens are taken apart."""

import re
import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.extractive import MAX_SENTENCE_CHARS, answer, count_tokens, split_prompt, split_tokens, words

CAPITALS = """Sources:
[1] France
France is a country in Europe. Paris is the capital of France, and its largest city.
[2] Germany
Germany lies east of France. Its capital is Berlin.

Question: {}"""


def ask(sources: str, question: str) -> str:
    return answer(f"Sources:\n{sources}\n\nQuestion: {question}")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the capital of France?", "Paris is the capital of France, and its largest city. [1]"),
        ("what is the CAPITAL of germany", "Its capital is Berlin. [2]"),
        ("Which country lies east of France?", "Germany lies east of France. [2]"),
    ],
)
def test_the_sentence_that_covers_the_question_is_quoted_with_its_number(question: str, expected: str) -> None:
    """The words that few sentences hold decide, and a source's title counts for its sentences."""
    assert answer(CAPITALS.format(question)) == expected


def test_a_second_sentence_joins_when_it_covers_what_the_first_leaves_open() -> None:
    """A question about two things gets both, each with its own source."""
    sources = "[1] Leases\nA lease protects an entry from other consumers.\n[2] Dead letters\nPoison ends in job:dead."
    assert ask(sources, "What does a lease protect, and where does poison end?") == (
        "A lease protects an entry from other consumers. [1] Poison ends in job:dead. [2]"
    )


def test_one_sentence_is_enough_when_it_covers_the_question() -> None:
    """A sentence that repeats what the first one said is left out."""
    sources = "[1] a\nThe gateway counts the leases of a replica.\n[2] b\nThe gateway counts leases."
    assert ask(sources, "Which leases of a replica does the gateway count?").count("[") == 1


def test_the_same_question_gets_the_same_answer_in_every_process() -> None:
    """Neither hash seeds nor set order reach the answer."""
    prompt = CAPITALS.format("largest city, country, capital")
    program = f"from loadtest.extractive import answer; print(answer({prompt!r}))"
    answers = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert answers == {answer(prompt) + "\n"}


def test_a_question_that_no_source_touches_is_told_so() -> None:
    """Nothing is made up: the answer says that the sources are silent."""
    assert ask("[1] Spiders\nA spider has eight legs.", "Who wrote Hamlet?") == (
        "The sources do not say. The first of them begins: A spider has eight legs. [1]"
    )


def test_without_sources_the_question_is_repeated() -> None:
    """A plain prompt is echoed, so that a reader sees what arrived."""
    assert answer("  Good\nmorning! ") == "There are no sources to answer from. You asked: Good morning!"


def test_an_empty_list_of_sources_counts_as_none() -> None:
    """A retriever that found nothing still gets an answer about the question alone."""
    assert answer("Sources:\n\nQuestion: Anyone there?").endswith("You asked: Anyone there?")


def test_a_bracketed_number_out_of_order_is_part_of_the_text() -> None:
    """A passage with footnotes of its own stays one source."""
    sources, question = split_prompt("Sources:\n[1] one\ntext\n[7] a footnote\n[2] two\nmore\n\nQuestion: q?")
    assert [(source.number, source.title, source.text) for source in sources] == [
        (1, "one", "text\n[7] a footnote"),
        (2, "two", "more\n"),
    ]
    assert question == "q?"


def test_the_last_question_is_the_one_that_is_asked() -> None:
    """A source that holds a line `Question:` does not take the place of the real one."""
    assert split_prompt("Sources:\n[1] faq\nQuestion: old?\n\nQuestion: new?")[1] == "new?"


def test_headings_name_their_sentences_and_are_never_the_answer() -> None:
    """What a section is called says what its sentences are about; a heading answers nothing."""
    text = "[1] manual\n# Installing\n\nRun the first command.\n\nRemoving\n--------\n\nDelete the directory."
    assert ask(text, "How about removing?") == "Delete the directory. [1]"


def test_list_items_and_wrapped_lines_are_sentences_of_their_own() -> None:
    """A list without full stops is not quoted whole, and a line break inside a sentence is a space."""
    text = "[1] keys\n- streams hold\n  work\n- strings hold outcomes\n"
    assert ask(text, "What do streams hold?") == "streams hold work [1]"


def test_text_without_an_end_is_clipped() -> None:
    """A block of code or a table does not become a page-long answer."""
    told = ask("[1] log\n" + "needle " + "hay " * 1000, "needle?")
    assert len(told) < MAX_SENTENCE_CHARS + 20
    assert told.endswith("hay ... [1]")


def test_scripts_without_spaces_are_matched_by_character() -> None:
    """Chinese and Japanese text has words, though no spaces between them."""
    assert ask("[1] 城市\n柏林是德国的首都。巴黎是法国的首都。", "法国的首都") == "巴黎是法国的首都。 [1]"


@given(st.text())
def test_any_prompt_has_an_answer(prompt: str) -> None:
    """No text, however odd, breaks the mock."""
    assert answer(prompt)


@given(
    st.lists(st.text(string.ascii_lowercase + " .\n", min_size=1), min_size=1, max_size=5),
    st.text(string.ascii_lowercase + " ?"),
)
def test_an_answer_cites_only_sources_that_were_given(texts: list[str], question: str) -> None:
    """The number behind a sentence leads to a source that holds its words."""
    prompt = "Sources:\n" + "\n".join(f"[{n}] t\n{text}" for n, text in enumerate(texts, start=1))
    told = answer(f"{prompt}\n\nQuestion: {question}").removeprefix(
        "The sources do not say. The first of them begins: "
    )
    for quoted, number in re.findall(r"(.*?) \[(\d+)\]", told):
        assert set(words(quoted)) <= set(words(texts[int(number) - 1]))


@given(st.text())
def test_pieces_of_a_text_make_the_text_again_and_are_as_many_as_its_tokens(text: str) -> None:
    """A streamed answer is the plain one, and usage counts what was streamed."""
    pieces = split_tokens(text)
    assert "".join(pieces) == text
    assert len(pieces) == count_tokens(text) or not text.strip()


def test_words_and_punctuation_marks_are_tokens() -> None:
    """The count is simple enough to be checked by eye."""
    assert count_tokens("Paris, the capital.\nIt's big") == 9

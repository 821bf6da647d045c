"""Documents cut into chunks."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.chunks import Chunker, is_markdown, opening
from stages.tokens import estimate

words = st.text("abcdefgh .,\n#-`*_éß\u4eba", max_size=600)
GUIDE = """# Weirs

A weir is a low dam.

## Gates

### Lifting

Turn the wheel to the left.

```sh
# not a heading
lift --all
```

## Fish

A ladder lets them pass.
"""


@given(words, st.integers(16, 60), st.integers(0, 15), st.sampled_from(["a.txt", "a.md", ""]))
def test_chunks_cover_the_text_in_order_and_keep_the_budget(text: str, tokens: int, overlap: int, name: str) -> None:
    """No word is lost between two chunks, none is moved, and no chunk is over its size."""
    chunks = Chunker(estimate, tokens, overlap).cut(text, name)
    at = 0
    for chunk in chunks:
        start = text.find(chunk.text, max(0, at - len(chunk.text)))
        assert start >= 0
        assert not text[at:start].strip(), "words between two chunks"
        at = max(at, start + len(chunk.text))
        assert 0 < estimate(chunk.text) <= tokens
    assert not text[at:].strip()


def test_small_document_is_one_chunk() -> None:
    """What fits is not cut."""
    [chunk] = Chunker(estimate, 200, 20).cut("The gate is open. The water runs.")
    assert chunk.text == "The gate is open. The water runs."
    assert chunk.heading == ""


def test_chunk_knows_the_headings_above_it() -> None:
    """A sentence says little without the headings it stands under."""
    chunks = Chunker(estimate, 24, 0).cut("\u4eba\u00e9 \U0001f600\n\n" + GUIDE)  # offsets count characters, not bytes
    headings = {line: chunk.heading for chunk in chunks for line in chunk.text.splitlines()}
    assert headings["A weir is a low dam."] == "Weirs"
    assert headings["Turn the wheel to the left."] == "Weirs > Gates > Lifting"
    assert headings["A ladder lets them pass."] == "Weirs > Fish"


def test_comment_in_a_code_block_is_no_heading() -> None:
    """`# not a heading` in a fenced block changes nothing."""
    chunks = Chunker(estimate, 16, 0).cut(GUIDE)
    [code] = [chunk for chunk in chunks if "lift --all" in chunk.text]
    assert code.heading == "Weirs > Gates > Lifting"


def test_sentence_at_a_cut_is_whole_in_one_of_two_chunks() -> None:
    """Overlap repeats the end of one chunk at the start of the next."""
    text = " ".join(f"Gate number {n} is open today." for n in range(20))
    chunks = Chunker(estimate, 40, 15).cut(text, "gates.txt")
    for one, two in pairwise(chunks):
        shared = re.findall(r"Gate number \d+ is open today\.", one.text)[-1]
        assert shared in two.text


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("# Title\n\ntext", "", True),
        ("no heading", "notes.md", True),
        ("# a comment", "run.log", False),
        ("no heading", "", False),
        ("#hashtag", "", False),
        ("# Title\n", "http.server", True),
    ],
)
def test_markdown_is_recognised(text: str, name: str, expected: bool) -> None:
    """The name decides where it says something, a heading where it does not."""
    assert is_markdown(text, name) is expected


def test_opening_is_the_first_paragraph_that_is_no_heading() -> None:
    """It is what a document says of itself."""
    assert opening(GUIDE) == "A weir is a low dam."
    assert opening("# Only\n\n## headings") == ""


@given(st.text(" \n\t", max_size=30))
def test_white_space_makes_no_chunk(text: str) -> None:
    """An empty document has nothing to index."""
    assert Chunker(estimate, 20, 0).cut(text) == []


@pytest.mark.parametrize("heading", ["## Gates ##", "##  Gates\t#  ", "## Gates"])
def test_signs_that_close_a_heading_are_no_part_of_it(heading: str) -> None:
    """Markdown allows `## Gates ##`; a `#` that belongs to a word stays."""
    assert Chunker(estimate, 60, 0).cut(f"{heading}\n\ntext")[0].heading == "Gates"
    assert Chunker(estimate, 60, 0).cut("# C#\n\ntext")[0].heading == "C#"


@pytest.mark.parametrize("text", ["# a" + " " * 200_000 + "b", "# " + "#" * 100_000, "# a\n" * 20_000])
def test_hostile_document_costs_no_more_than_its_length(text: str) -> None:
    """Reading headings takes linear time; a pattern that backtracks would need hours here."""
    assert is_markdown(text)


def test_one_endless_word_is_cut_in_time_that_grows_with_its_length() -> None:
    """Half a million letters in a row are all there, in chunks of the size asked for."""
    text = "a" * 500_000
    chunks = Chunker(estimate, 300, 0).cut(text)
    assert "".join(chunk.text for chunk in chunks) == text
    assert max(estimate(chunk.text) for chunk in chunks) <= 300

"""Hash vectors: the same for the same text, near for near texts, of length 1 always."""

import base64
import math
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.embedding import embed, encode_base64


def cosine(one: str, other: str) -> float:
    return sum(a * b for a, b in zip(embed(one, 256), embed(other, 256), strict=True))


@given(st.text(), st.integers(1, 300))
def test_every_vector_has_length_one(text: str, dimensions: int) -> None:
    """Cosine and dot product agree, and no text is nowhere."""
    vector = embed(text, dimensions)
    assert len(vector) == dimensions
    assert math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-5)


def test_a_text_has_the_same_vector_in_every_process() -> None:
    """An index written by one process is searched by another."""
    program = "from loadtest.embedding import embed, encode_base64; print(encode_base64(embed('Gruss aus Köln', 64)))"
    vectors = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert vectors == {encode_base64(embed("Gruss aus Köln", 64))}


def test_texts_that_share_words_lie_nearer_than_texts_that_do_not() -> None:
    """A search by these vectors finds something sensible."""
    question = "how is a lease renewed"
    assert cosine(question, "a consumer renews its lease") > cosine(question, "Paris lies on the Seine") + 0.2


def test_forms_of_one_word_are_near_and_case_is_nothing() -> None:
    """Trigrams join what whole words part."""
    assert cosine("renewing", "renewed") > cosine("renewing", "capital") + 0.2
    assert math.isclose(cosine("LEASE", "lease"), 1.0, rel_tol=1e-5)


def test_base64_holds_the_floats_little_endian() -> None:
    """The encoding that the openai client asks for reads back to the same numbers."""
    vector = embed("three", 3)
    assert list(struct.unpack("<3f", base64.b64decode(encode_base64(vector)))) == vector.tolist()


def test_a_vector_without_dimensions_is_refused() -> None:
    """Nothing divides by zero later."""
    with pytest.raises(ValueError, match="at least 1 dimension"):
        embed("x", 0)

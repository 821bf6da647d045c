"""Vectors on the wire, and the model that makes them."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.settings import EncoderSettings
from stages.vectors import Encoded, KeywordModel, Sparse, models, pack, unpack

weights = st.floats(width=32, allow_nan=False)
sparse = st.dictionaries(st.integers(0, 2**32 - 1), weights, max_size=20).map(
    lambda entries: Sparse(tuple(entries), tuple(entries.values()))
)
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
dense = st.integers(1, 12).flatmap(
    lambda size: st.lists(
        st.lists(numbers, min_size=size, max_size=size).map(lambda values: array("f", values)), min_size=1, max_size=5
    )
)
encoded = st.dictionaries(st.text(min_size=1, max_size=40), st.one_of(st.lists(sparse, max_size=8), dense), max_size=3)


@given(encoded)
def test_what_was_packed_is_unpacked(vectors: Encoded) -> None:
    """Models, vectors of both kinds, dimensions and weights all survive the wire, side by side."""
    assert unpack(pack(vectors)) == vectors


@given(encoded, st.data())
def test_vectors_cut_short_are_refused(vectors: Encoded, data: st.DataObject) -> None:
    """No beginning of packed vectors passes for the whole."""
    packed = pack(vectors)
    with pytest.raises(ValueError):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_be_refused(data: bytes) -> None:
    """Whatever somebody puts beside an entry, reading it raises nothing but ValueError."""
    for candidate in (data, b"PV1" + data):
        try:
            unpack(candidate)
        except ValueError:
            continue


def test_numbers_are_little_endian_on_every_machine() -> None:
    """The wire is fixed to the byte: other languages read it too."""
    packed = pack({"m": [Sparse((1, 258), (1.0, -2.0))]})
    assert packed == bytes.fromhex("505631 01 01 01 6d 01000000 02000000 01000000 02010000 0000803f 000000c0")


def test_unknown_kind_is_refused_by_number() -> None:
    """Vectors of a kind to come are not misread as sparse ones."""
    with pytest.raises(ValueError, match=r"unknown kind \(3\)"):
        unpack(bytes.fromhex("505631 01 03 01 6d 00000000"))


@pytest.mark.parametrize(
    "section",
    [
        "00000000 00000000",  # no dimensions
        "01000000 00000000",
        "01000000 02000000 0000803f",  # one number of two
        "ffffffff ffffffff 0000803f",  # more than any memory holds
        "01000000 01000000 0000c07f",  # not a number
        "01000000 01000000 000080ff",  # minus infinity
        "01000000 01000000 0000803f 00",
    ],
)
def test_malformed_dense_vectors_are_refused(section: str) -> None:
    """Before anything is made of them, and in words."""
    with pytest.raises(ValueError, match="vector"):
        unpack(bytes.fromhex("505631 01 02 01 6d" + section))


def test_dense_numbers_are_little_endian_on_every_machine() -> None:
    """Beside the sparse ones of a question, as an encoder of both sends them."""
    packed = pack({"s": [Sparse((1,), (1.0,))], "d": [array("f", (1.0, -2.0))]})
    sparse_part, dense_part = (
        "01 01 73 01000000 01000000 01000000 0000803f",
        "02 01 64 01000000 02000000 0000803f000000c0",
    )
    assert packed == bytes.fromhex("505631 02" + sparse_part + dense_part)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (EncoderSettings(), "bm25/english/1"),
        (EncoderSettings(embeddings_url="http://e", embeddings_model="nomic"), "bm25/english/1 + dense/nomic"),
        (EncoderSettings(sentence_transformer="mini", keywords=False), "dense/mini"),
        (
            EncoderSettings(sentence_transformer="e5", query_prefix="query: ", passage_prefix="passage: "),
            "bm25/english/1 + dense/e5 after 'passage: '",
        ),
    ],
)
def test_name_tells_which_vectors_can_be_compared(settings: EncoderSettings, name: str) -> None:
    """What makes other vectors makes another name; who computes them, or how a question is put, does not."""
    assert str(models(settings)) == name


def test_name_that_cannot_travel_is_refused_at_start() -> None:
    """Its length is one byte on the wire."""
    with pytest.raises(ConfigError, match="over 255 bytes"):
        models(EncoderSettings(sentence_transformer="é" * 100, passage_prefix="é" * 100))


def test_words_of_one_stem_share_a_dimension() -> None:
    """A question about flooding finds a text about floods."""
    model = KeywordModel("english")
    assert model.query_vector("flooding").indices == model.passage_vector("floods").indices


def test_words_inside_a_compound_name_are_found() -> None:
    """`DictReader` and `copy_tree` answer to the words they are made of."""
    model = KeywordModel("english")
    for name, word in (("DictReader", "reader"), ("copy_tree", "tree"), ("HTTPServer", "server")):
        assert set(model.query_vector(word).indices) <= set(model.passage_vector(name).indices)


def test_accents_do_not_matter() -> None:
    """A question typed without accents finds the accented word."""
    model = KeywordModel("english")
    assert model.query_vector("cafe").indices == model.passage_vector("café").indices


def test_question_of_stop_words_has_an_empty_vector() -> None:
    """There is nothing to look for in it, which is no error."""
    assert KeywordModel("english").query_vector("of the and?") == Sparse((), ())


def test_models_of_two_languages_have_two_names() -> None:
    """The name is what tells vectors apart that must not be mixed."""
    assert KeywordModel("english").name != KeywordModel("german").name


def test_unknown_language_is_the_operators_matter() -> None:
    """The message names the setting and the language."""
    with pytest.raises(ConfigError, match=r"encoder\.language.*klingon"):
        KeywordModel("klingon")


def test_hostile_question_costs_no_more_than_its_length() -> None:
    """One endless word takes linear time; a pattern that backtracks would need hours here."""
    assert KeywordModel("english").query_vector("a" * 1_000_000).indices is not None

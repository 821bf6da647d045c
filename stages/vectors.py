"""Vectors: who makes them, and how they travel from the encoder to the retriever.

A vector travels as little-endian binary beside the envelope. The bytes describe themselves, so that a retriever can
tell vectors of another model from its own, and vectors of several models can travel together:

    "PV1"  u8 sections
    section:  u8 kind  u8 length  model's name (UTF-8)  u32 vectors
      kind 1, sparse:  u32 entries of each vector
                       all indices (u32), then all values (f32), vector after vector
      kind 2, dense:   u32 dimensions, at least 1
                       all values (f32), vector after vector

A section holds one model's vectors: one for a question, one per chunk, in order, for a document.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from msgspec import Struct
from qdrant_edge import Bm25, Bm25Config

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.settings import EncoderSettings

_MAGIC: Final = b"PV1"
_SPARSE: Final = 1
_DENSE: Final = 2
_SECTION: Final = struct.Struct("<BB")
_U32: Final = struct.Struct("<I")


class Sparse(Struct, frozen=True):
    """A sparse vector: dimensions (u32) and their weights (f32), of equal number."""

    indices: tuple[int, ...]
    values: tuple[float, ...]


Dense: TypeAlias = "array[float]"
"""A dense vector: as many 32-bit floats (typecode `f`) as its model has dimensions."""

Encoded: TypeAlias = "dict[str, list[Sparse] | list[Dense]]"
"""What an encoder found: vectors by the name of the model that made them; those of one model are of one kind."""

MAX_NAME_BYTES: Final = 255
"""Of a model's name, in UTF-8."""


def dense(values: bytes) -> Dense:
    """Return the dense vector whose 32-bit floats are *values*, little-endian.

    Raises:
        ValueError: they are no whole number of floats.
    """
    vector = array("f", values)
    if sys.byteorder == "big":
        vector.byteswap()
    return vector


def is_finite(vector: Dense) -> bool:
    """Whether *vector* holds numbers only: an infinite one, or none, would make nonsense of every distance."""
    return math.isfinite(sum(vector))  # in 64 bits, where no sum of 32-bit floats overflows


def pack(encoded: Mapping[str, Sequence[Sparse] | Sequence[Dense]]) -> bytes:
    """Return the bytes of *encoded*; `unpack` reads them."""
    parts = [_MAGIC, bytes([len(encoded)])]
    for model, vectors in encoded.items():
        name = model.encode()
        kind = _DENSE if vectors and isinstance(vectors[0], array) else _SPARSE
        parts += [_SECTION.pack(kind, len(name)), name, _U32.pack(len(vectors))]
        if kind == _DENSE:
            parts += _packed_dense(cast("Sequence[Dense]", vectors))
        else:
            parts += _packed_sparse(cast("Sequence[Sparse]", vectors))
    return b"".join(parts)


def _packed_sparse(vectors: Sequence[Sparse]) -> list[bytes]:
    sizes = [len(vector.indices) for vector in vectors]
    parts = [struct.pack(f"<{len(sizes)}I", *sizes)]
    parts += [struct.pack(f"<{size}I", *vector.indices) for size, vector in zip(sizes, vectors, strict=True)]
    parts += [struct.pack(f"<{size}f", *vector.values) for size, vector in zip(sizes, vectors, strict=True)]
    return parts


def _packed_dense(vectors: Sequence[Dense]) -> list[bytes]:
    parts = [_U32.pack(len(vectors[0]))]
    for vector in vectors:
        if sys.byteorder == "big":
            vector = vector[:]
            vector.byteswap()
        parts.append(vector.tobytes())
    return parts


def unpack(data: bytes) -> Encoded:
    """Read what `pack` wrote.

    Raises:
        ValueError: *data* is not that, or was cut short.
    """
    if data[:3] != _MAGIC or len(data) < 4:
        raise ValueError("not a vector: it does not begin with PV1")
    encoded: Encoded = {}
    at = 4
    try:
        for _ in range(data[3]):
            kind, length = _SECTION.unpack_from(data, at)
            at += _SECTION.size
            model = data[at : at + length].decode()
            at += length
            (count,) = _U32.unpack_from(data, at)
            at += 4
            if kind == _SPARSE:
                encoded[model], at = _read_sparse(data, at, count)
            elif kind == _DENSE:
                encoded[model], at = _read_dense(data, at, count)
            else:
                raise ValueError(f"vectors of an unknown kind ({kind})")
    except struct.error as error:
        raise ValueError(f"a vector cut short: {error}") from error
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes too many after the vectors")
    return encoded


def _read_sparse(data: bytes, at: int, count: int) -> tuple[list[Sparse], int]:
    """Return *count* vectors from *at* on, and where they end."""
    sizes = struct.unpack_from(f"<{count}I", data, at)
    at += 4 * count
    total = sum(sizes)
    indices: tuple[int, ...] = struct.unpack_from(f"<{total}I", data, at)
    values: tuple[float, ...] = struct.unpack_from(f"<{total}f", data, at + 4 * total)
    return _divided(indices, values, sizes), at + 8 * total


def _read_dense(data: bytes, at: int, count: int) -> tuple[list[Dense], int]:
    """Return *count* vectors from *at* on, and where they end."""
    (dimensions,) = _U32.unpack_from(data, at)
    at += 4
    size = 4 * dimensions
    if not dimensions or len(data) - at < count * size:
        raise ValueError("a vector cut short: dense ones have at least one dimension, and all of them")
    end = at + count * size
    vectors = [dense(data[start : start + size]) for start in range(at, end, size)]
    if not all(is_finite(vector) for vector in vectors):
        raise ValueError("a dense vector holds what is no number")
    return vectors, end


def _divided(indices: tuple[int, ...], values: tuple[float, ...], sizes: Sequence[int]) -> list[Sparse]:
    vectors = []
    start = 0
    for size in sizes:
        vectors.append(Sparse(indices[start : start + size], values[start : start + size]))
        start += size
    return vectors


@dataclass(frozen=True, slots=True)
class Models:
    """The models that fill one index, by name; at least one is there. What differs here must not be mixed.

    Attributes:
        keywords: of the sparse vectors, None where it is not searched by words.
        dense: of the dense vectors, None where it is not searched by meaning.
    """

    keywords: str | None
    dense: str | None = None

    def __str__(self) -> str:
        return " + ".join(name for name in (self.keywords, self.dense) if name)


def models(settings: EncoderSettings) -> Models:
    """Return the models that an encoder with *settings* encodes with.

    Raises:
        ConfigError: the language is unknown, or a name is too long to travel with the vectors.
    """
    keywords = KeywordModel(settings.language).name if settings.keywords else None
    model = settings.embeddings_model if settings.embeddings_url else settings.sentence_transformer
    name = f"dense/{model}"
    if settings.passage_prefix:  # another prefix makes other vectors; a question's makes no difference to what is kept
        name += f" after {settings.passage_prefix!r}"
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ConfigError(f"the dense model's name and passage prefix are over {MAX_NAME_BYTES} bytes together: {name}")
    return Models(keywords, name if model else None)


class KeywordModel:
    """BM25: a text becomes its word stems, weighted by how often they occur.

    How rare a word is among all documents is not in the vector; the index knows it and adds it at search time.

    Attributes:
        name: says all that decides which vectors are comparable; changes whenever they do.
    """

    def __init__(self, language: str) -> None:
        """Load the stemmer and stop words of *language*.

        Raises:
            ConfigError: the language is unknown.
        """
        self.name = f"bm25/{language}/{_REVISION}"
        try:
            self._bm25 = Bm25(Bm25Config(k=_K, b=_B, avg_len=_AVERAGE_WORDS, language=language, ascii_folding=True))
        except ValueError as error:
            raise ConfigError(f"encoder.language: {error}") from error

    def query_vector(self, text: str) -> Sparse:
        """Return the vector of a question; empty when nothing but stop words and signs is in it."""
        vector = self._bm25.embed_query(_with_parts_of_names(text))
        return Sparse(tuple(vector.indices), tuple(vector.values))

    def passage_vector(self, text: str) -> Sparse:
        """Return the vector of a piece of a document."""
        vector = self._bm25.embed_document(_with_parts_of_names(text))
        return Sparse(tuple(vector.indices), tuple(vector.values))


_REVISION: Final = 1  # raise it with any change to what a passage's vector holds: an index of another is refused
# Chosen on the questions of tests/retrieval, over three Python versions and chunks of 200 to 400 tokens.
_K: Final = 1.2
_B: Final = 0.9
_AVERAGE_WORDS: Final = 60.0

# Plain scans: a pattern that looks for the compound itself takes quadratic time on one long run of letters.
_NAME: Final = re.compile(r"[A-Za-z0-9_]+")
_PART: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def _with_parts_of_names(text: str) -> str:
    """Return *text* followed by the words inside its compound names, so that "reader" finds `DictReader`."""
    found: list[str] = []
    for name in _NAME.findall(text):
        if "_" in name or not (name.islower() or name.isdigit()):
            parts = _PART.findall(name)
            if len(parts) > 1:
                found += parts
    return f"{text} {' '.join(found)}" if found else text

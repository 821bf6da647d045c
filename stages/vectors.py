"""Vectors: who makes them, and how they travel from the encoder to the retriever.

A vector travels as little-endian binary beside the envelope. The bytes describe themselves, so that a retriever can
tell vectors of another model from its own, and further kinds can stand beside the sparse ones:

    "PV1"  u8 sections
    section:  u8 kind (1: sparse)  u8 length  model's name (UTF-8)  u32 vectors
              u32 entries of each vector
              all indices (u32), then all values (f32), vector after vector

A section holds one model's vectors: one for a question, one per chunk, in order, for a document.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qdrant_edge import Bm25, Bm25Config

from pipeline.errors import ConfigError

_MAGIC: Final = b"PV1"
_SPARSE: Final = 1
_SECTION: Final = struct.Struct("<BB")
_U32: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Sparse:
    """A sparse vector: dimensions (u32) and their weights (f32), of equal number."""

    indices: tuple[int, ...]
    values: tuple[float, ...]


Encoded = dict[str, list[Sparse]]
"""What an encoder found: vectors by the name of the model that made them."""


def pack(encoded: Mapping[str, Sequence[Sparse]]) -> bytes:
    """Return the bytes of *encoded*; `unpack` reads them."""
    parts = [_MAGIC, bytes([len(encoded)])]
    for model, vectors in encoded.items():
        name = model.encode()
        sizes = [len(vector.indices) for vector in vectors]
        parts += [
            _SECTION.pack(_SPARSE, len(name)),
            name,
            _U32.pack(len(sizes)),
            struct.pack(f"<{len(sizes)}I", *sizes),
        ]
        parts += [struct.pack(f"<{size}I", *vector.indices) for size, vector in zip(sizes, vectors, strict=True)]
        parts += [struct.pack(f"<{size}f", *vector.values) for size, vector in zip(sizes, vectors, strict=True)]
    return b"".join(parts)


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
            if kind != _SPARSE:
                raise ValueError(f"vectors of an unknown kind ({kind})")
            at += _SECTION.size
            model = data[at : at + length].decode()
            at += length
            (count,) = _U32.unpack_from(data, at)
            sizes = struct.unpack_from(f"<{count}I", data, at := at + 4)
            at += 4 * count
            total = sum(sizes)
            indices: tuple[int, ...] = struct.unpack_from(f"<{total}I", data, at)
            values: tuple[float, ...] = struct.unpack_from(f"<{total}f", data, at + 4 * total)
            at += 8 * total
            encoded[model] = _divided(indices, values, sizes)
    except struct.error as error:
        raise ValueError(f"a vector cut short: {error}") from error
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes too many after the vectors")
    return encoded


def _divided(indices: tuple[int, ...], values: tuple[float, ...], sizes: Sequence[int]) -> list[Sparse]:
    vectors = []
    start = 0
    for size in sizes:
        vectors.append(Sparse(indices[start : start + size], values[start : start + size]))
        start += size
    return vectors


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

"""Vectors without a model: hashed words and character trigrams.

Each word, and each trigram inside its word boundaries, adds to one of the vector's places with a sign, both taken from
a CRC of the feature, so equal texts get equal vectors in every process and on every machine. Texts that share words, or
parts of words, lie near one another; that is all the meaning there is. Source: "Feature Hashing for Large Scale
Multitask Learning", Weinberger et al., 2009.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections import Counter
from functools import lru_cache
from zlib import crc32

from loadtest.extractive import words

_WORD_WEIGHT = 1.0  # as much as all its trigrams together: forms of a word are near it, others are not


def embed(text: str, dimensions: int) -> array[float]:
    """Return the vector of *text*: `dimensions` 32-bit floats of Euclidean length 1.

    A text without any letter or digit is one feature as it stands, so no vector is all zeros.

    Raises:
        ValueError: dimensions < 1.
    """
    if dimensions < 1:
        raise ValueError(f"a vector needs at least 1 dimension, not {dimensions}")
    sums = [0.0] * dimensions
    for word, count in Counter(words(text) or [text]).items():
        often = 1.0 + math.log(count)  # the tenth mention says less than the first
        for code, weight in _features(word):
            # The lowest bit is the sign, the rest the place: both from one CRC, yet independent.
            sums[(code >> 1) % dimensions] += often * weight if code & 1 else -often * weight
    length = math.sqrt(math.fsum(value * value for value in sums))
    if not length:  # features that cancel each other out, in a vector of very few places
        sums[0] = length = 1.0
    return array("f", (value / length for value in sums))


def encode_base64(vector: array[float]) -> str:
    """Return *vector* as the OpenAI protocol's `encoding_format: "base64"`: little-endian 32-bit floats."""
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode("ascii")


@lru_cache(maxsize=65_536)
def _features(word: str) -> tuple[tuple[int, float], ...]:
    bounded = f"<{word}>"
    trigrams = {bounded[i : i + 3] for i in range(len(bounded) - 2)} - {bounded}
    share = 1.0 / math.sqrt(len(trigrams) or 1)  # a long word weighs no more than a short one
    return (
        (crc32(f"w:{word}".encode()), _WORD_WEIGHT),
        *((crc32(f"t:{trigram}".encode()), share) for trigram in sorted(trigrams)),
    )

"""How many tokens a text has: one count for chunks and prompts, chosen by one setting.

`estimate` needs no file and no network, and errs on the safe side. It cuts a text into pieces about as small as a
byte-pair vocabulary would at worst: up to four letters, one digit, one sign, one newline, one run of blanks; letters
beyond ASCII weigh one to three. Measured against the vocabularies cl100k (GPT-4) and o200k (GPT-4o), estimate over
real count: docstrings and Python code 1.5, and 1.2 or more on every piece of 800 characters; German, French, Italian,
Spanish, Polish, Czech, Turkish 1.1-1.6; Greek, Russian, Arabic, Hindi, Thai, Chinese, Japanese, Korean 1.0-5.7. It
falls short on Latin-script languages that those vocabularies know little (Dutch 0.99, Finnish 0.87, Indonesian 0.85,
Swahili 0.73 of cl100k) and on random letters such as base64 (0.8). Name the model's own tokenizer where every token
counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pipeline.errors import ConfigError

TokenCount = Callable[[str], int]

_PIECE: Final = re.compile(
    r"[A-Z]{2,3}(?![a-z])|[A-Z]?[a-z]{1,4}|[A-Z]|([-=_*#.~])\1{1,7}|\n|[^\S\n]{2,16}|[!-@\[-`{-~\x00-\x08\x0e-\x1b\x7f]|[^\x00-\x7f]"
)
_HEAVY: Final = re.compile("[\u0080-\u036f\u0800-\uffff]")  # accents, and the scripts of three bytes a letter: 2 each
_HEAVIEST: Final = re.compile("[\U00010000-\U0010ffff]")  # pictures and rare scripts: 3 each


def estimate(text: str) -> int:
    """Return about how many tokens *text* has for a model of today, rather more than fewer."""
    pieces = len(_PIECE.findall(text))
    if text.isascii():
        return pieces
    return pieces + len(_HEAVY.findall(text)) + 2 * len(_HEAVIEST.findall(text))


def token_count(setting: str) -> TokenCount:
    """Return the counting function that *setting* names.

    Args:
        setting: `estimate`, or the path of a Hugging Face `tokenizer.json`.
    Raises:
        ConfigError: the file cannot be read as a tokenizer, or the package that reads it is missing.
    """
    if setting == "estimate":
        return estimate
    try:
        from tokenizers import Tokenizer  # an optional extra: imported only when it is asked for
    except ImportError as error:
        raise ConfigError(
            f"retriever.tokenizer names {setting}, which needs an optional package: pip install 'penstock[tokenizers]'"
        ) from error
    if not Path(setting).is_file():
        raise ConfigError(f"retriever.tokenizer is neither `estimate` nor a tokenizer.json: there is no file {setting}")
    try:
        tokenizer = Tokenizer.from_file(setting)
    except Exception as error:
        raise ConfigError(f"retriever.tokenizer: {setting} cannot be read as a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count

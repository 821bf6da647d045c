"""Cutting a document into chunks: pieces small enough to be found and quoted by themselves.

Cuts fall where the text's own structure has them (headings, paragraphs, sentences, words, in that order of
preference). Markdown is recognised, and each chunk remembers the headings above it: "It returns None" under
`Timer.cancel` is worthless without them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from semantic_text_splitter import MarkdownSplitter, TextSplitter

from stages.tokens import TokenCount

_HEADING: Final = re.compile(r"^ {0,3}(#{1,6})[ \t]+(\S.*)$", re.MULTILINE)
_FENCE: Final = re.compile(r"^ {0,3}(`{3,}|~{3,})[^`\n]*$.*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_MARKDOWN_NAME: Final = re.compile(r"\.(md|markdown|mdown)$", re.IGNORECASE)
_PLAIN_NAME: Final = re.compile(r"\.(txt|text|rst|log|csv|pdf)$", re.IGNORECASE)
_PARAGRAPH: Final = re.compile(r"\S(?:.+|\n(?!\s*\n))*")
_LOOK_CHARS_PER_TOKEN: Final = 8  # more than any text has but blanks and ruled lines
_WORD_CHARS: Final = 8_000
_ENDLESS_WORD: Final = re.compile(rf"\S{{{_WORD_CHARS + 1},}}")
OPENING_CHARS: Final = 200
MAX_HEADING_CHARS: Final = 200  # a heading is context; one that is longer is a paragraph by mistake


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a document.

    Attributes:
        text: as it stands in the document, without white space around it.
        heading: the headings it stands under, outermost first, joined by " > "; empty where there are none.
    """

    text: str
    heading: str = ""


class Chunker:
    """Cuts texts into chunks of at most so many tokens.

    Consecutive chunks share up to `overlap_tokens`, so that a sentence at a cut is whole in one of them.
    """

    def __init__(self, count: TokenCount, chunk_tokens: int, overlap_tokens: int) -> None:
        def enough(text: str) -> int:
            # The splitter measures all that is left of a section for every chunk it takes from it, only to learn that
            # it is too long. Its beginning tells that as well, and spares quadratic time on one endless paragraph.
            beginning = count(text[:look_chars])
            return beginning if beginning > chunk_tokens or len(text) <= look_chars else count(text)

        look_chars = _LOOK_CHARS_PER_TOKEN * chunk_tokens
        self._plain = TextSplitter.from_callback(enough, chunk_tokens, overlap=overlap_tokens)
        self._markdown = MarkdownSplitter.from_callback(enough, chunk_tokens, overlap=overlap_tokens)

    def cut(self, text: str, name: str = "") -> list[Chunk]:
        """Return the chunks of *text*, in order; none when it holds nothing but white space.

        Args:
            name: the document's name; a suffix like `.md` or `.txt` decides how the text is read.
        """
        sections = _sections(text)
        if not is_markdown(text, name):
            return [Chunk(piece) for _, section in sections for piece in self._plain.chunks(section) if piece.strip()]
        headings = _headings(text)
        starts = [start for start, _ in headings]
        chunks = []
        for offset, section in sections:
            for start, piece in self._markdown.chunk_indices(section):
                if piece.strip():
                    # A chunk that opens with headings stands under the last of them.
                    opened = offset + start + len(piece) - len(_after_headings(piece))
                    above = bisect_left(starts, opened) - 1
                    chunks.append(Chunk(piece, headings[above][1] if above >= 0 else ""))
        return chunks


def _sections(text: str) -> list[tuple[int, str]]:
    """Return where each section begins, and the section: the whole text, but for cuts inside endless words.

    The splitter's time grows with the square of a word's length: 400,000 letters in a row took it 2.6 s, in portions
    of `_WORD_CHARS` they take 0.1 s.
    """
    cuts = [0]
    for word in _ENDLESS_WORD.finditer(text):
        cuts += range(word.start() + _WORD_CHARS, word.end(), _WORD_CHARS)
    return [(start, text[start:end]) for start, end in pairwise([*cuts, len(text)])]


def opening(text: str) -> str:
    """Return the beginning of the first paragraph that is no heading: what the document says of itself."""
    for paragraph in _PARAGRAPH.finditer(text[: 10 * MAX_HEADING_CHARS]):
        if not paragraph[0].startswith("#"):
            return paragraph[0][:OPENING_CHARS]
    return ""


def is_markdown(text: str, name: str = "") -> bool:
    """Say whether a document is to be read as Markdown: its name says so, or says nothing and a heading is in it."""
    if _MARKDOWN_NAME.search(name):
        return True
    return not _PLAIN_NAME.search(name) and bool(_headings(text))


def _without_closing_signs(title: str) -> str:
    """Return *title* without the signs that may close a heading, as in `## Gates ##`."""
    title = title.rstrip()
    closed = title.rstrip("#")
    return closed.rstrip() if closed != closed.rstrip() else title


def _after_headings(piece: str) -> str:
    while heading := _HEADING.match(piece):
        piece = piece[heading.end() :].lstrip()
    return piece


def _headings(text: str) -> Sequence[tuple[int, str]]:
    """Return where each heading stands and its path from the outermost one down to it."""
    fences = [(fence.start(), fence.end()) for fence in _FENCE.finditer(text)]
    found: list[tuple[int, str]] = []
    path: list[tuple[int, str]] = []
    fence = 0
    for heading in _HEADING.finditer(text):
        while fence < len(fences) and fences[fence][1] <= heading.start():
            fence += 1
        if fence < len(fences) and fences[fence][0] <= heading.start():
            continue  # a comment in a code block
        level = len(heading[1])
        path = [(above, title) for above, title in path if above < level]
        path.append((level, _without_closing_signs(heading[2])[:MAX_HEADING_CHARS]))
        found.append((heading.start(), " > ".join(title for _, title in path)))
    return found

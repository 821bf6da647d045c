"""Answers without a model: the sentence of the given sources that covers the question best, with its source's number.

The prompt is the last user message, in the form a retrieval pipeline writes it:

    Sources:
    [1] title
    text, over any number of lines
    [2] title
    text

    Question: what is asked

Theory: each source is cut into sentences. A question's word weighs more the fewer sentences hold it (inverse document
frequency over the sentences at hand). A sentence scores the weights of the question's words it holds, and half of those
that only its title or heading holds, because a passage on a subject seldom repeats the subject's name. A second
sentence joins when it covers at least a third of the question anew; both then stand in the order of the sources. Words
are compared whole, in lower case, unstemmed.
Everything here is a pure function: the same prompt gets the same answer, in every process.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_SENTENCE_CHARS = 400  # a table or a code block has no full stops; nobody wants a page as the answer

# Letters and digits of any script; ideographs and kana one by one, since no spaces part their words.
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_぀-ヿ㐀-鿿]+")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_TOKEN_WITH_SPACE = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
_SOURCES = re.compile(r"^Sources:[ \t]*$", re.MULTILINE)
_SOURCE = re.compile(r"^\[(\d+)\][ \t]*(.*)$")
_QUESTION = re.compile(r"^Question:", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[`]*[^\Wa-z_])|(?<=[\u3002\uff01\uff1f])")
_HEADING = re.compile(r"^#{1,6}\s+(.*)$")
_UNDERLINE = re.compile(r"^[=\-~^*+#]{3,}$")
_ITEM = re.compile(r"^(?:[-*+•]|\d+[.)])\s+(.*)$")
_FENCE = re.compile(r"^(?:```|~~~)")

_STOP_TEXT = """
a about after all also am an and any are as at be because been before being between both but by can could d did do
does doing done each either for from further get gets give given had has have having he her here hers him his how i if
in into is it its itself just kind ll let made make makes many may me might mine more most much must my need no nor
not of off on once one only or other our ours out over own please re s same shall she should show so some such t tell
than that the their theirs them then there these they thing things this those through to too under until up upon us
use used uses using ve very was way we were what when where which while who whom whose why will with within without
would you your yours
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())


@dataclass(frozen=True, slots=True)
class Source:
    """One numbered passage of a prompt."""

    number: int
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of a source: its words, and apart from them those that only its title or heading holds."""

    text: str
    own: frozenset[str]
    context: frozenset[str]


@lru_cache(maxsize=1024)
def answer(prompt: str) -> str:
    """Return the answer to *prompt*, one last user message.

    With sources: one or two of their sentences, each followed by ` [number]`; when no sentence shares a word with the
    question it says so and quotes the first. Without sources: a sentence that repeats what was asked.
    """
    sources, question = split_prompt(prompt)
    cited = [(sentence, source.number) for source in sources for sentence in split_source(source.title, source.text)]
    if not cited:
        return f"There are no sources to answer from. You asked: {_clip(' '.join(question.split())) or '(nothing)'}"
    chosen = [cited[n] for n in choose([sentence for sentence, _ in cited], _question_words(question))]
    text = " ".join(f"{sentence.text} [{number}]" for sentence, number in chosen or cited[:1])
    return text if chosen else f"The sources do not say. The first of them begins: {text}"


def split_prompt(prompt: str) -> tuple[list[Source], str]:
    """Return the sources and the question of *prompt*; if it is not of the form above, none and the whole of it.

    A line that begins with a bracketed number starts a source only when the number is the next in order: passages have
    footnotes of their own.
    """
    questions = list(_QUESTION.finditer(prompt))
    head, question = (prompt[: questions[-1].start()], prompt[questions[-1].end() :]) if questions else (prompt, prompt)
    heading = _SOURCES.search(head)
    if heading is None:
        return [], question.strip()
    found: list[tuple[str, list[str]]] = []
    for line in head[heading.end() :].splitlines():
        start = _SOURCE.match(line)
        if start is not None and int(start[1]) == len(found) + 1:
            found.append((start[2].strip(), []))
        elif found:
            found[-1][1].append(line)
    return [Source(n, title, "\n".join(lines)) for n, (title, lines) in enumerate(found, start=1)], question.strip()


def choose(sentences: Sequence[Sentence], asked: frozenset[str]) -> list[int]:
    """Return the places of the one or two *sentences* that cover *asked* best; none when none holds a word of it."""
    own = [sentence.own & asked for sentence in sentences]
    context = [sentence.context & asked for sentence in sentences]
    held = Counter(word for found in (*own, *context) for word in found)
    weight = {word: math.log(1 + len(sentences) / count) for word, count in held.items()}

    def score(n: int) -> float:
        covered = sum(weight[word] for word in own[n])
        named = sum(weight[word] for word in context[n])
        # Among equals the shorter one says it more to the point; a fragment of one or two words says nothing.
        size = len(sentences[n].own)
        return (covered + named / 2) / (1 + size / 100) if size > 2 else covered / 4

    best = max(range(len(sentences)), key=score)  # the first of equals: sources come in order of rank
    if not score(best):
        return []

    def gain(n: int) -> float:
        return sum(weight[word] / (2 if word in context[best] else 1) for word in own[n] - own[best])

    second = max(range(len(sentences)), key=gain)
    return sorted((best, second)) if gain(second) * 3 >= sum(weight.values()) else [best]


# Cached, because retrieval brings the same passages to many questions.
@lru_cache(maxsize=1024)
def split_source(title: str, text: str) -> tuple[Sentence, ...]:
    """Return the sentences of one source; pieces without a letter or digit are none."""
    title_words = frozenset(words(title))
    return tuple(
        Sentence(sentence, own, (title_words | frozenset(words(heading))) - own)
        for heading, sentence in _split_text(text)
        if (own := frozenset(words(sentence)))
    )


def count_tokens(text: str) -> int:
    """Return how many tokens the mock counts in *text*: each word is one, each punctuation mark is one."""
    return sum(map(_count_line, text.split("\n")))  # no token spans two lines, and prompts share most of theirs


def split_tokens(text: str) -> list[str]:
    """Return *text* in pieces as they would be streamed: as many as `count_tokens`, in order and with nothing left out.

    White space goes before the word it leads to; at the end of the text it joins the last piece.
    """
    pieces: list[str] = _TOKEN_WITH_SPACE.findall(text)
    if len(pieces) > 1 and pieces[-1].isspace():
        pieces[-2:] = ["".join(pieces[-2:])]
    return pieces


def words(text: str) -> list[str]:
    """Return the words of *text* in lower case, stop words included."""
    return _WORD.findall(text.casefold())


@lru_cache(maxsize=4096)
def _count_line(line: str) -> int:
    return len(_TOKEN.findall(line))


def _question_words(question: str) -> frozenset[str]:
    asked = frozenset(words(question))
    return (asked - _STOP_WORDS) or asked  # "who are you" is stop words only


def _split_text(text: str) -> Iterator[tuple[str, str]]:
    """Yield each sentence with the heading it stands under; paragraphs, list items and headings end a sentence."""
    heading, block = "", list[str]()
    for line in [*text.splitlines(), ""]:
        stripped = line.strip()
        title, item = _HEADING.match(stripped), _ITEM.match(stripped)
        underlined = bool(_UNDERLINE.match(stripped)) and bool(block)
        if underlined:
            heading = block.pop()
        if underlined or not stripped or title or item or _FENCE.match(stripped) or stripped.startswith("|"):
            yield from ((heading, sentence) for sentence in _split_block(" ".join(block)))
            block = []
        if title:
            heading = title[1]
        elif item:
            block = [item[1]]
        elif stripped and not underlined and not _FENCE.match(stripped):
            block.append(stripped)


def _split_block(block: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(block):
        if sentence := sentence.strip():
            yield _clip(sentence)


def _clip(text: str) -> str:
    if len(text) <= MAX_SENTENCE_CHARS:
        return text
    return text[:MAX_SENTENCE_CHARS].rsplit(" ", 1)[0] + " ..."

"""The Lua scripts: one operation per file, called by content hash, so two versions can run during a deploy.

What is sent to Redis is the file's `#!lua` line, those paragraphs of `_prelude.lua` that the file uses, and the rest of
it, with the key spellings of `pipeline.keys` in place of `KEY.<name>`. Redis runs all of that at each call, so what a
script does not use, and a table of spellings, would cost it more than a small script's own work.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cache, cached_property
from importlib import resources
from typing import Final, NamedTuple

from pipeline.keys import LUA_KEYS

_FOLDER: Final = resources.files(__package__)
_WORD: Final = re.compile(r"\w+")
_DEFINED: Final = re.compile(r"^local (?:function )?([\w, ]+)", re.MULTILINE)


class _Paragraph(NamedTuple):
    """A paragraph of the prelude: the names that it defines, and all its words."""

    text: str
    defines: frozenset[str]
    words: frozenset[str]


def _paragraph(text: str) -> _Paragraph:
    names = " ".join(_DEFINED.findall(text))
    return _Paragraph(text, frozenset(_WORD.findall(names)), frozenset(_WORD.findall(text)))


@cache
def _prelude() -> tuple[_Paragraph, ...]:
    return tuple(map(_paragraph, _PRELUDE.split("\n\n")))


def _read(name: str) -> str:
    return (_FOLDER / f"{name}.lua").read_text()


_PRELUDE: Final = _read("_prelude")


class Script:
    """One script, put together when it is first called: a process uses few of them.

    Args:
        source: its file, read when the process begins, so that an update beneath it changes nothing.
    """

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self._source = source

    @cached_property
    def text(self) -> str:
        """What is sent."""
        shebang, _, body = self._source.partition("\n")
        text = f"{shebang}\n{_used(body)}\n{body}"
        return re.sub(r"\bKEY\.(\w+)", lambda key: f"'{LUA_KEYS[key[1]]}'", text)

    @cached_property
    def sha(self) -> str:
        """How Redis names it."""
        return hashlib.sha1(self.text.encode()).hexdigest()  # noqa: S324 - Redis' choice

    def __repr__(self) -> str:
        return f"<Script {self.name}>"


_LATE: Final = "record_end"
"""The one way to what few jobs need when they end: their batch, chat, report or delivery."""

_WRAPPED: Final = """\
local {name}_
local function {name}(...)
  if not {name}_ then
{paragraphs}
    {name}_ = {name}
  end
  return {name}_(...)
end"""


def _used(body: str) -> str:
    """Return the paragraphs of the prelude that *body* needs.

    To define a function costs each call of a script a quarter of a microsecond, and twice that where Redis' caches are
    cold. So those thirty that only `_LATE` needs are put inside of it, and defined when it is first called.
    """
    words = _WORD.findall(body)
    at_once = _needed(words, late=False)
    late = [paragraph for paragraph in _needed(words, late=True) if paragraph not in at_once]
    texts = []
    for paragraph in at_once:
        if late and _LATE in paragraph.defines:
            inside = "\n\n".join(inner.text for inner in (*late, paragraph))
            texts.append(_WRAPPED.format(name=_LATE, paragraphs=inside))
        else:
            texts.append(paragraph.text)
    return "\n\n".join(texts)


def _needed(words: Iterable[str], *, late: bool) -> list[_Paragraph]:
    """Return the paragraphs that define one of *words*, or what a later one of them uses; of `_LATE` only when *late*.

    A name in a comment counts as used, which does no harm.
    """
    wanted = set(words)
    found: list[_Paragraph] = []
    for paragraph in reversed(_prelude()):
        if not wanted.isdisjoint(paragraph.defines):
            found.append(paragraph)
            if late or _LATE not in paragraph.defines:
                wanted |= paragraph.words
    return found[::-1]


def _load(name: str) -> Script:
    return Script(name, _read(name))


ADOPT: Final = _load("adopt")
BATCH: Final = _load("batch")
BEGIN: Final = _load("begin")
BRIDGE: Final = _load("bridge")
BRIDGED: Final = _load("bridged")
CANCEL: Final = _load("cancel")
CHAT_CLEAR: Final = _load("chat_clear")
CHAT_IMAGE: Final = _load("chat_image")
CHAT_SAVE: Final = _load("chat_save")
CHAT_TAKE: Final = _load("chat_take")
CHAT_TYPING: Final = _load("chat_typing")
CLAIM: Final = _load("claim")
DELIVER: Final = _load("deliver")
DELIVERIES: Final = _load("deliveries")
ENLIST: Final = _load("enlist")
ENVELOPE: Final = _load("envelope")
ERASE: Final = _load("erase")
EXPIRE: Final = _load("expire")
FORGET: Final = _load("forget")
GATHER: Final = _load("gather")
GROUPS: Final = _load("groups")
HOLD: Final = _load("hold")
INCOMING: Final = _load("incoming")
KEEP_KEY: Final = _load("keep_key")
LAPSED: Final = _load("lapsed")
LOOK: Final = _load("look")
MESSAGE: Final = _load("message")
MOVE: Final = _load("move")
OBSERVE: Final = _load("observe")
OLDEST: Final = _load("oldest")
PERSONA: Final = _load("persona")
PERSON: Final = _load("person")
PLACE: Final = _load("place")
PROMOTE: Final = _load("promote")
QUEUE: Final = _load("queue")
RECALL: Final = _load("recall")
RECORDED: Final = _load("recorded")
RENEW: Final = _load("renew")
REPORT: Final = _load("report")
REQUEST: Final = _load("request")
REVIVE: Final = _load("revive")
SAY: Final = _load("say")
SECRET: Final = _load("secret")
SETTLE: Final = _load("settle")
STAGE: Final = _load("stage")
SUBMIT: Final = _load("submit")
SWEEP: Final = _load("sweep")
TAKE: Final = _load("take")
TOLD: Final = _load("told")
UNSTAGE: Final = _load("unstage")
WITHDRAW: Final = _load("withdraw")

"""The Lua scripts: one operation per file, called by content hash, so two versions can run during a deploy.

What is sent to Redis is the file's `#!lua` line, the key spellings of `pipeline.keys` as the table `KEY`, the shared
functions of `_prelude.lua`, and the rest of the file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Final

from pipeline.keys import LUA_KEYS


@dataclass(frozen=True, slots=True)
class Script:
    """One script, ready to be sent."""

    name: str
    text: str
    sha: str


def _load(name: str) -> Script:
    folder = resources.files(__package__)
    shebang, _, body = (folder / f"{name}.lua").read_text().partition("\n")
    keys = "local KEY = {" + ", ".join(f"{key} = '{spelling}'" for key, spelling in LUA_KEYS.items()) + "}"
    text = "\n".join([shebang, keys, (folder / "_prelude.lua").read_text(), body])
    return Script(name, text, hashlib.sha1(text.encode()).hexdigest())  # noqa: S324 - Redis names scripts by SHA-1


ADOPT: Final = _load("adopt")
BATCH: Final = _load("batch")
CANCEL: Final = _load("cancel")
CLAIM: Final = _load("claim")
ENLIST: Final = _load("enlist")
ENVELOPE: Final = _load("envelope")
EXPIRE: Final = _load("expire")
FORGET: Final = _load("forget")
GATHER: Final = _load("gather")
GROUPS: Final = _load("groups")
KEEP_KEY: Final = _load("keep_key")
LAPSED: Final = _load("lapsed")
LOOK: Final = _load("look")
MESSAGE: Final = _load("message")
MOVE: Final = _load("move")
OBSERVE: Final = _load("observe")
OLDEST: Final = _load("oldest")
PLACE: Final = _load("place")
PROMOTE: Final = _load("promote")
QUEUE: Final = _load("queue")
RECALL: Final = _load("recall")
RECORDED: Final = _load("recorded")
RENEW: Final = _load("renew")
REVIVE: Final = _load("revive")
SECRET: Final = _load("secret")
SETTLE: Final = _load("settle")
STAGE: Final = _load("stage")
SUBMIT: Final = _load("submit")
SWEEP: Final = _load("sweep")
TAKE: Final = _load("take")

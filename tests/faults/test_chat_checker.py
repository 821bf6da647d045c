"""The checker of chats finds what it is for: each promise is broken once, in files made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.faults.cell import Cell
from tests.faults.chats import mark, piece_together
from tests.faults.checkers import calls
from tests.faults.history import Writer
from tests.faults.report import chats as told_of
from tests.faults.verdict import Verdict

Json = dict[str, Any]
Files = dict[str, list[Json]]

IDS = ["a", "b", "c"]


def event(run: str, *message_ids: str) -> Json:
    """A reply to some of the messages."""
    text = f"You asked: {mark(1, IDS.index(message_ids[-1]))}"
    return {"type": "reply", "message_ids": list(message_ids), "message_id": run, "text": text}


def call(run: str, *message_ids: str) -> Json:
    """The call by which a replica made it."""
    turns = [{"role": "user", "content": mark(1, IDS.index(one))} for one in message_ids]
    messages = [{"role": "system", "content": "You are somebody."}, *turns]
    return {"request_id": run, "status": "completed", "arrived_s": 5.0, "began_s": 5.0, "messages": messages}


def remembering(run: str) -> Json:
    """The call that comes before it."""
    text = f"Remembered so far:\n{{}}\n\nNew messages:\nuser: {mark(1, 0)}"
    return call(run) | {"messages": [{"role": "user", "content": text}], "arrived_s": 4.0}


GOOD: Files = {
    "chats": [
        {"event": "sent", "n": 1, "chat": "burst-1", "ids": IDS},
        *({"event": "accepted", "n": 1, "id": one} for one in IDS),
        {"event": "told", "n": 1, "events": [event("r1", "a"), event("r2", "b", "c")]},
    ],
    "replica": [remembering("r1"), call("r1", "a"), remembering("r2"), call("r2", "a", "b", "c")],
}


def judge(folder: Path, files: Files) -> Verdict:
    """What a cell makes of these files."""
    cell = Cell(24, "by hand", 1, 1, folder)
    cell.faults.touch()
    with Writer(cell.chats) as writer:
        for line in files["chats"]:
            writer.write(**line)
    (folder / "run-1").mkdir()
    rows = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in files["replica"])
    (folder / "run-1" / "replica-1.jsonl").write_bytes(rows)
    return cell.judge()


def test_chat_whose_messages_were_answered_once_each_is_green(tmp_path: Path) -> None:
    verdict = judge(tmp_path, GOOD)
    assert verdict.broken == []
    assert (verdict.accepted, verdict.lost, verdict.duplicated, verdict.calls_repeated) == (3, 0, 0, 0)
    assert "1 chats, 3 messages, 2 replies" in told_of(verdict.as_json())


def tell(*events: Json) -> Callable[[Files], object]:
    return lambda files: files["chats"][-1].update(events=list(events))


REPLIES = (event("r1", "a"), event("r2", "b", "c"))
BROKEN: list[tuple[str, Callable[[Files], object]]] = [
    ("refused", lambda files: files["chats"].pop(2)),
    ("lost", tell(event("r1", "a"), event("r2", "c"))),
    ("lost", lambda files: files["chats"].pop()),
    ("doubled", tell(*REPLIES, event("r3", "c"))),
    ("doubled", tell(event("r1", "a"), event("r2", "a", "b", "c"))),
    ("strange", tell(*REPLIES, REPLIES[0] | {"message_ids": ["z"]})),
    ("ill", tell(REPLIES[0] | {"type": "failed"}, REPLIES[1])),
    ("ill", tell(REPLIES[0], REPLIES[1] | {"type": "expired"})),
    ("disordered", tell(*reversed(REPLIES))),
    ("disordered", tell(event("r1", "a"), event("r2", "c", "b"))),
    ("wrong", tell(REPLIES[0] | {"text": "Something else."}, REPLIES[1])),
    ("unlike replicas", lambda files: files["replica"].pop()),
    ("unlike replicas", lambda files: files["replica"][-1].update(call("r2", "a", "c"))),
    ("unlike replicas", lambda files: files["replica"][-1].update(status="aborted")),
    ("crashed", lambda files: files["chats"].append({"event": "client_crashed", "n": 1, "code": "KeyError: x"})),
    ("some messages are accepted", lambda files: files.update(chats=[])),
    ("calls are made again", lambda files: files["replica"].append(call("r2", "a", "b", "c"))),
    ("calls are made again", lambda files: files["replica"].append(remembering("r1"))),
]


@pytest.mark.parametrize(("claim", "harm"), BROKEN)
def test_broken_promise_makes_a_cell_red(tmp_path: Path, claim: str, harm: Callable[[Files], object]) -> None:
    files: Files = orjson.loads(orjson.dumps(GOOD))
    harm(files)
    broken = judge(tmp_path, files).broken
    assert any(claim in one for one in broken), broken


def test_a_run_asks_twice_and_repeats_neither_call(tmp_path: Path) -> None:
    """What to remember, and for the reply."""
    path = tmp_path / "replica-1.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in GOOD["replica"]))
    assert calls.check([], [path]).repeated == 0


def test_chats_are_pieced_together_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    with Writer(path) as writer:
        for line in [*GOOD["chats"], {"event": "unheard", "n": 1, "id": "a", "code": "redis_unavailable"}]:
            writer.write(**line)
    (burst,) = piece_together(path)
    assert (burst.chat, burst.ids, burst.accepted, burst.crashed) == ("burst-1", IDS, set(IDS), None)
    assert burst.events == GOOD["chats"][-1]["events"]

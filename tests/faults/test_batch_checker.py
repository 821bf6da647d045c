"""The checker of batches finds what it is for: each promise is broken once, in files made by hand."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
from standardwebhooks import Webhook

from tests.faults.batches import mark, piece_together
from tests.faults.cell import Cell
from tests.faults.history import Writer
from tests.faults.receiver import Receiver, digest
from tests.faults.report import batches as told_of
from tests.faults.verdict import Verdict
from tests.receivers import News

Json = dict[str, Any]
Files = dict[str, list[Json]]

IDS = ["m1", "m2"]
RESULTS = [
    {
        "id": message_id,
        "status": "completed",
        "code": None,
        "answer": f"You asked: {mark(1, position)}",
        "worker": "llm-1.1",
        "replica": "r",
        "attempts": 1,
    }
    for position, message_id in enumerate(IDS)
]
COUNTS = {"status": "completed", "request_count": 2, "response_count": 2, "failed_count": 0, "closed_ms": 9_000}
IN_REDIS = {"status": "completed", "req.count": "2", "res.count": "2", "failed.count": "0", "closed_ms": "9000"}
SAID = digest("all that the results say")
SENT = {"event": "sent", "n": 1, "queue": "letters", "kind": "messages", "size": 2, "subject": "heron"}
ACCEPTED = {"event": "accepted", "n": 1, "batch_id": "b1", "ids": IDS}
SEEN = {"event": "seen", "n": 1, "standing": COUNTS, "results": RESULTS, "digest": SAID}
KEPT = {"event": "kept", "n": 1, "batch": IN_REDIS, "messages": RESULTS, "digest": SAID}
WEBHOOK = {"job_id": "w1", "webhook_id": "msg_b1", "status": "completed", "finished_ms": 10_500}
RECORDED = {"event": "recorded", "n": 1, "batch": COUNTS, "messages": RESULTS, "webhooks": [WEBHOOK]}
NEWS = {
    "arrived_s": 10.0, "answered_s": 10.2, "queue": "letters", "webhook_id": "msg_b1", "problem": None, "status": 204,
    "type": "batch.completed", "digest": SAID, "batch_id": "b1",
}  # fmt: skip
CALLS = [
    {"request_id": message_id, "status": "completed", "arrived_s": 5.0, "began_s": 5.0, "messages": mark(1, position)}
    for position, message_id in enumerate(IDS)
]
GOOD: Files = {"batches": [SENT, ACCEPTED, SEEN, SEEN, KEPT, RECORDED], "news": [NEWS], "replica": CALLS, "faults": []}
KILL = {"event": "fault", "fault": "kill", "victim": "webhook-1.1", "held": 1}
DELETED = {"event": "fault", "fault": "entry deleted", "victim": "message 1", "held": None, "message": "m2"}
LOST = {"status": "failed", "code": "lost", "answer": None}


def good() -> Files:
    """The files in which all is well, to be spoilt: no two of their lines share a part."""
    files: Files = orjson.loads(orjson.dumps(GOOD))
    return files


def judge(folder: Path, files: Files) -> Verdict:
    """What a cell makes of these files."""
    cell = Cell(22, "by hand", 1, 1, folder)
    with Writer(cell.batches) as batches, Writer(cell.faults) as faults:
        for line in files["batches"]:
            batches.write(**line)
        for line in files["faults"]:
            faults.write(**line)
    cell.news.write_bytes(_lines(files["news"]))
    (folder / "run-1").mkdir()
    (folder / "run-1" / "replica-1.jsonl").write_bytes(_lines(files["replica"]))
    return cell.judge()


def _lines(rows: list[Json]) -> bytes:
    return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def test_batch_of_which_all_say_the_same_is_green(tmp_path: Path) -> None:
    verdict = judge(tmp_path, GOOD)
    assert verdict.broken == []
    assert verdict.accepted == 2
    assert "1 batches closed, 2 messages, 1 webhook calls" in told_of(verdict.as_json())


def drop(name: str, index: int) -> Callable[[Files], object]:
    return lambda files: files[name].pop(index)


def change(name: str, index: int, **values: Any) -> Callable[[Files], object]:
    return lambda files: files[name][index].update(values)


def add(name: str, line: Json, **values: Any) -> Callable[[Files], object]:
    return lambda files: files[name].append(line | values)


BROKEN: list[tuple[str, Callable[[Files], object]]] = [
    ("doubled", add("batches", ACCEPTED, batch_id="b2")),
    ("unclosed", lambda files: files.update(batches=[SENT, ACCEPTED, KEPT, RECORDED])),
    ("reopened", change("batches", 3, digest="another")),
    ("reopened", change("batches", 3, standing=COUNTS | {"closed_ms": 9_001})),
    ("reopened", drop("batches", 3)),
    (
        "miscounted",
        lambda files: [line.update(standing=COUNTS | {"response_count": 1}) for line in files["batches"][2:4]],
    ),
    ("miscounted", change("batches", 4, batch=IN_REDIS | {"res.count": "3"})),
    ("disordered", lambda files: [line["results"].reverse() for line in files["batches"][2:4]]),
    ("wrong", lambda files: [line["results"][0].update(answer=mark(1, 1)) for line in files["batches"][2:4]]),
    ("silent", drop("news", 0)),
    ("silent", change("news", 0, status=500)),
    ("misheard", change("news", 0, problem="No matching signature found")),
    ("misheard", change("news", 0, digest="something else")),
    ("misheard", change("news", 0, queue="labels")),
    ("misheard", add("news", NEWS, webhook_id="msg_other")),
    ("late", lambda files: (add("news", NEWS, arrived_s=10.6)(files), add("faults", KILL)(files))),
    ("are told again", add("news", NEWS, arrived_s=10.3)),
    ("unlike redis", change("batches", 4, digest="another")),
    ("unlike redis", change("batches", 4, messages=[RESULTS[0], None])),
    ("unlike redis", drop("batches", 4)),
    ("unlike history", drop("batches", 5)),
    ("unlike history", change("batches", 5, batch=None)),
    ("unlike history", change("batches", 5, batch=COUNTS | {"status": "pending"})),
    ("unlike history", change("batches", 5, messages=RESULTS[:1])),
    ("unlike history", change("batches", 5, webhooks=[])),
    ("unlike history", change("batches", 5, webhooks=[WEBHOOK, WEBHOOK | {"job_id": "w2"}])),
    ("unlike replicas", drop("replica", 0)),
    ("unlike replicas", change("replica", 0, status="failed")),
    ("unlike replicas", add("replica", CALLS[0], request_id="nobody")),
    ("calls are made again", add("replica", CALLS[0], arrived_s=6.0)),
    ("were not accepted", add("batches", SENT, n=2)),
    ("senders of batches crashed", add("batches", {"event": "client_crashed", "n": 1, "code": "KeyError: 'error'"})),
    ("messages ended otherwise than well", lambda files: _end(files, LOST)),
    ("deleted by hand, and not lost", add("faults", DELETED)),
]


def _end(files: Files, outcome: Json) -> None:
    """Let the second message end otherwise, and everybody know it."""
    results = [RESULTS[0], RESULTS[1] | outcome]
    counts = COUNTS | {"status": "completed_with_errors", "failed_count": 1}
    in_redis = IN_REDIS | {"status": "completed_with_errors", "failed.count": "1"}
    seen = SEEN | {"results": results, "standing": counts}
    kept, recorded = KEPT | {"batch": in_redis, "messages": results}, RECORDED | {"batch": counts, "messages": results}
    files["batches"] = [SENT, ACCEPTED, seen, seen, kept, recorded]


@pytest.mark.parametrize(("claim", "harm"), BROKEN)
def test_broken_promise_makes_a_cell_red(tmp_path: Path, claim: str, harm: Callable[[Files], object]) -> None:
    files = good()
    harm(files)
    broken = judge(tmp_path, files).broken
    assert any(claim in one for one in broken), broken


def test_what_was_deleted_by_hand_may_be_lost_and_is_told_apart(tmp_path: Path) -> None:
    files = good()
    _end(files, LOST)
    files["faults"].append(DELETED)
    verdict = judge(tmp_path, files)
    assert (verdict.broken, verdict.lost, verdict.destroyed) == ([], 0, 1)


def test_news_that_a_killed_worker_may_have_told_may_come_again(tmp_path: Path) -> None:
    """Before its delivery was settled."""
    files = good()
    files["news"].append(NEWS | {"arrived_s": 10.4})
    files["faults"].append(KILL)
    assert judge(tmp_path, files).broken == []


def test_single_message_is_told_of_by_itself(tmp_path: Path) -> None:
    """Not as a batch; and what is answered from the documents need not repeat the question."""
    files = good()
    files["batches"][0]["kind"] = "single"
    assert any("misheard" in one for one in judge(tmp_path, files).broken)
    (tmp_path / "retrieved").mkdir()
    files["batches"][0]["kind"] = "retrieve"
    assert any("wrong" in one for one in judge(tmp_path / "retrieved", files).broken)


async def test_receiver_believes_what_is_signed_only(tmp_path: Path) -> None:
    """And writes down what it was told, believed or not."""
    secret = "whsec_" + "A" * 43 + "="
    async with Receiver(tmp_path / "news.jsonl", Random(1)) as receiver:
        receiver.secrets["letters"] = secret
        text, now = orjson.dumps({"type": "batch.completed", "data": {"batch_id": "b1"}}).decode(), datetime.now(UTC)
        headers = {
            "webhook-id": "msg_b1", "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(secret).sign("msg_b1", now, text),
        }  # fmt: skip
        good = receiver._read(News("/letters", headers, text.encode()))
        bad = receiver._read(News("/letters", headers, text.replace("b1", "b2").encode()))
    assert (good["problem"], good["batch_id"], good["digest"]) == (None, "b1", digest({"batch_id": "b1"}))
    assert bad["problem"]


def test_batches_are_pieced_together_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "batches.jsonl"
    with Writer(path) as writer:
        for line in [*GOOD["batches"], ACCEPTED, {"event": "refused", "n": 1, "code": "overloaded"}]:
            writer.write(**line)
    (batch,) = piece_together(path)
    assert (batch.batch_id, batch.ids, len(batch.seen), batch.refusals) == ("b1", IDS, 2, ["overloaded"])
    assert len(batch.batches) == 1

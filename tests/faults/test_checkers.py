"""The checkers find what they are for: each promise is broken once, in a history made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from pipeline import keys
from pipeline.connection import Link
from tests.faults import report
from tests.faults.checkers import calls, fencing, leftovers, order, outcomes
from tests.faults.history import Told, Writer, piece_together, read
from tests.faults.load import question
from tests.servers import RedisServer

RIGHT = "The heron keeps the amber key. [1]"
GOOD = {"status": "completed", "worker": "llm-1.1", "replica": "r", "answer": RIGHT, "finished_us": 5}


def told(*seen: dict[str, Any], n: int = 1, ids: tuple[str, ...] = ("a",)) -> Told:
    """A question about the heron, accepted, and what was seen of its outcome."""
    return Told(n, "ask", "heron", 0.0, ids=list(ids), outcomes=list(seen))


def check(*requests: Told, alive: frozenset[str] = frozenset()) -> outcomes.Outcomes:
    return outcomes.check(requests, alive)


def test_one_outcome_seen_twice_is_fine() -> None:
    found = check(told(GOOD, GOOD))
    assert [found.lost, found.unseen, found.duplicated, found.wrong] == [[], [], [], []]
    assert found.by_status == {"completed": 1}


def test_look_that_sees_less_is_no_second_outcome() -> None:
    """An answer over HTTP shows less than the completion does."""
    over_http = {name: GOOD[name] for name in ("status", "worker", "replica", "answer")}
    assert not check(told(over_http, GOOD)).duplicated


def test_accepted_job_that_nobody_knows_is_lost() -> None:
    assert check(told()).lost == [1]


@pytest.mark.parametrize("loss", [{"status": "lost"}, {"status": "failed", "code": "lost"}])
def test_reported_loss_is_a_loss(loss: dict[str, Any]) -> None:
    assert check(told(loss)).lost == [1]


def test_job_that_still_lives_is_unseen_not_lost() -> None:
    found = check(told(), alive=frozenset("a"))
    assert (found.lost, found.unseen) == ([], [1])


@pytest.mark.parametrize(
    "second", [GOOD | {"finished_us": 6}, GOOD | {"worker": "llm-2.1"}, {"status": "failed"}, {"status": "vanished"}]
)
def test_outcome_that_changes_is_a_second_one(second: dict[str, Any]) -> None:
    assert check(told(GOOD, second)).duplicated == [1]


def test_second_job_for_one_request_is_a_duplicate() -> None:
    assert check(told(GOOD, ids=("a", "b"))).duplicated == [1]


def test_answer_to_another_question_is_wrong() -> None:
    assert check(told(GOOD | {"answer": "The otter keeps the bronze key. [1]"})).wrong == [1]


def test_refused_and_unknown_requests_are_neither_accepted_nor_lost() -> None:
    refused = Told(1, "ask", "heron", 0.0, refused="overloaded")
    unknown = Told(2, "ask", "heron", 0.0, is_unknown=True)
    found = check(refused, unknown)
    assert (found.accepted, found.refused, found.unknown, found.lost) == (0, 1, 1, [])


def test_outcome_by_a_worker_that_had_lost_the_entry_is_stale() -> None:
    fault = {"victim": "llm-1.1", "ids": ["a"]}
    assert fencing.check([told(GOOD)], [fault]) == [1]
    assert fencing.check([told(GOOD)], [fault | {"victim": "llm-2.1"}]) == []


@pytest.mark.parametrize(("page", "found"), [(7, []), (8, []), (6, [1])])
def test_consulted_version_is_never_older_than_one_that_was_done(page: int, found: list[int]) -> None:
    request = Told(1, "consult", "7", 0.0, ids=["a"], outcomes=[{"answer": f"The ledger stands at page {page}. [1]"}])
    assert order.check([request]) == found


def test_calls_are_told_apart_by_what_the_replicas_wrote(tmp_path: Path) -> None:
    """Made, answered twice, for nobody, and with another one's question."""
    asked = [{"role": "user", "content": question(1, "heron")}]
    lines: list[dict[str, Any]] = [
        {"request_id": "a", "status": "completed", "messages": asked},
        {"request_id": "a", "status": "completed", "messages": asked},
        {"request_id": "a", "status": "aborted", "messages": asked},
        {"request_id": "stranger", "status": "completed", "messages": asked},
        {"request_id": "b", "status": "completed", "messages": asked},
    ]
    record = tmp_path / "replica-1.jsonl"
    record.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines) + b'{"torn')
    found = calls.check([told(GOOD), told(GOOD, n=2, ids=("b",))], [record])
    assert (found.made, found.completed, found.aborted) == (5, 4, 1)
    assert (found.repeated, found.strangers, found.crossed) == (1, 1, ["b"])


async def test_leftovers_are_found(redis_server: RedisServer, link: Link) -> None:
    """A load above 0, a lease, an entry, a live record, a key without a TTL."""
    from redis.asyncio import Redis

    await link.call("SET", keys.LOAD + "http://one", 1)
    await link.call("ZADD", keys.LEASES + "http://one", 1, "a")
    await link.call("XADD", keys.stream("llm"), "*", "data", "{}")
    await link.call("HSET", keys.LIVE + "a", "entry", "")
    await link.call("SET", "stray", 1)
    await link.call("SET", keys.COMPLETION + "a", "{}", "PX", 60_000)
    async with Redis.from_url(redis_server.url) as redis:
        found = await leftovers.check(redis)
    assert found.load == [keys.LEASES + "http://one", keys.LOAD + "http://one"]
    assert found.work == [keys.stream("llm"), keys.LIVE + "a"]
    assert found.endless == ["stray"]
    await link.call("FLUSHALL")


def test_history_is_pieced_together_from_its_file(tmp_path: Path) -> None:
    """What was written comes back; a line that a crash tore is left out."""
    path = tmp_path / "clients.jsonl"
    with Writer(path) as clients:
        clients.write("submitted", n=1, kind="keyed", subject="heron")
        clients.write("unknown", n=1, code="TimeoutError")
        clients.write("accepted", n=1, id="a")
        clients.write("outcome", n=1, id="a", outcome=GOOD)
        clients.write("submitted", n=2, kind="ask", subject="heron")
        clients.write("refused", n=2, code="overloaded")
    with path.open("ab") as file:
        file.write(b'{"event":"outc')
    first, second = piece_together(path)
    assert (first.ids, first.is_unknown, first.outcomes) == (["a"], True, [GOOD])
    assert (second.is_accepted, second.refused) == (False, "overloaded")
    assert len(list(read(path))) == 6


def test_page_is_written_between_its_comments_only() -> None:
    page = "before\n<!-- matrix: begin -->\nold\n<!-- matrix: end -->\nafter\n"
    assert report.put(page, "matrix", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="once, not 0"):
        report.put(page, "breaks", "new")

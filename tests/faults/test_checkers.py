"""The checkers find what they are for: each promise is broken once, in a history made by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from pipeline import keys
from pipeline.connection import Link
from tests.faults import __main__ as program
from tests.faults import report, sabotage
from tests.faults.cell import Cell, Verdict
from tests.faults.cell import run as run_cell
from tests.faults.checkers import calls, fencing, leftovers, order, outcomes
from tests.faults.cluster import samples
from tests.faults.history import Told, Writer, piece_together, read
from tests.faults.load import question
from tests.servers import RedisServer

RIGHT = "The heron keeps the amber key. [1]"
GOOD = {"status": "completed", "worker": "llm-1.1", "replica": "r", "answer": RIGHT, "finished_us": 5}


FAILED = {"status": "failed", "worker": "llm-1.1", "replica": "r"}


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


@pytest.mark.parametrize("loss", [{"status": "lost"}, FAILED | {"code": "lost"}, FAILED | {"code": "orphan"}])
def test_reported_loss_is_a_loss(loss: dict[str, Any]) -> None:
    assert check(told(loss)).lost == [1]


def test_outcome_that_vanishes_is_a_loss() -> None:
    found = check(told(GOOD, {"status": "vanished"}))
    assert (found.lost, found.duplicated) == ([1], [])


def test_outcome_that_was_read_once_is_told() -> None:
    assert check(told(GOOD)).once == [1]
    assert check(told(GOOD, GOOD)).once == []


@pytest.mark.parametrize("answer", [{}, {"answer": None}, {"answer": ""}])
def test_completed_without_an_answer_is_wrong(answer: dict[str, Any]) -> None:
    assert check(told({"status": "completed", **answer})).wrong == [1]


def test_edit_needs_no_answer() -> None:
    edit = Told(1, "edit", "0", 0.0, ids=["a"], outcomes=[{"status": "completed"}])
    assert check(edit).wrong == []


def test_job_that_still_lives_is_unseen_not_lost() -> None:
    found = check(told(), alive=frozenset("a"))
    assert (found.lost, found.unseen) == ([], [1])


@pytest.mark.parametrize("second", [GOOD | {"finished_us": 6}, GOOD | {"worker": "llm-2.1"}, {"status": "failed"}])
def test_outcome_that_changes_is_a_second_one(second: dict[str, Any]) -> None:
    assert check(told(GOOD, second)).duplicated == [1]


def test_second_job_for_one_request_is_a_duplicate() -> None:
    assert check(told(GOOD, ids=("a", "b"))).duplicated == [1]


def test_answer_to_another_question_is_wrong() -> None:
    assert check(told(GOOD | {"answer": "The otter keeps the bronze key. [1]"})).wrong == [1]


def test_refused_and_unknown_requests_are_neither_accepted_nor_lost() -> None:
    refused = Told(1, "ask", "heron", 0.0, refusals=["overloaded"])
    unknown = Told(2, "ask", "heron", 0.0, is_unknown=True)
    found = check(refused, unknown)
    assert (found.accepted, found.refused, found.unknown, found.lost) == (0, 1, 1, [])


def test_outcome_by_a_worker_that_had_lost_the_entry_is_stale() -> None:
    fault = {"victim": "llm-1.1", "ids": ["a"], "looked_s": 100.0}
    assert fencing.check([told(GOOD)], [fault], {"a": 99.0}) == [1]
    assert fencing.check([told(GOOD)], [fault | {"victim": "llm-2.1"}], {"a": 99.0}) == []


def test_outcome_of_a_job_that_came_back_to_the_worker_is_not_stale() -> None:
    """It was tried again, with a call that began after the loss."""
    fault = {"victim": "llm-1.1", "ids": ["a"], "looked_s": 100.0}
    assert fencing.check([told(GOOD)], [fault], {"a": 101.0}) == []


@pytest.mark.parametrize(("page", "found"), [(7, []), (8, []), (6, [1])])
def test_consulted_version_is_never_older_than_one_that_was_done(page: int, found: list[int]) -> None:
    request = Told(1, "consult", "7", 0.0, ids=["a"], outcomes=[{"answer": f"The ledger stands at page {page}. [1]"}])
    assert order.check([request]) == found


def test_calls_are_told_apart_by_what_the_replicas_wrote(tmp_path: Path) -> None:
    """Made, answered twice, for nobody, and with another one's question."""
    asked = [{"role": "user", "content": question(1, "heron")}]
    lines: list[dict[str, Any]] = [
        {"request_id": "a", "status": "completed", "began_s": 7.0, "messages": asked},
        {"request_id": "a", "status": "completed", "began_s": 8.0, "messages": asked},
        {"request_id": "a", "status": "aborted", "messages": asked},
        {"request_id": "stranger", "status": "completed", "began_s": 7.0, "messages": asked},
        {"request_id": "b", "status": "completed", "began_s": 7.0, "messages": asked},
    ]
    record = tmp_path / "replica-1.jsonl"
    record.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines) + b'{"torn')
    found = calls.check([told(GOOD), told(GOOD, n=2, ids=("b",))], [record])
    assert (found.made, found.completed, found.aborted) == (5, 4, 1)
    assert found.answering["a"] == 8.0
    assert (found.repeated, found.strangers, found.crossed) == (1, 1, ["b"])


def test_second_job_for_a_request_is_seen_by_the_replicas(tmp_path: Path) -> None:
    """Also when its client was told of one id only, or of none; and a call for a request that was refused."""
    asked = [{"role": "user", "content": question(1, "heron")}]
    record = tmp_path / "replica-1.jsonl"
    lines = [{"request_id": job_id, "status": "aborted", "messages": asked} for job_id in "ab"]
    record.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
    refused = Told(1, "ask", "heron", 0.0, refusals=["overloaded"])
    assert calls.check([told(GOOD)], [record]).doubled == [1]
    assert calls.check([refused], [record]).unbidden == [1]
    refused.is_unknown = True  # sent again, and then nothing was heard
    assert calls.check([refused], [record]).unbidden == []


# --- what a cell makes of it ----------------------------------------------------------------------


Event = dict[str, Any]
SUBMITTED: Event = {"event": "submitted", "n": 1, "kind": "ask", "subject": "heron"}
ACCEPTED: Event = {"event": "accepted", "n": 1, "id": "a"}
UNKNOWN: Event = {"event": "unknown", "n": 1, "code": "TimeoutError"}
KILL: Event = {"event": "fault", "fault": "kill", "victim": "llm-1.1", "held": 1}
DRAIN: Event = {"event": "fault", "fault": "drain", "victim": "gateway-1.1", "held": None}


def ends(outcome: Event) -> Event:
    return {"event": "outcome", "n": 1, "id": "a", "outcome": outcome}


def judge(tmp_path: Path, *events: Event, answered: int = 0, **settings: Any) -> Verdict:
    """What a cell says of one request with this history; the replicas have answered it so many times."""
    cell = Cell(1, "by hand", 1, 1, tmp_path)
    for name, value in settings.items():
        setattr(cell, name, value)
    with Writer(cell.clients) as clients, Writer(cell.faults) as faults:
        clients.write(**SUBMITTED)
        for event in events:
            (faults if event["event"] == "fault" else clients).write(**event)
    call = {"request_id": "a", "status": "completed", "began_s": 7.0, "messages": question(1, "heron")}
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "replica-1.jsonl").write_bytes(
        b"".join([orjson.dumps(call, option=orjson.OPT_APPEND_NEWLINE)] * answered)
    )
    return cell.judge()


def test_cell_in_which_all_went_well_is_green(tmp_path: Path) -> None:
    assert judge(tmp_path, ACCEPTED, ends(GOOD), ends(GOOD), answered=1).broken == []


def test_faults_that_are_not_aimed_have_no_share_of_hits(tmp_path: Path) -> None:
    verdict = judge(tmp_path, ACCEPTED, ends(GOOD), ends(GOOD), DRAIN)
    assert (verdict.is_green, verdict.hit_share) == (True, None)


@pytest.mark.parametrize(
    ("claim", "events"),
    [
        ("ended otherwise than well: {'failed/poison': 1}", [ACCEPTED, *[ends(FAILED | {"code": "poison"})] * 2]),
        ("ended otherwise than well: {'expired/expired': 1}", [ACCEPTED, *[ends({"status": "expired"})] * 2]),
        ("lost: 1", [ACCEPTED, *[ends(FAILED | {"code": "orphan"})] * 2]),
        ("lost: 1", [ACCEPTED, ends(GOOD), ends({"status": "vanished"})]),
        ("wrong: 1", [ACCEPTED, *[ends(GOOD | {"answer": ""})] * 2]),
        ("read only once: 1", [ACCEPTED, ends(GOOD)]),
        ("told nothing: 1", []),
        ("unseen: 1", [{"event": "gave_up", "n": 1, "is_quiet": True}]),
        ("at most 0 requests are unknown, not 1", [{"event": "gave_up", "n": 1, "is_quiet": False}]),
        ("at most 0 requests are unknown, not 1", [UNKNOWN, KILL]),
        ("clients crashed: 1, among them ['1: KeyError']", [{"event": "client_crashed", "n": 1, "code": "KeyError"}]),
        ("refused for no good reason: {'internal': 1}", [{"event": "refused", "n": 1, "code": "internal"}]),
        ("0 of 1 faults met work", [KILL | {"held": 0}, ACCEPTED, *[ends(GOOD)] * 2]),
    ],
)
def test_broken_promise_makes_a_cell_red(tmp_path: Path, claim: str, events: list[Event]) -> None:
    assert judge(tmp_path, *events).broken[0].startswith(claim)


@pytest.mark.parametrize("word", ["failed/poison", "failed"])
def test_scenario_says_how_requests_may_end(tmp_path: Path, word: str) -> None:
    ended = [ends(FAILED | {"code": "poison"})] * 2
    verdict = judge(tmp_path, ACCEPTED, *ended, may_end={word})
    assert (verdict.is_green, verdict.endings) == (True, {"failed/poison": 1})


def test_scenario_says_what_it_destroys(tmp_path: Path) -> None:
    assert judge(tmp_path, ACCEPTED, ends({"status": "lost", "code": "job_lost"}), may_lose={1}).is_green


@pytest.mark.parametrize(
    ("answered", "faults", "may_repeat", "is_green"),
    [(2, [], 0, False), (2, [KILL], 0, True), (3, [KILL], 0, False), (3, [KILL], 1, True), (2, [DRAIN], 0, False)],
)
def test_call_is_made_again_only_for_work_that_a_fault_met(
    tmp_path: Path, answered: int, faults: list[Event], may_repeat: int, is_green: bool
) -> None:
    events = [ACCEPTED, ends(GOOD), ends(GOOD), *faults]
    verdict = judge(tmp_path, *events, answered=answered, may_repeat=may_repeat)
    assert (verdict.is_green, verdict.calls_repeated) == (is_green, answered - 1)


def test_refused_request_must_not_be_called_for(tmp_path: Path) -> None:
    refused = {"event": "refused", "n": 1, "code": "stopping"}
    [broken] = judge(tmp_path, refused, answered=1).broken
    assert broken.startswith("refused, and called for: 1")


def test_unknown_is_what_faults_of_gateways_and_redis_excuse(tmp_path: Path) -> None:
    verdict = judge(tmp_path, UNKNOWN, DRAIN)
    assert (verdict.is_green, verdict.unknown) == (True, 1)


def test_scenario_says_how_many_may_be_unknown(tmp_path: Path) -> None:
    assert not judge(tmp_path, UNKNOWN, DRAIN, may_be_unknown=0).is_green


# --- metrics --------------------------------------------------------------------------------------


def test_metric_that_is_not_there_is_no_zero() -> None:
    text = "# HELP told_total Told.\n# TYPE told_total counter\n# HELP a b\n# TYPE a gauge\na 1.0\n"
    assert samples(text, "told_total") == {"a": 1.0}
    with pytest.raises(LookupError, match="there is no metric untold_total"):
        samples(text, "untold_total")


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
    assert (second.is_accepted, second.is_refused, second.refusals) == (False, True, ["overloaded"])
    assert len(list(read(path))) == 6


@pytest.mark.parametrize("one", sabotage.BREAKS, ids=lambda one: one.name)
def test_line_to_be_broken_is_there_once(one: sabotage.Break) -> None:
    text = (report.ROOT / one.file).read_text()
    assert one.became in sabotage.broken(one, text)


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--seed", "-1"], ["--slice", "--scenario", "2"], ["--write"]])
def test_command_line_that_makes_no_sense_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        program.main(words)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("accepted", "kills", "is_enough"), [(5_000, 15, True), (4_999, 15, False), (5_000, 14, False)]
)
def test_slice_as_a_whole_must_have_done_enough(accepted: int, kills: int, *, is_enough: bool) -> None:
    verdicts = [Verdict(1, "one", 1, accepted=accepted - 1, kills=kills), Verdict(2, "another", 1, accepted=1)]
    assert program.tell_of_the_slice(verdicts, 1.0) == is_enough


def test_verdict_is_told_in_short_lines() -> None:
    verdict = Verdict(1, "one", 1, figures={f"figure {number}": "some words" for number in range(20)})
    assert all(len(line) <= program.WIDTH for line in program.line(verdict).splitlines())


async def test_scenario_that_fails_is_told_with_its_traceback(tmp_path: Path) -> None:
    async def fails(cell: Cell) -> None:
        raise RuntimeError("it fell over\nand more")

    verdict = await run_cell(1, "by hand", fails, 1, 1, tmp_path)
    assert verdict.broken == ["the scenario itself failed: RuntimeError: it fell over"]
    assert "in fails" in (tmp_path / "scenario.txt").read_text()


async def test_scenario_that_hangs_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(cell: Cell) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("tests.faults.cell.LIMIT_S", 0.05)
    verdict = await run_cell(1, "by hand", hangs, 1, 1, tmp_path)
    assert verdict.broken == ["the scenario itself failed: it took more than 0.25 s"]


def test_matrix_with_a_missing_cell_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts, page = tmp_path / "verdicts.jsonl", tmp_path / "page.md"
    cells = [Verdict(number, "one", 1).as_json() for number in report.MATRIX]
    page.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in ("matrix", "breaks")))
    monkeypatch.setattr(report, "VERDICTS", verdicts)
    monkeypatch.setattr(report, "PAGE", page)
    for count, code in ((20, 0), (19, 1)):
        verdicts.write_bytes(b"".join(orjson.dumps(cell, option=orjson.OPT_APPEND_NEWLINE) for cell in cells[:count]))
        assert report.main() == code
    assert "missing: 20" in capsys.readouterr().out


def test_consults_that_were_told_of_a_page_are_counted() -> None:
    some = [{"answer": "The ledger stands at page 7. [1]"}]
    requests = [Told(1, "consult", "7", 0.0, outcomes=some), Told(2, "consult", "0", 0.0, outcomes=[{"answer": "?"}])]
    assert order.told_of_a_page(requests) == 1


def test_page_is_written_between_its_comments_only() -> None:
    page = "before\n<!-- matrix: begin -->\nold\n<!-- matrix: end -->\nafter\n"
    assert report.put(page, "matrix", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="once, not 0"):
        report.put(page, "breaks", "new")

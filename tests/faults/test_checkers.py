"""The checkers find what they are for: each promise is broken once, in a history made by hand."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from pipeline import keys
from pipeline.connection import Link
from tests.faults import __main__ as program
from tests.faults import durability, report, sabotage
from tests.faults.cell import Cell
from tests.faults.cell import run as run_cell
from tests.faults.checkers import calls, fencing, leftovers, order, outcomes
from tests.faults.cluster import samples
from tests.faults.history import Told, Writer, piece_together, read
from tests.faults.judge import NOTED_WITHIN_S
from tests.faults.load import question
from tests.faults.scenarios import SCENARIOS
from tests.faults.verdict import Verdict
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


def record(folder: Path, *words: str, at_s: list[int] | None = None) -> Path:
    """What a replica wrote of calls with the question of request 1: `JOB` for one it completed, or `JOB STATUS`."""
    asked = [{"role": "user", "content": question(1, "heron")}]
    path = folder / "replica-1.jsonl"
    with path.open("wb") as file:
        for number, word in enumerate(words):
            job_id, _, status = word.partition(" ")
            came_s = float(at_s[number] if at_s else number)
            line = {"request_id": job_id, "status": status or "completed", "arrived_s": came_s, "began_s": came_s}
            file.write(orjson.dumps({**line, "messages": asked}, option=orjson.OPT_APPEND_NEWLINE))
        file.write(b'{"torn')
    return path


@pytest.mark.parametrize(("page", "found"), [(7, []), (8, []), (6, [1])])
def test_consulted_version_is_never_older_than_one_that_was_done(page: int, found: list[int]) -> None:
    request = Told(1, "consult", "7", 0.0, ids=["a"], outcomes=[{"answer": f"The ledger stands at page {page}. [1]"}])
    assert order.check([request]) == found


def test_calls_are_told_apart_by_what_the_replicas_wrote(tmp_path: Path) -> None:
    """Made, answered twice, and with another one's question."""
    found = calls.check([told(GOOD), told(GOOD, n=2, ids=("b",))], [record(tmp_path, "a", "a", "stranger", "b")])
    assert (found.made, found.repeated, found.crossed) == (4, 1, ["b"])
    assert found.answering["a"] == 1.0


@pytest.mark.parametrize(
    ("ends", "repeated"),
    [
        (["completed"], 0),
        (["aborted"], 0),
        (["completed", "completed"], 1),
        (["aborted", "completed"], 1),
        (["aborted", "aborted", "completed"], 2),
        (["completed", "aborted"], 1),
        (["failed", "failed", "completed"], 0),
        (["completed", "failed", "completed"], 1),
    ],
)
def test_call_that_was_answered_or_broken_off_is_made_again(tmp_path: Path, ends: list[str], repeated: int) -> None:
    """Not one that its replica failed; a later end says nothing of an earlier call."""
    lines = [(f"a {status}", number) for number, status in enumerate(ends)]
    path = record(tmp_path, *(name for name, _ in reversed(lines)), at_s=[at_s for _, at_s in reversed(lines)])
    assert calls.check([told(GOOD)], [path]).repeated == repeated


def test_call_broken_off_at_a_replica_that_was_harmed_is_made_again_for_that(tmp_path: Path) -> None:
    """It may have hung, or its connection may have been cut. One that was answered needs another excuse."""
    path = record(tmp_path, "a aborted", "a", "a")
    assert calls.check([told(GOOD)], [path], harmed={"replica-2"}).repeated == 2
    assert calls.check([told(GOOD)], [path], harmed={"replica-1"}).repeated == 1


def test_second_job_for_a_request_is_seen_by_the_replicas(tmp_path: Path) -> None:
    """Also when its client was told of one id only, or of none; and a call for a request that was refused."""
    path = record(tmp_path, "a aborted", "b aborted")
    refused = Told(1, "ask", "heron", 0.0, refusals=["overloaded"])
    assert calls.check([told(GOOD)], [path]).doubled == [1]
    assert calls.check([refused], [path]).unbidden == [1]
    refused.is_unknown = True  # sent again, and then nothing was heard
    assert calls.check([refused], [path]).unbidden == []


# --- what a cell makes of it ----------------------------------------------------------------------


Event = dict[str, Any]
SUBMITTED: Event = {"event": "submitted", "n": 1, "kind": "ask", "subject": "heron"}
ACCEPTED: Event = {"event": "accepted", "n": 1, "id": "a"}
UNKNOWN: Event = {"event": "unknown", "n": 1, "code": "TimeoutError"}
KILL: Event = {"event": "fault", "fault": "kill", "victim": "llm-1.1", "held": 1}
FLUSH: Event = {"event": "fault", "fault": "flushall", "victim": "redis", "held": 1}
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
    (tmp_path / "run-1").mkdir()
    record(tmp_path / "run-1", *["a"] * answered)
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


LOST = ends({"status": "lost", "code": "job_lost"})


def test_what_a_scenario_destroys_is_counted_apart(tmp_path: Path) -> None:
    verdict = judge(tmp_path, ACCEPTED, FLUSH, LOST, may_lose={1})
    assert (verdict.broken, verdict.lost, verdict.destroyed) == ([], 0, 1)


def test_second_job_after_its_record_was_destroyed_is_told(tmp_path: Path) -> None:
    again = [ACCEPTED | {"id": "b"}, *[ends(GOOD) | {"id": "b"}] * 2]
    verdict = judge(tmp_path, ACCEPTED, FLUSH, *again, may_lose={1})
    assert (verdict.broken, verdict.duplicated, verdict.redone) == ([], 0, 1)


@pytest.mark.parametrize(
    ("claim", "events"),
    [
        ("lost: 1", [ACCEPTED, LOST]),
        ("lost: 1", [ACCEPTED, KILL, LOST]),
        ("unseen: 1", [FLUSH, {"event": "gave_up", "n": 1, "is_quiet": True}]),
        ("duplicated: 1", [ACCEPTED, ends(GOOD), ends(GOOD | {"finished_us": 6})]),
        ("ended otherwise than well: {'failed/poison': 1}", [ACCEPTED, FLUSH, ends(FAILED | {"code": "poison"})]),
    ],
)
def test_destroyed_record_excuses_nothing_else(tmp_path: Path, claim: str, events: list[Event]) -> None:
    """Nor anything where nobody harmed Redis while the request was under way."""
    assert judge(tmp_path, *events, may_lose={1}).broken[0].startswith(claim)


def test_fault_after_the_last_that_was_heard_has_destroyed_nothing(tmp_path: Path) -> None:
    """A fault may be written down a moment late, though."""
    for after_s, is_green in ((NOTED_WITHIN_S / 2, True), (NOTED_WITHIN_S * 2, False)):
        folder = tmp_path / str(is_green)
        folder.mkdir()
        cell = Cell(1, "by hand", 1, 1, folder)
        cell.may_lose = {1}
        (folder / "clients.jsonl").write_bytes(
            b"".join(
                orjson.dumps({"at_s": 10.0, **event}, option=orjson.OPT_APPEND_NEWLINE)
                for event in (SUBMITTED, ACCEPTED, LOST)
            )
        )
        late = {"at_s": 10.0 + after_s, **FLUSH}
        (folder / "faults.jsonl").write_bytes(orjson.dumps(late, option=orjson.OPT_APPEND_NEWLINE))
        assert cell.judge().is_green == is_green


@pytest.mark.parametrize(
    ("answered", "faults", "is_green"),
    [
        (2, [], False),
        (2, [KILL], False),
        (2, [KILL | {"repeats": 1}], True),
        (3, [KILL | {"repeats": 1}], False),
        (3, [KILL | {"repeats": 1}] * 2, True),
        (2, [DRAIN], False),
    ],
)
def test_call_is_made_again_only_where_a_fault_accounts_for_it(
    tmp_path: Path, answered: int, faults: list[Event], *, is_green: bool
) -> None:
    """Work in hand alone accounts for nothing: an encoder's is no call."""
    verdict = judge(tmp_path, ACCEPTED, ends(GOOD), ends(GOOD), *faults, answered=answered)
    assert (verdict.is_green, verdict.calls_repeated) == (is_green, answered - 1)
    assert verdict.calls_excused == sum(fault.get("repeats", 0) for fault in faults)


def test_harmed_replica_is_known_by_the_faults(tmp_path: Path) -> None:
    """One that was ill may have let a call wait for too long."""
    ill: Event = {"event": "fault", "fault": "sick replica", "victim": "replica-1", "held": None}
    cell = Cell(1, "by hand", 1, 1, tmp_path)
    (tmp_path / "run-1").mkdir()
    record(tmp_path / "run-1", "a aborted", "a")
    assert cell.calls().repeated == 1
    with Writer(cell.faults) as faults:
        faults.write(**ill)
    assert cell.calls().repeated == 0


@pytest.mark.parametrize(("share", "is_green"), [(0.0, True), (0.5, True), (0.51, False)])
def test_scenario_says_how_many_must_be_accepted(tmp_path: Path, share: float, *, is_green: bool) -> None:
    refused = [{"event": "submitted", "n": 2, "kind": "ask", "subject": "heron"}, {"event": "refused", "n": 2}]
    events = [ACCEPTED, ends(GOOD), ends(GOOD), refused[0], refused[1] | {"code": "stopping"}]
    verdict = judge(tmp_path, *events, least_accepted=share)
    assert verdict.broken == ([] if is_green else ["at least 2 of 2 requests are accepted, not 1"])


def test_cell_in_which_nobody_was_accepted_is_red(tmp_path: Path) -> None:
    [broken] = judge(tmp_path, UNKNOWN, DRAIN).broken
    assert broken == "at least 1 of 1 requests are accepted, not 0"


def test_cell_without_requests_is_judged_by_its_scenario_alone(tmp_path: Path) -> None:
    assert Cell(15, "by hand", 1, 1, tmp_path).judge().broken == []


@pytest.mark.parametrize(
    ("recoveries_s", "broken"),
    [
        ([4.0, 5.0], []),
        ([4.0, 5.5], ["recovered within 5 s, not 5.50"]),
        ([], ["recovered within 5 s: no recovery was measured"]),
    ],
)
def test_recovery_must_be_measured_and_short(tmp_path: Path, recoveries_s: list[float], broken: list[str]) -> None:
    cell = Cell(1, "by hand", 1, 1, tmp_path)
    cell.recoveries_s += recoveries_s
    cell.require_recovery(5.0)
    assert cell.verdict.broken == broken


@pytest.mark.parametrize(
    ("pages", "is_green"),
    [([7, 0, 0, 0, 0], True), ([0, 0, 0, 0], True), ([0, 0, 0, 0, 0], False)],
)
def test_order_that_nobody_could_have_seen_broken_is_no_proof(
    tmp_path: Path, pages: list[int], *, is_green: bool
) -> None:
    """A consult says something when a version was done before it was sent."""
    events: list[Event] = []
    for n, page in enumerate(pages, start=2):
        answer = GOOD | {"answer": "The ledger stands at page 7. [1]"}
        events += [
            {"event": "submitted", "n": n, "kind": "consult", "subject": str(page)},
            {"event": "accepted", "n": n, "id": f"{n}"},
            *[{"event": "outcome", "n": n, "id": f"{n}", "outcome": answer}] * 2,
        ]
    verdict = judge(tmp_path, ACCEPTED, ends(GOOD), ends(GOOD), *events)
    assert (verdict.is_green, verdict.figures["consulted"]) == (is_green, sum(page > 0 for page in pages))


def test_order_is_not_told_of_where_nobody_asks(tmp_path: Path) -> None:
    assert "consulted" not in judge(tmp_path, ACCEPTED, ends(GOOD), ends(GOOD)).figures


def test_kills_are_those_of_any_process(tmp_path: Path) -> None:
    names = ["kill", "redis killed", "replica killed", "zombie", "redis stalled", "drain"]
    assert judge(tmp_path, *({**KILL, "fault": name} for name in names)).kills == 3


async def test_process_that_ends_by_itself_makes_a_cell_red(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redis.asyncio import Redis

    async def nothing(*_: object) -> float:
        return 0.0

    cell = Cell(1, "by hand", 1, 1, tmp_path)
    async with Redis.from_url(redis_server.url) as redis:
        await redis.flushall()
        cluster = SimpleNamespace(redis=redis, fallen=lambda: ["encoder-2.1"], metric=nothing)
        monkeypatch.setattr(cell, "cluster", cluster, raising=False)
        monkeypatch.setattr(cell, "nemesis", SimpleNamespace(until_recovered=nothing), raising=False)
        monkeypatch.setattr(cell, "load", SimpleNamespace(quiet=nothing, open=frozenset()), raising=False)
        await cell._calm()
    assert cell.verdict.broken == ["no process ends by itself, but encoder-2.1"]


def test_memory_is_compared_within_one_life_only(tmp_path: Path) -> None:
    mib = 2**20
    cell = Cell(1, "by hand", 1, 1, tmp_path)
    before = {("redis", 0): 5 * mib, ("llm-1", 1): 50 * mib, ("llm-2", 1): 50 * mib}
    cell._note_growth(before, {("redis", 0): 7 * mib, ("llm-1", 1): 49 * mib, ("llm-2", 2): 90 * mib})
    assert cell.verdict.grown_mib == {"redis": 2.0, "llm-1": -1.0}
    cell._note_growth(before, {("redis", 0): 6 * mib, ("llm-1", 1): 53 * mib})
    assert cell.verdict.grown_mib == {"redis": 2.0, "llm-1": 3.0}
    assert report.grown(cell.verdict.grown_mib) == "redis +2.0, llm-1 +3.0 MiB"
    assert report.grown({}) == "-"


def test_refused_request_must_not_be_called_for(tmp_path: Path) -> None:
    refused = {"event": "refused", "n": 1, "code": "stopping"}
    assert judge(tmp_path, refused, answered=1).broken[0].startswith("refused, and called for: 1")


SECOND = [event | {"n": 2, "id": "b"} for event in (SUBMITTED, ACCEPTED, ends(GOOD), ends(GOOD))]


def test_unknown_is_what_faults_of_gateways_and_redis_excuse(tmp_path: Path) -> None:
    verdict = judge(tmp_path, UNKNOWN, DRAIN, *SECOND)
    assert (verdict.is_green, verdict.unknown) == (True, 1)


def test_scenario_says_how_many_may_be_unknown(tmp_path: Path) -> None:
    assert not judge(tmp_path, UNKNOWN, DRAIN, *SECOND, may_be_unknown=0).is_green


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


async def test_leftovers_of_deliveries_are_found(redis_server: RedisServer, link: Link) -> None:
    """Entries of their queues, a delayed one, a record that was to end; one that has ended stays a while."""
    from redis.asyncio import Redis

    queues = [keys.stream(stage) for stage in (*keys.DELIVERY_STAGES, keys.INCOMING_STAGE)]
    for queue in queues:
        await link.call("XADD", queue, "*", "data", "{}")
    await link.call("ZADD", keys.DELAYED, 1, "a")
    for delivery_id in ("a", "b"):
        await link.call("HSET", keys.DELIVERY + delivery_id, "status", "sending")
    await link.call("PEXPIRE", keys.DELIVERY + "b", 60_000)
    async with Redis.from_url(redis_server.url) as redis:
        found = await leftovers.check(redis)
    assert sorted(found.work) == sorted([*queues, keys.DELAYED])
    assert found.endless == [keys.DELIVERY + "a"]
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
    text = (sabotage.ROOT / one.file).read_text()
    assert one.became in sabotage.broken(one, text)


@pytest.mark.parametrize(
    "words",
    [
        ["--jobs", "0"],
        ["--seed", "-1"],
        ["--slice", "--scenario", "2"],
        ["--write"],
        ["--json", "/nowhere/verdicts.jsonl"],
        ["--durability", "--scenario", "3"],
        ["--durability", "--until-red"],
        ["--durability", "--any-machine"],
    ],
)
def test_command_line_that_makes_no_sense_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything has run."""

    def run(*_: object, **__: object) -> None:
        raise AssertionError("something has run")

    monkeypatch.setattr(program, "run_cell", run)
    monkeypatch.setattr(durability, "measure_all", run)
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


@pytest.mark.parametrize(("seconds", "warns"), [(program.SLICE_WITHIN_S, False), (program.SLICE_WITHIN_S + 1, True)])
def test_slice_that_takes_too_long_is_told_and_green(
    seconds: float, capsys: pytest.CaptureFixture[str], *, warns: bool
) -> None:
    assert program.tell_of_the_slice([Verdict(1, "one", 1, accepted=5_000, kills=15)], seconds)
    assert ("WARNING" in capsys.readouterr().out) == warns


def test_sabotage_says_at_once_where_it_cannot_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sabotage", "--json", "/nowhere/verdicts.jsonl"])
    monkeypatch.setattr(sabotage, "run", lambda tree, number: pytest.fail("something has run"))
    with pytest.raises(SystemExit) as exit_:
        sabotage.main()
    assert exit_.value.code == 2
    assert "/nowhere/verdicts.jsonl: No such file" in capsys.readouterr().err


def test_interrupted_matrix_tells_of_the_cells_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in the file."""

    def run_one(scenario: Any, seed: int, jobs: int, *, keep: bool, any_machine: bool) -> Verdict:
        if scenario.number == 9:
            raise KeyboardInterrupt
        return Verdict(scenario.number, "one", seed, asked=jobs, accepted=7, destroyed=3, server="Redis 7.0.15")

    monkeypatch.setattr(program, "run_cell", run_one)
    verdicts = tmp_path / "verdicts.jsonl"
    words = ["--scenario", "12", "--scenario", "9", "--seed", "1", "--json", str(verdicts)]
    assert program.main(words) == 130
    assert "before that: 1 cells on Redis 7.0.15, accepted 7" in (out := capsys.readouterr().out)
    assert "lost 0, destroyed 3" in out
    [line] = read(verdicts)
    assert (line["number"], line["asked"]) == (12, SCENARIOS[12].jobs)


def test_verdict_is_told_in_short_lines() -> None:
    verdict = Verdict(1, "one", 1, figures={f"figure {number}": "some words" for number in range(20)})
    assert all(len(line) <= program.WIDTH for line in program.line(verdict).splitlines())


async def test_scenario_that_fails_is_told_with_its_traceback(tmp_path: Path) -> None:
    async def fails(cell: Cell) -> None:
        raise RuntimeError("it fell over\nand more")

    verdict = await run_cell(1, "by hand", fails, 1, 7, tmp_path)
    assert verdict.asked == 7
    assert verdict.broken == ["the scenario itself failed: RuntimeError: it fell over"]
    assert "in fails" in (tmp_path / "scenario.txt").read_text()


async def test_scenario_that_hangs_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(cell: Cell) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("tests.faults.cell.LIMIT_S", 0.05)
    verdict = await run_cell(1, "by hand", hangs, 1, 1, tmp_path)
    assert verdict.broken == ["the scenario itself failed: it took more than 0.25 s"]


@pytest.mark.parametrize("any_machine", [False, True])
def test_span_that_was_too_long_is_a_doubt_where_nobody_vouches_for_the_machine(
    tmp_path: Path, *, any_machine: bool
) -> None:
    """What was lost, or done twice, is red anywhere."""
    cell = Cell(1, "by hand", 1, 1, tmp_path, any_machine=any_machine)
    cell.recoveries_s.append(5.5)
    cell.require_recovery(5.0)
    told = ["recovered within 5 s, not 5.50"]
    assert (cell.verdict.doubts, cell.verdict.broken) == ((told, []) if any_machine else ([], told))
    assert cell.verdict.is_green == any_machine
    cell.require("nothing is lost", False)
    assert not cell.verdict.is_green


PAGE = "".join(f"<!-- {name}: begin -->\nbefore\n<!-- {name}: end -->\n" for name in ("matrix", "long run", "breaks"))
CELLS = [Verdict(number, "one", 4, asked=number).as_json() for number in (*report.MATRIX, report.LONG)]
BY = {"number": 1, "broken": ["lost: 1"]}
CAUGHT = [
    {"break": one.name, "was": one.was, "became": one.became, "file": one.file, "caught_by": BY}
    for one in sabotage.BREAKS
]


@pytest.mark.parametrize(
    ("lines", "code", "told"),
    [
        ([*CELLS, *CAUGHT], 0, "red: none; missing: none; not caught: none; not tried: none"),
        ([*CELLS[:-2], CELLS[-1], *CAUGHT], 1, "missing: 25;"),
        ([*CELLS[:-1], *CAUGHT], 1, "missing: 21;"),
        ([*CELLS, CELLS[0] | {"green": False}, *CAUGHT], 1, "red: 1;"),
        ([*CELLS, *CAUGHT, CAUGHT[0] | {"caught_by": None}], 1, "not caught: owner check;"),
        ([*CELLS, *CAUGHT[1:]], 1, "not tried: owner check"),
        ([], 2, "holds no verdicts"),
    ],
)
def test_report_is_well_only_when_all_of_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: list[Event],
    code: int,
    told: str,
) -> None:
    """Every cell, the long run, every break. What there is nothing for is left as it stood on the page."""
    verdicts, page = tmp_path / "docs.jsonl", tmp_path / "page.md"
    verdicts.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
    page.write_text(PAGE)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "VERDICTS", verdicts)
    monkeypatch.setattr(report, "PAGE", page)
    assert report.main() == code
    assert told in capsys.readouterr().out
    assert ("before" in page.read_text()) == (code == 2 or "missing: 21" in told)


def test_row_of_the_matrix_holds_what_the_verdict_does() -> None:
    """And the words that run the cell again."""
    verdict = Verdict(6, "one", 7, asked=1_200, accepted=500, destroyed=41, out_of_order=2, load_left=3, endless_keys=4)
    found = dict(zip(report.COLUMNS, report.row(verdict.as_json()), strict=True))
    assert found["`just faults` with"] == "`--scenario 6 --seed 7 --jobs 1200`"
    names = ("Accepted", "Lost", "Destroyed", "Out of order", "Loads left", "Keys without TTL")
    assert [found[name] for name in names] == ["500", "0", "41", "2", "3", "4"]
    assert "41 destroyed" in report.caption([verdict.as_json()])


def test_consults_that_were_told_of_a_page_are_counted() -> None:
    some = [{"answer": "The ledger stands at page 7. [1]"}]
    requests = [Told(1, "consult", "7", 0.0, outcomes=some), Told(2, "consult", "0", 0.0, outcomes=[{"answer": "?"}])]
    assert order.told_of_a_page(requests) == 1


def test_page_is_written_between_its_comments_only() -> None:
    page = "before\n<!-- matrix: begin -->\nold\n<!-- matrix: end -->\nafter\n"
    assert report.put(page, "matrix", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="once, not 0"):
        report.put(page, "breaks", "new")

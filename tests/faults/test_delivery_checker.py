"""The checker of deliveries finds what it is for: each promise is broken once, in files made by hand."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from tests.deliveries.ledger import UNREAD, Entry
from tests.faults.cell import Cell
from tests.faults.cluster import Cluster
from tests.faults.deliveries import BAD_EVERY, Senders, callbacks, ledgers, message, piece_together
from tests.faults.history import Writer
from tests.faults.report import deliveries as told_of
from tests.faults.verdict import Verdict

Json = dict[str, Any]
Files = dict[str, list[Json]]

PASSED: Final = {
    "delivered": [["pending", 1], ["sending", 2], ["sent", 3], ["delivered", 4]],
    "sent": [["pending", 1], ["sending", 2], ["sent", 3]],
    "unknown": [["pending", 1], ["sending", 2], ["unknown", 3]],
    "failed": [["pending", 1], ["sending", 2], ["failed", 3]],
}
STATUSES: Final = ["delivered", "sent", "unknown", "failed"]
"""How the four messages stand: the second is an email, the third was dropped, the fourth refused for good."""
SENT = [message(1), message(2), message(3), message(BAD_EVERY)]
GIVEN = [{"sender": one["from"], "to": one["to"], "body": one["body"]} for one in SENT]


def about(number: int, status: str, **more: Any) -> list[Json]:
    """What is said of one message in the end."""
    seen = {"n": number, "status": status, "history": PASSED[status]}
    return [{"event": "seen", "code": None, "attempts": 1} | seen | more, {"event": "recorded"} | seen]


def entry(number: int, *, taken: bool, answered: int) -> Json:
    return asdict(Entry(f"d{number}", **GIVEN[number - 1], taken=taken, answered=answered))


def callback(number: int, status: str, answered: int = 200) -> Json:
    url = f"https://penstock.example/api/v1/webhooks/twilio?delivery=d{number}"
    return {"url": url, "sid": f"SM{number}", "status": status, "answered": answered}


GOOD: Files = {
    "deliveries": [
        *(
            {"event": "sent", "n": number, "type": sent["type"], "is_bad": number == 4} | given
            for number, (sent, given) in enumerate(zip(SENT, GIVEN, strict=True), 1)
        ),
        *({"event": "accepted", "n": number, "id": f"d{number}"} for number in range(1, 5)),
        *(line for number, status in enumerate(STATUSES, 1) for line in about(number, status)),
    ],
    "twilio": [
        entry(1, taken=False, answered=503),
        entry(1, taken=True, answered=201),
        entry(3, taken=False, answered=0),
        entry(4, taken=False, answered=400),
    ],
    "smtp": [entry(2, taken=True, answered=250)],
    "callbacks": [callback(1, "delivered"), callback(1, "sent"), callback(1, "queued")],
    "faults": [],
}
SEEN, RECORDED = 8, 9
"""Where the lines begin that say what became of the messages, two of each."""
KILL = {"event": "fault", "fault": "kill", "victim": "delivery-1.1", "held": 1, "begun": ["d2"]}


def good() -> Files:
    """The files in which all is well, to be spoilt: no two of their lines share a part."""
    files: Files = orjson.loads(orjson.dumps(GOOD))
    return files


def judge(folder: Path, files: Files) -> Verdict:
    """What a cell makes of these files."""
    cell = Cell(25, "by hand", 1, 1, folder)
    with Writer(cell.deliveries) as deliveries, Writer(cell.faults) as faults:
        for line in files["deliveries"]:
            deliveries.write(**line)
        for line in files["faults"]:
            faults.write(**line)
    for name in ("twilio", "smtp"):
        (folder / f"receiver-{name}.jsonl").write_bytes(_lines(files[name]))
    callbacks(folder).write_bytes(_lines(files["callbacks"]))
    assert len(ledgers(folder)) == 2
    return cell.judge()


def _lines(rows: list[Json]) -> bytes:
    return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def test_messages_of_which_all_say_the_same_are_green(tmp_path: Path) -> None:
    verdict = judge(tmp_path, GOOD)
    assert verdict.broken == []
    assert (verdict.accepted, verdict.lost, verdict.duplicated, verdict.wrong) == (4, 0, 0, 0)
    told = told_of(verdict.as_json())
    assert "4 messages, 1 delivered, 1 failed, 1 sent, 1 unknown, 2 taken by their receivers" in told
    assert "1 ever unknown, 1 of these without an answer that was heard" in told
    assert "answers: 1 of 0, 1 of 201, 1 of 250, 1 of 400, 1 of 503" in told


def stands(number: int, status: str, **more: Any) -> Callable[[Files], object]:
    """Let a message end so, and everybody say it."""

    def harm(files: Files) -> None:
        first = SEEN + 2 * (number - 1)
        files["deliveries"][first : first + 2] = about(number, status, **more)

    return harm


def drop(name: str, index: int) -> Callable[[Files], object]:
    return lambda files: files[name].pop(index)


def change(name: str, index: int, **values: Any) -> Callable[[Files], object]:
    return lambda files: files[name][index].update(values)


def add(name: str, line: Json, **values: Any) -> Callable[[Files], object]:
    return lambda files: files[name].append(line | values)


def both(*harms: Callable[[Files], object]) -> Callable[[Files], object]:
    return lambda files: [harm(files) for harm in harms]


def look(number: int, **values: Any) -> Callable[[Files], object]:
    """Let the gateway say something else of a message."""
    return change("deliveries", SEEN + 2 * (number - 1), **values)


def row(number: int, **values: Any) -> Callable[[Files], object]:
    """Let the database say something else of a message."""
    return change("deliveries", RECORDED + 2 * (number - 1), **values)


BROKEN: list[tuple[str, Callable[[Files], object]]] = [
    ("refused: 1", add("deliveries", GOOD["deliveries"][0], n=5)),
    ("accepted twice: 1", add("deliveries", {"event": "accepted", "n": 1, "id": "d9"})),
    ("lost: 1", look(1, status=None, history=[])),
    ("lost: 1", look(1, status="sending", history=PASSED["sent"][:2])),
    ("lost: 1", drop("deliveries", SEEN)),
    ("sent twice: 1", add("twilio", entry(1, taken=True, answered=201))),
    ("sent twice: 1", add("smtp", entry(2, taken=True, answered=0))),
    (
        "sent twice: 1",
        both(change("twilio", 2, taken=True), add("twilio", entry(3, taken=True, answered=201)), stands(3, "sent")),
    ),
    ("untrue: 1", drop("smtp", 0)),
    ("untrue: 1", change("smtp", 0, taken=False)),
    ("untrue: 1", stands(2, "failed", attempts=4)),
    ("unfounded: 1", both(drop("smtp", 0), stands(2, "failed"))),
    ("forgiven: 1", both(change("twilio", 3, taken=True, answered=201), stands(4, "sent"))),
    ("doubtful: 1", stands(2, "unknown")),
    ("doubtful: 1", both(drop("smtp", 0), stands(2, "unknown"))),
    ("doubtful: 1", both(stands(2, "unknown"), add("faults", KILL, begun=["d1"]))),
    ("doubtful: 2", both(stands(2, "unknown"), drop("twilio", 2), add("smtp", asdict(UNREAD)))),
    ("changed: 1", change("smtp", 0, body="Message 3.")),
    ("changed: 1", change("twilio", 0, to="+15005550006")),
    ("strange: 1", add("twilio", entry(1, taken=False, answered=503), delivery="d9")),
    ("sunk: 1", both(*(say(1, history=[*PASSED["delivered"], ["delivered", 5]]) for say in (look, row)))),
    ("sunk: 1", both(*(say(1, history=[*PASSED["sent"], ["sending", 4], ["delivered", 5]]) for say in (look, row)))),
    ("sunk: 1", both(*(say(1, history=PASSED["sent"]) for say in (look, row)))),
    ("deaf: 1", stands(1, "sent")),
    ("deaf: 1", both(add("callbacks", callback(1, "undelivered")), drop("callbacks", 0))),
    ("unlike history: 1", row(1, status="sent")),
    ("unlike history: 1", row(1, history=PASSED["sent"])),
    ("unlike history: 1", row(2, status=None, history=[])),
    ("unlike history: 1", drop("deliveries", RECORDED)),
    ("crashed: 1", add("deliveries", {"event": "client_crashed", "n": 1, "code": "KeyError: 'error'"})),
    ("some messages are accepted", lambda files: files.update(deliveries=[], twilio=[], smtp=[])),
]


@pytest.mark.parametrize(("claim", "harm"), BROKEN)
def test_broken_promise_makes_a_cell_red(tmp_path: Path, claim: str, harm: Callable[[Files], object]) -> None:
    files = good()
    harm(files)
    broken = judge(tmp_path, files).broken
    assert any(claim in one for one in broken), broken


FORGIVEN: list[Callable[[Files], object]] = [
    both(change("smtp", 0, answered=0), stands(2, "unknown")),
    both(stands(2, "unknown"), add("faults", KILL)),
    both(drop("smtp", 0), stands(2, "unknown"), add("smtp", asdict(UNREAD))),
    both(drop("smtp", 0), stands(2, "failed", attempts=4)),
    both(change("smtp", 0, taken=False, answered=550), stands(2, "failed")),
    both(add("callbacks", callback(2, "undelivered", 503))),
]
"""What is no fault of ours: an answer that was not heard, a harmed worker, a dropped connection; a receiver that is
tired of a message, or refuses it; a callback that did not arrive."""


@pytest.mark.parametrize("harm", FORGIVEN)
def test_what_the_record_accounts_for_is_green(tmp_path: Path, harm: Callable[[Files], object]) -> None:
    files = good()
    harm(files)
    assert judge(tmp_path, files).broken == []


def test_messages_are_pieced_together_from_their_file(tmp_path: Path) -> None:
    """And read from a database."""
    path, database = tmp_path / "deliveries.jsonl", tmp_path / "history.db"
    with Writer(path) as writer:
        for line in GOOD["deliveries"][:SEEN]:
            writer.write(**line)
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE deliveries (delivery_id, status, history)")
        told = orjson.dumps(PASSED["sent"]).decode()
        connection.execute("INSERT INTO deliveries VALUES ('d2', 'sent', ?)", (told,))
    connection.close()
    senders = Senders(Cluster.__new__(Cluster), path)
    senders.read_history(database)
    senders.close()
    found = piece_together(path)
    assert [one.ids for one in found] == [["d1"], ["d2"], ["d3"], ["d4"]]
    recorded = [(one.recorded["status"], one.recorded["history"]) for one in found if one.recorded]
    assert recorded == [(None, []), ("sent", PASSED["sent"]), (None, []), (None, [])]


def test_every_type_takes_its_turn_and_some_are_refused() -> None:
    sent = [message(number) for number in range(1, 4 * BAD_EVERY)]
    assert [one["type"] for one in sent[:3]] == ["mms", "email", "sms"]
    bad = [one for number, one in enumerate(sent, 1) if number % BAD_EVERY == 0]
    assert {one["to"] for one in bad} == {"+15005550009", "nobody@refused.example"}
    assert len({one["to"] for one in sent}) == len(sent) - len(bad) + 2

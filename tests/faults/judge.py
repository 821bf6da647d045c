"""Judges one cell: what clients, replicas and the nemesis wrote into their files, by what the scenario grants.

Nothing here touches a process. What a scenario demands beyond the promises that every cell checks, it says with
`Case.require`; what it takes back of these promises stands in the `may_...` of its case, and is reported.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tests.deliveries import ledger
from tests.faults.batches import piece_together as piece_batches_together
from tests.faults.chats import piece_together as piece_chats_together
from tests.faults.checkers import accounts, batches, calls, chats, deliveries, fencing, order, outcomes
from tests.faults.checkers.calls import Calls
from tests.faults.checkers.outcomes import Outcomes
from tests.faults.deliveries import callbacks, ledgers
from tests.faults.deliveries import piece_together as piece_deliveries_together
from tests.faults.history import Json, Told, piece_together, read
from tests.faults.verdict import Verdict

HIT_SHARE: Final = 0.8
"""A cell counts only where so many of its faults met a process with work in hand."""
REFUSALS: Final = frozenset({"ClientConnectorError", "stopping"})
"""What clients of a gateway that restarts may hear: nobody listens, or it is about to end."""
NOTED_WITHIN_S: Final = 1.0
"""A fault is written down a moment after it was done; what clients hear in between is its consequence already."""
ENOUGH_TO_CONSULT: Final = 5
"""Where so many clients ask what a document says, some of them must have been told."""


class Case:
    """The files of one cell, and what they are judged by.

    Attributes:
        clients, faults: the files of the history.
        batches, news: those of clients that send batches, and of receivers of webhooks, where a scenario has them.
        chats: that of people in chats, likewise.
        deliveries: that of clients who send sms and emails, likewise; what these servers had stands beside it.
        recoveries_s: see `Nemesis`.
        may_lose: requests whose records a scenario has destroyed: those of them that are lost, or done twice, for a
            fault of Redis in their time are counted apart, and no second look at their outcomes is demanded. What else
            becomes of them is judged like that of all others.
        may_end: how requests may end, other than completed: `failed/poison`, or a bare status for all its codes.
        may_refuse: codes with which clients may be refused.
        may_be_unknown: how many requests may be unknown to their clients. None: any number when a fault hit Redis or a
            gateway, otherwise none.
        least_accepted: the share of all requests that must be accepted; one of them in any case.
        any_machine: nobody vouches for how fast this machine is: what `expect` demands is told, and breaks nothing.
    """

    any_machine = False

    def __init__(self, verdict: Verdict, folder: Path) -> None:
        self.verdict = verdict
        self.folder = folder
        self.clients = folder / "clients.jsonl"
        self.faults = folder / "faults.jsonl"
        self.batches = folder / "batches.jsonl"
        self.news = folder / "news.jsonl"
        self.chats = folder / "chats.jsonl"
        self.deliveries = folder / "deliveries.jsonl"
        self.recoveries_s: list[float] = []
        self.may_lose: set[int] = set()
        self.may_end: set[str] = set()
        self.may_refuse: set[str] = set(REFUSALS)
        self.may_be_unknown: int | None = None
        self.least_accepted = 0.0
        self._alive: frozenset[str] = frozenset()  # jobs without an outcome that Redis still knew of at the end

    def require(self, claim: str, held: bool) -> None:
        """Note a promise of this scenario that does not hold."""
        if not held:
            self.verdict.broken.append(claim)

    def expect(self, claim: str, held: bool) -> None:
        """Note what does not hold and may be the machine's fault: a span."""
        if not held:
            (self.verdict.doubts if self.any_machine else self.verdict.broken).append(claim)

    def require_recovery(self, within_s: float) -> None:
        """Demand that the work of killed workers was in other hands in time, and that there was some."""
        if not self.recoveries_s:
            self.require(f"recovered within {within_s:g} s: no recovery was measured", False)
            return
        slowest_s = max(self.recoveries_s)
        self.expect(f"recovered within {within_s:g} s, not {slowest_s:.2f}", slowest_s <= within_s)

    # --- what the files say -----------------------------------------------------------------------

    def requests(self) -> list[Told]:
        """Return what the clients know so far."""
        return piece_together(self.clients)

    def statuses(self) -> Counter[str]:
        """Return how many requests ended how, as the clients first heard it."""
        return Counter(told.outcomes[0]["status"] for told in self.requests() if told.outcomes)

    def calls(self) -> Calls:
        """Return what the replicas have written down so far."""
        victims = {str(fault["victim"]).partition(".")[0] for fault in self.faults_done()}
        return calls.check(self.requests(), sorted(self.folder.glob("run-*/replica-*.jsonl")), harmed=victims)

    def faults_done(self) -> list[Json]:
        """Return the faults so far."""
        return [line for line in read(self.faults) if "held" in line]

    # --- the verdict ------------------------------------------------------------------------------

    def judge(self) -> Verdict:
        """Read the files and give the verdict."""
        requests, called, faults = self.requests(), self.calls(), self.faults_done()
        found = outcomes.check(requests, self._alive)
        self._judge_outcomes(requests, found, called, faults)
        self._judge_endings(found)
        self._judge_order(requests)
        self._judge_accounts(requests, called, faults)
        self._judge_calls(called, faults)
        self._judge_faults(faults)
        if self.batches.exists():
            self._judge_batches(faults)
        if self.chats.exists():
            self._judge_chats()
        if self.deliveries.exists():
            self._judge_deliveries(faults)
        return self.verdict

    def _judge_outcomes(self, requests: Sequence[Told], found: Outcomes, called: Calls, faults: Sequence[Json]) -> None:
        """Demand one outcome for everything accepted, the right one, by somebody who was entitled to it."""
        verdict = self.verdict
        duplicated = sorted({*found.duplicated, *called.doubled})
        excused = {told.n for told in requests if told.n in self.may_lose and _lived_through_one(told, faults)}
        verdict.jobs, verdict.by_status = len(requests), dict(found.by_status)
        verdict.accepted, verdict.refused, verdict.unknown = found.accepted, found.refused, found.unknown
        verdict.destroyed = len(excused.intersection(found.lost))
        verdict.redone = len(excused.intersection(duplicated))
        broken: dict[str, list[Any]] = {
            "lost": [n for n in found.lost if n not in excused],
            "unseen": found.unseen,
            "duplicated": [n for n in duplicated if n not in excused],
            "wrong": [*found.wrong, *called.crossed],
            "stale": fencing.check(requests, faults, called.answering),
            "out_of_order": order.check(requests),
        }
        for name, numbers in broken.items():
            setattr(verdict, name, len(numbers))
            self.require(f"{name}: {len(numbers)}, among them requests {numbers[:5]}", not numbers)

    def _judge_endings(self, found: Outcomes) -> None:
        """Demand that what was accepted was completed, and that every outcome was read twice."""
        self.verdict.endings = {word: len(numbers) for word, numbers in found.endings.items()}
        ill = {
            word: count
            for word, count in self.verdict.endings.items()
            if not self.may_end & {word, word.partition("/")[0]}
        }
        self.require(f"ended otherwise than well: {ill}", not ill)
        once = [n for n in found.once if n not in self.may_lose]
        self.require(f"read only once: {len(once)}, among them requests {once[:5]}", not once)

    def _judge_order(self, requests: Sequence[Told]) -> None:
        """Demand that the order of versions was looked at, where there were enough of those who can."""
        consulted = sum(told.kind == "consult" for told in requests)
        if not consulted:
            return
        told_of = order.told_of_a_page(requests)
        self.verdict.figures["consulted"] = told_of
        claim = f"of {consulted} who asked what a document says, some were told of a version that was done before"
        self.require(claim, told_of > 0 or consulted < ENOUGH_TO_CONSULT)

    def _judge_accounts(self, requests: Sequence[Told], called: Calls, faults: Iterable[Json]) -> None:
        """Demand that every client was told something, and something that may be told; and that enough heard yes."""
        told = accounts.check(requests)
        self.verdict.refusals_by_code = dict(told.refusals)
        self.require(f"told nothing: {len(told.silent)}, among them requests {told.silent[:5]}", not told.silent)
        self.require(f"clients crashed: {len(told.crashed)}, among them {told.crashed[:3]}", not told.crashed)
        strange = {code: count for code, count in told.refusals.items() if code not in self.may_refuse}
        self.require(f"refused for no good reason: {strange}", not strange)
        unbidden = called.unbidden
        self.require(f"refused, and called for: {len(unbidden)}, among them requests {unbidden[:5]}", not unbidden)
        most, unknown = self.may_be_unknown, self.verdict.unknown
        if most is None and not any(_can_hide_an_answer(line) for line in faults):
            most = 0
        self.require(f"at most {most} requests are unknown, not {unknown}", most is None or unknown <= most)
        accepted, least = self.verdict.accepted, max(math.ceil(len(requests) * self.least_accepted), 1)
        claim = f"at least {least} of {len(requests)} requests are accepted, not {accepted}"
        self.require(claim, accepted >= least or not requests)

    def _judge_calls(self, called: Calls, faults: Iterable[Json]) -> None:
        """Demand that no more calls are made again than the faults account for: each says how many with `repeats`."""
        excused = sum(line.get("repeats", 0) for line in faults)
        self.verdict.calls_repeated, self.verdict.calls_excused = called.repeated, excused
        self.require(f"at most {excused} calls are made again, not {called.repeated}", called.repeated <= excused)

    def _judge_batches(self, faults: Iterable[Json]) -> None:
        """Demand of batches what `checkers.batches` looks for. Only what was deleted by hand may be lost."""
        verdict, news = self.verdict, list(read(self.news))
        sent = piece_batches_together(self.batches)
        found = batches.check(sent, news, sorted(self.folder.glob("run-*/replica-*.jsonl")))
        deleted = {str(line["message"]) for line in faults if "message" in line}
        lost = {message_id for message_id, word in found.ill.items() if word == "failed/lost"}
        ill = Counter(word for message_id, word in found.ill.items() if message_id not in deleted & lost)
        excused = sum(line["held"] or 0 for line in faults if str(line["victim"]).startswith("webhook-"))
        verdict.accepted += found.messages
        verdict.lost += len(lost - deleted) + len(found.unclosed)
        verdict.destroyed += len(lost & deleted)
        verdict.duplicated += len(found.doubled) + len(found.reopened) + len(found.late)
        verdict.wrong += len(found.wrong) + len(found.unlike_replicas)
        verdict.out_of_order += len(found.disordered)
        verdict.figures["batches"] = {
            "batches closed": found.accepted - len(found.unclosed), "messages": found.messages,
            "webhook calls": len(news), "of them repeated an acknowledged one": found.repeated,
            "such repetitions accounted for by kills": excused,
        }  # fmt: skip
        for name, those in found.broken().items():
            self.require(f"{name.replace('_', ' ')}: {len(those)} of the batches, among them {those[:5]}", not those)
        self.require(f"messages ended otherwise than well: {dict(ill)}", not ill)
        self.require(f"deleted by hand, and not lost: {sorted(deleted - lost)}", deleted <= lost)
        repeated = f"at most {excused} are told again of what they had acknowledged, not {found.repeated}"
        self.require(repeated, found.repeated <= excused)
        self.require("some batches are accepted", found.accepted > 0)
        mute = [one.n for one in sent if not one.batch_id]
        self.require(f"batches that were not accepted: {len(mute)}, among them {mute[:5]}", not mute)
        crashed = [f"{one.n}: {one.crashed}" for one in sent if one.crashed]
        self.require(f"senders of batches crashed: {crashed[:3]}", not crashed)

    def _judge_chats(self) -> None:
        """Demand of chats what `checkers.chats` looks for."""
        verdict = self.verdict
        records = (line for path in sorted(self.folder.glob("run-*/replica-*.jsonl")) for line in read(path))
        found = chats.check(piece_chats_together(self.chats), records)
        verdict.accepted += found.messages
        verdict.lost += len(found.lost)
        verdict.duplicated += len(found.doubled)
        verdict.wrong += len(found.wrong) + len(found.strange) + len(found.unlike_replicas)
        verdict.out_of_order += len(found.disordered)
        verdict.figures["chats"] = {"chats": found.chats, "messages": found.messages, "replies": found.replies}
        for name, those in found.broken().items():
            self.require(f"{name.replace('_', ' ')}: {len(those)} in chats, among them {those[:5]}", not those)
        self.require("some messages are accepted in chats", found.messages > 0)

    def _judge_deliveries(self, faults: Iterable[Json]) -> None:
        """Demand of messages to people what `checkers.deliveries` looks for."""
        verdict = self.verdict
        had = [entry for path in ledgers(self.folder) for entry in ledger.read(path)]
        begun = {delivery_id for line in faults for delivery_id in line.get("begun", ())}
        sent = piece_deliveries_together(self.deliveries)
        found = deliveries.check(sent, had, read(callbacks(self.folder)), begun)
        verdict.accepted += found.messages
        verdict.lost += len(found.lost)
        verdict.duplicated += len(found.sent_twice) + len(found.accepted_twice)
        verdict.wrong += len({*found.untrue, *found.unfounded, *found.forgiven, *found.doubtful, *found.changed})
        verdict.out_of_order += len(found.sunk)
        verdict.figures["deliveries"] = {
            "messages": found.messages, **dict(sorted(found.statuses.items())), "taken by their receivers": found.taken,
            "ever unknown": found.unknown, "of these without an answer that was heard": found.unanswered,
            "on their way when their worker was harmed": found.begun,
            "connections dropped unread": found.unread, "status callbacks": found.callbacks, "not heard": found.unheard,
        }  # fmt: skip
        verdict.figures["answers"] = {str(code): count for code, count in sorted(found.answers.items())}
        for name, those in found.broken().items():
            self.require(f"{name.replace('_', ' ')}: {len(those)} of the messages, among them {those[:5]}", not those)
        self.require("some messages are accepted", found.messages > 0)

    def _judge_faults(self, faults: Sequence[Json]) -> None:
        """Demand that the faults met work in hand; tell how long it took to recover."""
        verdict = self.verdict
        aimed = [line for line in faults if line["held"] is not None]
        verdict.faults, verdict.aimed, verdict.hits = len(faults), len(aimed), sum(line["held"] > 0 for line in aimed)
        verdict.kills = sum(_is_kill(line) for line in faults)
        enough = verdict.hit_share is None or verdict.hit_share >= HIT_SHARE
        self.require(f"{verdict.hits} of {verdict.aimed} faults met work in hand", enough)
        if self.recoveries_s:
            verdict.recovered_p50_s = round(statistics.median(self.recoveries_s), 3)
            verdict.recovered_max_s = round(max(self.recoveries_s), 3)


def _lived_through_one(told: Told, faults: Iterable[Json]) -> bool:
    """Say whether Redis was harmed between a request's submission and the last that was heard of it."""
    last_s = math.inf if told.heard_s is None or not told.outcomes else told.heard_s + NOTED_WITHIN_S
    return any(fault["victim"] == "redis" and told.submitted_s <= fault["at_s"] <= last_s for fault in faults)


def _can_hide_an_answer(fault: Json) -> bool:
    return str(fault["victim"]).startswith(("redis", "gateway"))


def _is_kill(fault: Json) -> bool:
    """Say whether a fault was a SIGKILL: `kill`, `redis killed`, `replica killed`."""
    return str(fault["fault"]).split()[-1] in {"kill", "killed"}

"""A real Prometheus beside a running `penstock up`: it finds every process, and knows whatever it is asked."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline import keys
from tests.conftest import wait_until
from tests.monitoring.files import DASHBOARDS, dashboard, queries
from tests.monitoring.watched import Prometheus
from tests.whole.system import END_S, Outside, System, outside

STAGES = (
    "encoder", "retriever", "llm", "aggregator", "webhook", "chat", "image", "report+requests",
    "sms+mms+email+incoming", "recorder",
)  # fmt: skip
KINDS = {("gateway", ""), *(("stage", stage) for stage in STAGES)}
LABELS = {
    "connection", "ended", "le", "outcome", "part", "priority", "provider", "reason", "record", "replica", "stage",
    "state", "status", "to",
    "generation", "implementation", "major", "minor", "patchlevel", "version",  # of Python itself
}  # fmt: skip


@pytest.fixture
def system() -> Iterator[System]:
    """A system of this test's own: its stages are killed and frozen."""
    with System() as running:
        yield running


async def test_prometheus_finds_every_process_and_all_rules_and_panels_have_data(
    system: System, prometheus: str, promtool: str
) -> None:
    """One `up` and one Prometheus for all of it, since these are what costs time."""
    with Prometheus(prometheus, system.url) as watch:
        async with outside(system) as whole:
            try:
                await _every_process_is_found_and_reached(whole, watch)
                await _some_of_everything_happens(whole)
                await _no_page_is_refused_by_promtool_or_has_labels_without_bound(whole, watch, promtool)
                await _every_panel_has_data(whole, watch)
                await _every_rule_has_data(whole, watch)
                await _a_killed_worker_is_found_again_and_told_of(whole, watch)
                await _a_stage_that_is_gone_fires_its_alert_and_no_other_page(whole, watch)
            except BaseException:
                print(watch.log.read_text()[-5_000:])
                print(system.log.read_text()[-5_000:])
                raise


async def _every_process_is_found_and_reached(whole: Outside, watch: Prometheus) -> None:
    async def are_up() -> bool:
        targets = await _targets(whole, watch)
        return {_kind(target) for target in targets} == KINDS and {target["health"] for target in targets} == {"up"}

    await wait_until(are_up, timeout_s=END_S, every_s=0.1)


async def _some_of_everything_happens(whole: Outside) -> None:
    """Answers, a refusal, a dead letter, a reply in a chat."""
    replies = await whole.ask_many(20, in_flight=5)
    assert {reply.status for reply in replies} == {200}
    assert (await whole.ask("")).status == 422
    await whole.redis.xadd(keys.stream("llm"), {"data": "no JSON"})
    assert (await whole.send("POST", "/chat/m/messages", {"user_id": "ann", "text": "hello"})).status == 202
    await wait_until(lambda: whole.redis.xlen(keys.CHAT_EVENTS + "m"), timeout_s=END_S)


async def _no_page_is_refused_by_promtool_or_has_labels_without_bound(
    whole: Outside, watch: Prometheus, promtool: str
) -> None:
    for target in await _targets(whole, watch):
        page = (await whole.http.get(target["scrapeUrl"])).text
        process = await asyncio.create_subprocess_exec(
            promtool, "check", "metrics", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await process.communicate(page.encode())
        assert (process.returncode, said.decode()) == (0, ""), _kind(target)
        families = text_string_to_metric_families(page)
        found = {label for family in families for sample in family.samples for label in sample.labels}
        assert found <= LABELS, _kind(target)


async def _every_panel_has_data(whole: Outside, watch: Prometheus) -> None:
    asked = [(title, query) for path in DASHBOARDS for title, query in queries(dashboard(path))]
    assert len(asked) > 50
    for title, query in asked:
        await _until_data(whole, watch, query, title)


async def _every_rule_has_data(whole: Outside, watch: Prometheus) -> None:
    """What is recorded is there; alerts are silent while all is well, so what they look at must be there."""
    groups = (await watch.ask(whole.http, "rules"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 30
    for rule in rules:
        if rule["name"] == "penstock:cause_pages:max":  # there while something pages
            continue
        if rule["type"] == "recording":
            await _until_data(whole, watch, rule["name"], "recorded")
        else:
            for selector in re.findall(r"(?:\b[a-z_]+:)?\b[a-z_]+(?::[a-z0-9_]+)?(?:\{[^}]*\})?", rule["query"]):
                name = selector.partition("{")[0]
                if name.startswith(("penstock", "api_gateway", "up")) and "cause_pages" not in name:
                    await _until_data(whole, watch, selector, rule["name"])
        assert rule["health"] == "ok", rule


async def _a_killed_worker_is_found_again_and_told_of(whole: Outside, watch: Prometheus) -> None:
    before = {target["scrapeUrl"] for target in await _targets(whole, watch)}
    killed = whole.system.kill("encoder", signal.SIGKILL)

    async def is_replaced() -> bool:
        targets = [target for target in await _targets(whole, watch) if _kind(target) == ("stage", "encoder")]
        return any(target["health"] == "up" and target["scrapeUrl"] not in before for target in targets)

    await wait_until(is_replaced, timeout_s=END_S, every_s=0.1)
    assert whole.system.pid_of("encoder") != killed
    await wait_until(lambda: _fires(whole, watch, "PenstockWorkerDied"), timeout_s=END_S, every_s=0.1)
    await _until_no_page(whole, watch)  # a machine with other work to do starts the next one slowly


async def _a_stage_that_is_gone_fires_its_alert_and_no_other_page(whole: Outside, watch: Prometheus) -> None:
    whole.system.kill("retriever", signal.SIGSTOP)  # `up` would start it again if it ended
    try:
        await wait_until(lambda: _fires(whole, watch, "PenstockStageDown"), timeout_s=END_S, every_s=0.1)

        async def is_the_only_one() -> bool:  # others may page for a moment when the whole machine stands still
            return await _pages(whole, watch) == [("PenstockStageDown", "retriever")]

        await wait_until(is_the_only_one, timeout_s=END_S, every_s=0.1)
    finally:
        whole.system.kill("retriever", signal.SIGCONT)
    await _until_no_page(whole, watch)


async def _targets(whole: Outside, watch: Prometheus) -> list[dict[str, Any]]:
    try:
        targets: list[dict[str, Any]] = (await watch.ask(whole.http, "targets"))["activeTargets"]
    except (httpx.HTTPError, ValueError):  # it starts
        return []
    return targets


def _kind(target: dict[str, Any]) -> tuple[str, str]:
    return target["labels"]["kind"], target["labels"].get("stages", "")


async def _until_data(whole: Outside, watch: Prometheus, expression: str, asker: str) -> None:
    async def is_there() -> bool:
        return bool(await watch.query(whole.http, expression))

    try:
        await wait_until(is_there, timeout_s=END_S, every_s=0.2)
    except TimeoutError:
        raise AssertionError(f"no data for {asker}: {expression}") from None


async def _fires(whole: Outside, watch: Prometheus, name: str) -> bool:
    return bool(await watch.query(whole.http, f'ALERTS{{alertname="{name}",alertstate="firing"}}'))


async def _until_no_page(whole: Outside, watch: Prometheus) -> None:
    async def is_quiet() -> bool:
        return await _pages(whole, watch) == []

    await wait_until(is_quiet, timeout_s=END_S, every_s=0.1)


async def _pages(whole: Outside, watch: Prometheus) -> list[tuple[str, str]]:
    found = await watch.query(whole.http, 'ALERTS{severity="page",alertstate="firing"}')
    return [(one["metric"]["alertname"], one["metric"].get("stage", "")) for one in found]

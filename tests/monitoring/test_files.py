"""What can be checked of rules, dashboards and runbook without anything that runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S
from tests.monitoring.files import DASHBOARDS, PROMETHEUS, RUNBOOK, dashboard, panels, queries

ALERTS = PROMETHEUS / "rules" / "alerts.yml"
STORIES = PROMETHEUS / "tests" / "alerts.yml"


def run(*command: str) -> str:
    """Run a program that must not complain; return what it said."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def names_of_alerts() -> list[str]:
    """Return every alert's name."""
    return re.findall(r"- alert: (\w+)", ALERTS.read_text())


def test_promtool_accepts_configuration_and_rules(promtool: str) -> None:
    """The configuration, and the rules that it names."""
    said = run(promtool, "check", "config", str(PROMETHEUS / "prometheus.yml"))
    assert said.count("SUCCESS") == 2 + len(list((PROMETHEUS / "rules").iterdir()))


def test_alerts_fire_when_they_should_and_only_then(promtool: str) -> None:
    """The stories of `deploy/prometheus/tests`, among them: killing a stage fires its alert and no other page."""
    run(promtool, "test", "rules", str(STORIES))


def test_every_alert_is_seen_firing_in_a_story() -> None:
    """A new alert costs a story."""
    stories = STORIES.read_text()
    assert [name for name in names_of_alerts() if not re.search(rf"\b{name}\b", stories)] == []


def test_every_alert_says_how_grave_it_is_what_happens_and_what_to_do() -> None:
    """Severity, summary, description, and a section of the runbook that is there."""
    sections = re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    alerts = re.split(r"      - alert: ", ALERTS.read_text())[1:]
    for alert in alerts:
        name = alert.split("\n")[0]
        assert re.search(r"^          severity: (page|ticket)$", alert, re.MULTILINE), name
        assert re.search(r"^          summary: \S", alert, re.MULTILINE), name
        assert re.search(r"^          description: \S", alert, re.MULTILINE), name
        assert f"runbook_url: docs/RUNBOOK.md#{name.lower()}\n" in alert, name
    assert sorted(sections) == sorted(names_of_alerts())


def test_the_runbook_leads_to_settings_and_sections_that_exist() -> None:
    """No dead end at three in the morning."""
    text = RUNBOOK.read_text()
    anchors = {section.lower() for section in names_of_alerts()}
    assert set(re.findall(r"\(#([\w-]+)\)", text)) <= anchors
    settings = (RUNBOOK.parent / "SETTINGS.md").read_text()
    assert [name for name in set(re.findall(r"PENSTOCK_\w+__\w+", text)) if f"`{name}`" not in settings] == []
    assert [page for page in set(re.findall(r"\((\w+\.md)", text)) if not (RUNBOOK.parent / page).exists()] == []
    titles = {panel["title"] for path in DASHBOARDS for panel in panels(dashboard(path))}
    titles |= set(re.findall(r"^## (.+)$", (RUNBOOK.parent / "OPERATIONS.md").read_text(), re.MULTILINE))
    assert [title for title in re.findall(r'"([A-Z][^"]+)"', text) if title not in titles] == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Path) -> None:
    """Ids are unique, nothing overlaps, every panel asks something of the chosen data source."""
    board = dashboard(path)
    found = list(panels(board))
    assert len({panel["id"] for panel in found}) == len(found)
    taken: set[tuple[int, int]] = set()
    for panel in found:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["targets"], panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert sources == [{"type": "prometheus", "uid": "${datasource}"}] * len(sources), panel["title"]
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert board["templating"]["list"][0]["type"] == "datasource"
    expressions = [target["expr"] for panel in found for target in panel.get("targets", ())]
    used = set(re.findall(r"\$(\w+)", " ".join(expressions)))
    assert used <= variables | {"__rate_interval"}
    assert all("$" not in expression for _, expression in queries(board))


def test_dashboards_have_names_of_their_own() -> None:
    """Grafana knows them by uid."""
    boards = [dashboard(path) for path in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == 3


def test_every_metric_that_rules_and_dashboards_ask_for_is_documented() -> None:
    """A renamed metric would leave an alert that never fires."""
    documented = set(re.findall(r"^\| `(\w+)` \|", (RUNBOOK.parent / "METRICS.md").read_text(), re.MULTILINE))
    texts = [path.read_text() for path in (PROMETHEUS / "rules").glob("*.yml")]
    texts += [expression for path in DASHBOARDS for _, expression in queries(dashboard(path))]
    asked = {name for text in texts for name in re.findall(r"\b(?:penstock|api_gateway)_[a-z0-9_]+\b(?!:)", text)}
    plain = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    recorded = set(re.findall(r"- record: (\S+)", "\n".join(texts)))
    used = {name for text in texts for name in re.findall(r"\bpenstock:[a-z0-9_:]+", text)}
    assert plain <= documented
    assert used <= recorded

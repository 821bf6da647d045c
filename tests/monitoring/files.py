"""What `deploy/` holds for Prometheus and Grafana, as the tests read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
PROMETHEUS: Final = ROOT / "deploy" / "prometheus"
GRAFANA: Final = ROOT / "deploy" / "grafana"
DASHBOARDS: Final = sorted((GRAFANA / "dashboards").glob("*.json"))
RUNBOOK: Final = ROOT / "docs" / "RUNBOOK.md"

Json = dict[str, Any]


def dashboard(path: Path) -> Json:
    """Return one dashboard."""
    value: Json = json.loads(path.read_text())
    return value


def panels(board: Json) -> Iterator[Json]:
    """Yield the panels of a dashboard, rows and what is folded in them included."""
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", ())


def queries(board: Json) -> Iterator[tuple[str, str]]:
    """Yield the title of each panel with each of its queries, variables filled in as Grafana would."""
    for panel in panels(board):
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m")
            yield panel["title"], re.sub(r"\$(stage|replica)\b", ".*", expression)

"""The page on metrics names exactly the metrics there are."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import REGISTRY

import gateway.metrics
import gateway.telegram
import pipeline.metrics
import stages.aggregator
import stages.chat
import stages.delivery
import stages.embedders
import stages.image
import stages.llm
import stages.report
import stages.webhook
from tests.gateway.fake import NOTHING

PAGE = Path(__file__).parents[2] / "docs" / "METRICS.md"
MODULES = (
    gateway.metrics,
    gateway.telegram,
    pipeline.metrics,
    stages.aggregator,
    stages.chat,
    stages.delivery,
    stages.embedders,
    stages.image,
    stages.llm,
    stages.report,
    stages.webhook,
)


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    """A new metric costs one line in its table and one in its document."""
    assert MODULES
    of_pipeline = gateway.metrics.pipeline_metrics(NOTHING, redis_up=True, max_jobs=1, max_backlog=1)
    ours = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in [*REGISTRY.collect(), *of_pipeline]
        if family.name.startswith(("penstock_", "api_gateway_"))
    }
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", PAGE.read_text(), re.MULTILINE))
    assert documented == ours

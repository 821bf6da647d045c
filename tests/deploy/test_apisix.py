"""What APISIX is told, as far as that can be checked without one: names that meet, limits, paths that lead on."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from ruamel.yaml import YAML

from gateway.app import operations
from tests.cli.conftest import ROOT
from tests.deploy import compose

FOLDER = ROOT / "deploy/apisix"
RULES: dict[str, Any] = YAML(typ="safe").load(FOLDER / "apisix.yaml")
CONFIG: dict[str, Any] = YAML(typ="safe").load(FOLDER / "config.yaml")
ROUTES = {route["id"]: route for route in RULES["routes"]}
INSIDE = {"/metrics", "/sd/targets"}

LIMIT: dict[str, Any] = {
    "count": int,
    "time_window": int,
    "key_type": {"var", "var_combination", "constant"},
    "key": str,
    "rejected_code": {429},
    "rejected_msg": str,
    "policy": {"local", "redis", "redis-cluster"},
}
"""Of the plugin's attributes those used here, as its documentation types them."""


def test_apisix_runs_without_etcd_and_takes_the_rules() -> None:
    """It reads them up to a mark, without which it reads nothing; plugins that are not listed are not loaded."""
    assert CONFIG["deployment"] == {"role": "data_plane", "role_data_plane": {"config_provider": "yaml"}}
    assert (FOLDER / "apisix.yaml").read_text().rstrip().endswith("\n#END")
    used = {name for route in ROUTES.values() for name in route["plugins"]}
    assert used <= set(CONFIG["plugins"])


@pytest.mark.parametrize("name", ROUTES)
def test_every_route_is_limited_and_leads_somewhere(name: str) -> None:
    """429, as callers and our own workers understand it; the upstream's nodes are services of the compose file."""
    route = ROUTES[name]
    limit = route["plugins"]["limit-count"]
    assert {"count", "time_window", "key", "key_type", "rejected_code"} <= limit.keys() <= LIMIT.keys()
    for attribute, value in limit.items():
        kind = LIMIT[attribute]
        assert value in kind if isinstance(kind, set) else isinstance(value, kind), attribute
    assert limit["count"] > 0
    assert limit["time_window"] > 0
    (upstream,) = [one for one in RULES["upstreams"] if one["id"] == route["upstream_id"]]
    services = compose.services()
    for node in upstream["nodes"]:
        host, port = node.split(":")
        assert port in services[host]["expose"] or any(one.endswith(f":{port}") for one in services[host]["ports"])
    assert upstream["retries"] == 0
    ((variable, operator, port),) = route["vars"]
    assert (variable, operator) == ("server_port", "==")
    assert int(port) in CONFIG["apisix"]["node_listen"]


def test_the_replicas_are_not_for_clients() -> None:
    """Their port is not published; API keys are counted one by one."""
    published = compose.services()["apisix"]["ports"]
    assert published == ["127.0.0.1:9080:9080"]
    assert ROUTES["replicas"]["vars"] == [["server_port", "==", "9081"]]
    assert {ROUTES[name]["plugins"]["limit-count"]["key"] for name in ("api", "create")} == {"http_authorization"}


def test_every_path_of_the_api_is_reached() -> None:
    """And what is for the inside of a network is not."""
    uris = [*ROUTES["api"]["uris"], ROUTES["create"]["uri"]]
    for operation in operations():
        is_reached = any(fnmatch.fnmatchcase(operation.path, uri) for uri in uris)
        assert is_reached is (operation.path not in INSIDE), operation.path

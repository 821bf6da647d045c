"""`docs/DEPLOY.md` shows what the programs take: commands, variables, units, manifests."""

from __future__ import annotations

import re
import shlex
from configparser import ConfigParser
from typing import Any

import pytest
import typer.main
from ruamel.yaml import YAML

from penstock import app
from pipeline.settings import load
from tests.cli.conftest import ROOT
from tests.deploy import compose

PAGE = (ROOT / "docs/DEPLOY.md").read_text()
COMMANDS = typer.main.get_command(app)


def blocks(kind: str) -> list[str]:
    """Return what stands between fences of that kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.M | re.S)


def settings_in(text: str) -> dict[str, str]:
    """Return the variables of a file of `NAME=value` lines."""
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


def assert_is_a_command(words: list[str]) -> None:
    """Fail unless these words are a command of ours, each option one that it knows."""
    group: Any = COMMANDS
    while words and words[0] in getattr(group, "commands", {}):
        group = group.commands[words.pop(0)]
    assert not hasattr(group, "commands"), words
    known = {name for parameter in group.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_variable_of_the_compose_file_is_explained() -> None:
    """In the table, with the default that the file has."""
    asked = dict(re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", compose.FILE.read_text()))
    rows = re.findall(r"^\| (`[A-Z_`, ]+) \| (.*?) \|", PAGE, re.M)
    told = {name: default for names, default in rows for name in re.findall(r"`([A-Z_]+)`", names)}
    assert told.keys() == asked.keys()
    for name, default in asked.items():
        if name != "LLM_URLS":
            assert (f"`{default}`" if default else "none") in told[name]


def test_every_service_is_explained() -> None:
    """In the table, by its name; of three that are alike the first and the last."""
    table = PAGE.partition("| Service | Is |")[2].partition("\n\n")[0]
    for name in compose.services():
        stem, _, number = name.rpartition("_")
        assert f"`{name}`" in table or (number == "2" and f"`{stem}_1`" in table) or f"`_{number}`" in table


@pytest.mark.parametrize("text", [text for text in blocks("yaml") if text.startswith("services:")])
def test_a_change_of_the_compose_file_fits_it(text: str) -> None:
    """Services that exist, settings that exist, volumes that are declared."""
    change = YAML(typ="safe").load(text)
    services = compose.services()
    for name, part in change["services"].items():
        load(services[name].get("environment", {}) | part.get("environment", {}) if "environment" in part else {})
        for mount in part.get("volumes", []):
            assert mount.partition(":")[0] in change["volumes"]
            assert mount.partition(":")[2] == "/var/lib/penstock"


@pytest.mark.parametrize("text", blocks("sh"))
def test_a_file_of_variables_holds_settings(text: str) -> None:
    """Of Compose or of systemd."""
    given = settings_in(text)
    if given.pop("MOCKS", None):
        assert given.keys() <= set(re.findall(r"\$\{(\w+):-", compose.FILE.read_text()))
    assert load(given).llm.urls


def test_the_unit_starts_what_exists_and_lets_it_drain() -> None:
    """One template for the stages; the gateway's is made from it."""
    (text,) = blocks("ini")
    unit = ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # as the documentation of ConfigParser has it
    unit.read_string(text)
    service = unit["Service"]
    _program, *words = service["ExecStart"].replace("%i", "encoder").split()
    assert_is_a_command(words)
    assert "penstock stage %i/penstock gateway" in PAGE
    assert int(service["TimeoutStopSec"]) >= max(load({}).worker.drain_s, load({}).deliveries.drain_s) + 5
    assert service["EnvironmentFile"] in PAGE


def test_the_pod_is_like_the_container() -> None:
    """The user of the image, settings that exist, the port that its probe asks, time to drain."""
    (text,) = [text for text in blocks("yaml") if text.startswith("apiVersion:")]
    pod = YAML(typ="safe").load(text)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    service = compose.services()["llm_generator_1"]
    settings = load({row["name"]: row["value"] for row in container["env"]})
    assert [row["containerPort"] for row in container["ports"]] == [settings.metrics.port]
    assert settings.metrics.host == "0.0.0.0"
    assert container["args"] == service["command"]
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == service["user"]
    assert f"{pod['terminationGracePeriodSeconds']}s" == service["stop_grace_period"]
    assert pod["enableServiceLinks"] is False


def test_every_command_of_ours_exists() -> None:
    """With its options; in a container the program's name is left out where the image supplies it."""
    text = "\n".join(blocks("")).replace("\\\n", " ")
    commands = re.findall(r"(?:exec gateway penstock|run .* gateway) (.+)", text)
    assert len(commands) >= 3
    for command in commands:
        assert_is_a_command(shlex.split(command))

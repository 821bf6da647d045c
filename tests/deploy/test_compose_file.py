"""What `compose.yaml` says of each container, before any runs."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from pipeline.settings import load
from stages.qdrant_server import LEAST_VERSION
from tests.cli.conftest import ROOT
from tests.deploy import compose

WANTED = {
    "redis",
    "postgres",
    "qdrant",
    "gateway",
    "recorder",
    "encoder",
    "retriever",
    "llm_generator_1",
    "llm_generator_2",
    "llm_generator_3",
    "aggregator",
    "report",
    "delivery",
    "webhook",
    "chat",
    "image",
    "mock_llm_1",
    "mock_llm_2",
    "mock_llm_3",
    "prometheus",
    "grafana",
    "rabbitmq",
    "bridge_amqp",
    "apisix",
}
WRITES = {"apisix"}  # beside its own programs
PLAIN_STAGES = {"encoder", "retriever", "aggregator", "webhook", "chat", "image", "report", "delivery", "recorder"}
STAGES = {name for name in WANTED if name in PLAIN_STAGES or name.startswith("llm_")}
SERVICES = compose.services()
each_service = pytest.mark.parametrize("name", SERVICES)
each_of_ours = pytest.mark.parametrize("name", compose.ours(SERVICES))


def test_the_file_is_what_compose_takes() -> None:
    """By the schema that the specification publishes; it comes with the checker."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(compose.FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_part_is_there() -> None:
    """Nothing is left for the reader to add."""
    assert set(SERVICES) >= WANTED


@each_service
def test_a_container_may_do_no_more_than_it_must(name: str) -> None:
    """Not root, nothing to write to but what is mounted, no capability, no way to gain one, bounded."""
    service = SERVICES[name]
    assert int(service["user"].partition(":")[0]) > 0
    assert service["read_only"] is (name not in WRITES)
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "network_mode", "pid", "ipc", "devices"}
    assert service["mem_limit"]
    assert service["pids_limit"]


@each_service
def test_a_container_is_watched_and_started_again(name: str) -> None:
    """Compose knows whether it is well, and Docker starts what died."""
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}
    assert service["restart"] == "unless-stopped"


@each_service
def test_an_image_is_pinned(name: str) -> None:
    """To a minor version at least: what runs tomorrow is what ran today."""
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+[\w.-]*", SERVICES[name]["image"])


@each_service
def test_only_this_machine_reaches_what_is_published(name: str) -> None:
    """The gateway asks for no key, so nobody else may come near; Redis is not published at all."""
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


def test_the_gateway_is_published() -> None:
    """Under a port that the reader may choose."""
    assert SERVICES["gateway"]["ports"] == ["127.0.0.1:8000:8000"]
    assert compose.services({"GATEWAY_PORT": "8100"})["gateway"]["ports"] == ["127.0.0.1:8100:8000"]


def test_no_secret_stands_in_the_file() -> None:
    """What is called a key comes from outside, and is nothing unless given."""
    found = {
        name: value
        for service in compose.read()["services"].values()
        for name, value in service.get("environment", {}).items()
        if re.search("KEY|PASSWORD|SECRET|TOKEN", name)
    }
    assert found == {name: f"${{{name}:-}}" for name in found}
    assert {"PENSTOCK_API_KEYS", "OPENAI_API_KEY"} <= found.keys()


@each_of_ours
def test_every_variable_is_a_setting(name: str) -> None:
    """Read as the process will read them, with nothing given from outside and with everything."""
    for environ in ({}, {"PENSTOCK_API_KEYS": "anna:one", "OPENAI_API_KEY": "two", "LLM_URLS": "http://gpu:8000"}):
        load(_environment(compose.services(environ)[name]))


def test_what_is_given_from_outside_arrives() -> None:
    """Keys, replicas and models of one's own need no change of the file."""
    given = {"PENSTOCK_API_KEYS": "anna:one", "LLM_URLS": "http://gpu:8000,http://gpu2:8000", "MOCKS": "0"}
    found = compose.services(given)
    assert load(_environment(found["gateway"])).gateway.api_keys == ("anna:one",)
    assert load(_environment(found["llm_generator_2"])).llm.urls == ("http://gpu:8000", "http://gpu2:8000")
    assert [found[name]["scale"] for name in sorted(found) if name.startswith("mock_")] == ["0", "0", "0"]


@each_of_ours
def test_a_container_is_given_the_time_to_drain(name: str) -> None:
    """SIGKILL comes after what the process grants itself."""
    service = SERVICES[name]
    settings = load(_environment(service))
    drain_s = settings.deliveries.drain_s if name == "delivery" else settings.worker.drain_s
    assert int(service["stop_grace_period"].removesuffix("s")) >= drain_s + 5


def test_what_accepts_work_stops_first() -> None:
    """Compose stops in the opposite order of what depends on what: gateway, stages, then replicas and Redis."""
    assert SERVICES["gateway"]["depends_on"].keys() >= STAGES
    for name in STAGES:
        assert "redis" in SERVICES[name]["depends_on"]
        if name.startswith("llm_"):
            assert {"mock_llm_1", "mock_llm_2", "mock_llm_3"} <= SERVICES[name]["depends_on"].keys()


def test_redis_keeps_what_it_is_given() -> None:
    """On a volume, in a file, never evicted; less memory than the container has."""
    redis = SERVICES["redis"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    assert (options["--appendonly"], options["--maxmemory-policy"]) == ("yes", "noeviction")
    assert redis["volumes"] == ["redis:/data"]
    assert 2 * int(options["--maxmemory"].removesuffix("mb")) <= int(redis["mem_limit"].removesuffix("m"))


def test_who_needs_no_rabbitmq_has_none() -> None:
    """Broker and bridge start together, and only when asked for; the bridge finds the broker, or one from outside."""
    profiled = {name for name, service in SERVICES.items() if "rabbitmq" in service.get("profiles", [])}
    assert profiled == {"rabbitmq", "bridge_amqp"}
    bridge = SERVICES["bridge_amqp"]
    assert bridge["depends_on"].keys() == {"redis", "rabbitmq"}
    assert load(_environment(bridge)).amqp.url == "amqp://guest:guest@rabbitmq:5672/"
    given = {"RABBITMQ_URL": "amqps://me@elsewhere/reports"}
    assert load(_environment(compose.services(given)["bridge_amqp"])).amqp.url == given["RABBITMQ_URL"]


def test_qdrant_is_new_enough() -> None:
    """The retriever refuses an older server."""
    version = re.search(r":v(\d+)\.(\d+)", SERVICES["qdrant"]["image"])
    assert version is not None
    assert tuple(map(int, version.groups())) >= LEAST_VERSION


def test_what_is_mounted_is_there() -> None:
    """What is missing would be made by Docker, as a folder, root's and empty."""
    mounts = [mount.split(":") for service in SERVICES.values() for mount in service.get("volumes", [])]
    named = compose.read()["volumes"].keys()
    assert {source for source, *_ in mounts if not source.startswith(".")} == set(named)
    for source, _, *mode in mounts:
        if source.startswith("."):
            assert mode == ["ro"]
            assert (ROOT / source).exists(), source


def _environment(service: dict[str, Any]) -> dict[str, str]:
    environment: dict[str, str] = service.get("environment", {})
    return environment

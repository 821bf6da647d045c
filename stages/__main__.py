"""A stage process: `python -m stages NAME...`."""

from __future__ import annotations

from pipeline import starting

if __name__ == "__main__":
    starting.begin()

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
import uvloop
from prometheus_client import start_http_server

from pipeline import logs
from pipeline.consumer import Consumer
from pipeline.errors import ConfigError
from pipeline.settings import Settings, load
from pipeline.stage import Loop, Stage

SWITCH_S: Final = 0.0005
"""After which a thread that cuts or writes a document gives way to the event loop. A question comes to the loop several
times in each stage, and Python's default of 5 ms was waited for at each of them."""

log = structlog.get_logger(__name__)


def build(name: str, settings: Settings) -> Sequence[Stage | Loop]:
    """Return the stage of that name, or the loop, or both: `build(settings)` of the module `stages.<name>`.

    Raises:
        ConfigError: there is no such stage.
    """
    if not name.isidentifier():
        raise ConfigError(f"{name!r} is no stage's name")
    try:
        module = importlib.import_module(f"stages.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"stages.{name}":
            raise
        raise ConfigError(f"there is no stage called {name!r}; there are {', '.join(_names())}") from error
    if not hasattr(module, "build"):
        raise ConfigError(f"there is no stage called {name!r}; there are {', '.join(_names())}")
    built: Stage | Loop | Sequence[Stage | Loop] = module.build(settings)
    return [built] if isinstance(built, Stage | Loop) else built


def _names() -> list[str]:
    """Return the names of all stages: of the modules here that have a `build`."""
    files = Path(__file__).parent.glob("[a-z]*.py")
    return sorted(file.stem for file in files if "\ndef build(" in file.read_text(encoding="utf-8"))


async def work(names: Sequence[str], settings: Settings) -> None:
    """Run the stages until a signal stops them."""
    parts = [part for name in dict.fromkeys(names) for part in build(name, settings)]
    stages = [part for part in parts if isinstance(part, Stage)]
    loops = [part for part in parts if isinstance(part, Loop)]
    try:
        server, _ = start_http_server(settings.metrics.port, settings.metrics.host)
    except OSError as error:
        raise ConfigError(f"PENSTOCK_METRICS__PORT: cannot listen on {settings.metrics.port}: {error}") from error
    try:
        address = f"{settings.metrics.host}:{server.server_port}"
        consumer = Consumer(stages, settings, loops=loops, metrics_address=address)
        consumer.stop_on_signals()
        starting.end()
        sys.setswitchinterval(SWITCH_S)
        log.info("working", worker=consumer.worker_name, stages=list(names), metrics_port=server.server_port)
        await consumer.run()
    finally:
        server.shutdown()
        server.server_close()


def run(names: Sequence[str], settings: Settings) -> int:
    """Run the stages; return the process's exit code: 0 after a drain, 2 for settings that cannot work."""
    logs.configure(settings.log, "+".join(names))
    try:
        uvloop.run(work(names, settings))
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the operator reads it
        return 2
    return 0


def main() -> int:
    """Read the settings and the command line."""
    try:
        settings = load(os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the operator reads it
        return 2
    return run(sys.argv[1:], settings)


if __name__ == "__main__":
    sys.exit(main())

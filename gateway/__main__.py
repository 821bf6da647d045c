"""A gateway process: `python -m gateway`."""

from __future__ import annotations

from pipeline import starting

if __name__ == "__main__":
    starting.begin()

import os
import sys

import uvloop

from gateway.server import serve
from pipeline import logs
from pipeline.errors import ConfigError
from pipeline.settings import Settings, load


def run(settings: Settings) -> int:
    """Run the gateway; return the process's exit code: 0 after a drain, 2 for settings that cannot work."""
    logs.configure(settings.log, "gateway")
    try:
        uvloop.run(serve(settings))
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the operator reads it
        return 2
    return 0


def main() -> int:
    """Read the settings and run."""
    try:
        settings = load(os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the operator reads it
        return 2
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())

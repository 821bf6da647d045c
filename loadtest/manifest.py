"""What is needed to repeat a run, beside its figures: versions, host, command, settings."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.options import LoadOptions

_PACKAGES: Final = ("penstock", "hdrhistogram", "httptools", "uvloop")
_SECRETS: Final = ("--api-key", "--header", "-H")


def manifest(options: LoadOptions) -> dict[str, Any]:
    """Return the manifest of a run that starts now."""
    return {
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command(sys.argv),
        "seed": options.seed,
        "settings": options.shown(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "host": {
            "name": platform.node(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "load": [round(load, 2) for load in os.getloadavg()],
        },
    }


def command(argv: Sequence[str]) -> str:
    """Return the command line as it was given, with every secret left out."""
    shown: list[str] = []
    is_secret = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if is_secret:
            shown.append("...")
        elif name in _SECRETS and equals:
            shown.append(f"{name}=...")
        elif word.startswith("-H") and word != "-H":
            shown.append("-H...")
        else:
            shown.append(word)
        is_secret = not is_secret and word in _SECRETS
    return shlex.join(shown)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a copy of the tree
        return None

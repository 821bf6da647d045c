"""What is needed to repeat a run, beside its figures: versions, host, command, settings."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from loadtest.target import without_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.options import LoadOptions

_PACKAGES: Final = ("penstock", "hdrhistogram", "httptools", "uvloop")
_SECRETS: Final = ("--api-key", "--header")
_SHORT: Final = re.compile(r"(-q*H)(.*)", re.DOTALL)  # -q is the only one that may stand before it


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
    before = ""  # the option whose value comes next
    for word in argv:
        name, equals, value = word.partition("=")
        option, before = before, ""
        if option == "--path":
            shown.append(without_values(word))
        elif option:
            shown.append("...")
        elif name == "--path" and equals:
            shown.append(f"{name}={without_values(value)}")
        elif name in _SECRETS and equals:
            shown.append(f"{name}=...")
        elif short := _SHORT.fullmatch(word):
            shown.append(short[1] + ("..." if short[2] else ""))
            before = "" if short[2] else "-H"
        else:
            shown.append(word)
            before = word if word in (*_SECRETS, "--path") else ""
    return shlex.join(shown).encode("utf-8", "replace").decode()  # names of files may be no UTF-8; JSON is


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a copy of the tree
        return None

"""`compose.yaml` as Compose understands it: fragments merged, variables put in, services by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML

from tests.cli.conftest import ROOT

Json = dict[str, Any]

FILE: Final = ROOT / "compose.yaml"
OURS: Final = "penstock:"  # how the name of our own image begins

_VARIABLE: Final = re.compile(r"\$(?:\$|\{(\w+)(?::-([^}]*))?\})")


def read(path: Path = FILE) -> Json:
    """Return the file as it stands, with its fragments merged."""
    found: Json = YAML(typ="safe").load(path)
    return found


def services(environ: Mapping[str, str] | None = None) -> dict[str, Json]:
    """Return every service, as it is for somebody with *environ*."""
    found: dict[str, Json] = _put_in(read()["services"], environ or {})
    return found


def ours(found: Mapping[str, Json]) -> dict[str, Json]:
    """Return those services that run our own image."""
    return {name: service for name, service in found.items() if service["image"].startswith(OURS)}


def _put_in(value: Any, environ: Mapping[str, str]) -> Any:
    """Put in the variables, as Compose does: `${NAME}`, `${NAME:-default}`, and `$$` for a dollar."""
    if isinstance(value, dict):
        return {name: _put_in(part, environ) for name, part in value.items()}
    if isinstance(value, list):
        return [_put_in(part, environ) for part in value]
    if not isinstance(value, str):
        return value

    def one(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return environ.get(match[1]) or match[2] or ""

    return _VARIABLE.sub(one, value)

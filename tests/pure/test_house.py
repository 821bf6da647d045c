"""The house itself: which way imports point, who owns Redis, what things are called, what is documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "stages", "gateway", "loadtest")
PURE = {"job", "retry", "errors", "settings", "keys", "clock", "balancing", "flows", "priorities", "outcomes"}
PURE_MAY_IMPORT = {"pydantic", "orjson", "msgspec"}
OWNERS_OF_REDIS = {"pipeline/connection.py", "pipeline/wire.py"}
NAMES_OF_NOTHING = {"utils", "util", "helpers", "helper", "common", "base", "misc", "core", "lib"}


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for every import in *path*, also those inside functions."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}".strip(".") if node.level else node.module or ""
            yield node.lineno, module
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def found(paths: list[Path], *roots: str) -> list[str]:
    """Return `file:line imports module` for every import of *roots* in *paths*."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in paths
        for line, module in imports(path)
        if module.split(".")[0] in roots
    ]


def test_the_pipeline_knows_no_stage_and_no_gateway() -> None:
    """Imports point inward; `pipeline/local.py` starts the others as processes."""
    assert found(sources("pipeline"), "stages", "gateway", "loadtest", "penstock", "tests") == []


def test_stages_and_gateway_do_not_know_each_other() -> None:
    """They meet in Redis only."""
    assert found(sources("stages"), "gateway", "loadtest", "penstock", "tests") == []
    assert found(sources("gateway"), "stages", "loadtest", "penstock", "tests") == []


def test_the_load_tester_imports_nothing_of_ours() -> None:
    """It speaks HTTP like any client, so it can be wrong in no way that we are."""
    assert found(sources("loadtest"), "pipeline", "stages", "gateway", "penstock", "tests") == []


def test_pure_files_import_only_each_other() -> None:
    """Decisions need no Redis, no HTTP and no event loop."""
    allowed = PURE_MAY_IMPORT | sys.stdlib_module_names
    strangers = []
    for name in sorted(PURE):
        for line, module in imports(ROOT / "pipeline" / f"{name}.py"):
            root, _, rest = module.partition(".")
            if not (root in allowed or (root == "pipeline" and (not rest or rest.split(".")[0] in PURE))):
                strangers.append(f"pipeline/{name}.py:{line} imports {module}")
    assert strangers == []


def test_redis_is_imported_where_it_is_owned() -> None:
    """Everybody else goes through that file, so its errors and its traps end there."""
    users = {str(path.relative_to(ROOT)) for path in sources(*PACKAGES) if found([path], "redis", "valkey")}
    assert users <= OWNERS_OF_REDIS


def test_no_module_is_called_after_nothing() -> None:
    """A thing lives with its user, and a file says what it is about."""
    paths = [*sources(*PACKAGES), *sources("tests")]
    assert [str(path.relative_to(ROOT)) for path in paths if path.stem in NAMES_OF_NOTHING] == []


@pytest.mark.parametrize(
    "path", [*sources(*PACKAGES), ROOT / "penstock.py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_module_says_what_it_is_about(path: Path) -> None:
    """A reader begins with the first line."""
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_setting_is_documented() -> None:
    """`docs/SETTINGS.md` has one row for each setting, with its present default, and none for others."""
    rows = dict(re.findall(r"^\| `(PENSTOCK_\w+__\w+)` \| (.*?) \|", (ROOT / "docs/SETTINGS.md").read_text(), re.M))
    assert sorted(rows) == sorted(settings.names())
    wrong = {name: (rows[name], default_of(name)) for name in rows if rows[name] != default_of(name)}
    assert wrong == {}


def test_every_alias_is_documented() -> None:
    """Names that people already have are listed with what they set."""
    text = (ROOT / "docs/SETTINGS.md").read_text()
    for alias, (section, field) in settings.ALIASES.items():
        assert f"| `{alias}` | `PENSTOCK_{section.upper()}__{field.upper()}` |" in text


def default_of(name: str) -> str:
    """Return a setting's default as the page shows it: `10`, "none" for None, "empty" for nothing."""
    section, field = name.removeprefix("PENSTOCK_").lower().split("__")
    value = getattr(getattr(settings.Settings(), section), field)
    if value is None:
        return "none"
    if value in ("", ()):
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{int(value) if isinstance(value, float) and value.is_integer() else value}`"


@pytest.mark.parametrize(
    ("what", "dear"),
    [
        ("stages.__main__, stages.encoder, stages.retriever, stages.llm", {"rich", "typer", "sqlalchemy", "httpx"}),
        ("gateway.server", {"rich", "typer", "sqlalchemy", "httpx"}),
        ("pipeline.local", {"rich", "sqlalchemy", "httpx", "redis"}),
        ("loadtest.mock", {"rich", "typer", "pydantic"}),
    ],
)
def test_what_up_waits_for_imports_nothing_dear_that_it_does_without(what: str, dear: set[str]) -> None:
    """Until the first answer `up` does little but import, in eight processes at once."""
    begin = "" if what.startswith("loadtest") else "from pipeline import starting; starting.begin(); "
    code = f"{begin}import {what}, sys; print(*sys.modules)"
    imported = subprocess.run(  # a process of its own: here everything is imported already
        [sys.executable, "-P", "-c", code], capture_output=True, check=True, text=True, env={"PYTHONPATH": str(ROOT)}
    ).stdout.split()
    assert dear & set(imported) == set()

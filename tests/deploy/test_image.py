"""The Dockerfile and `compose.yaml` speak of the same image, and the image holds what it needs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT
from tests.deploy import compose

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVICES = compose.ours(compose.services())


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    text = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines())]


def last(word: str) -> str:
    """Return what the last instruction of that name says."""
    return [rest for name, rest in instructions() if name == word][-1]


def copied() -> list[str]:
    """Return the paths that are copied from the source tree."""
    rests = [rest for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    return [source for rest in rests for source in shlex.split(rest)[:-1]]


def is_ignored(path: str) -> bool:
    """Say whether `.dockerignore` keeps *path* out; the last line that fits decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if pattern and not pattern.startswith("#") and (fnmatch(path, pattern) or path.startswith(f"{pattern}/")):
            ignored = not line.startswith("!")
    return ignored


def test_the_entry_point_is_the_command() -> None:
    """So that a service's command begins with the name of a subcommand."""
    (program,) = json.loads(last("ENTRYPOINT"))
    assert program in PROJECT["scripts"]
    assert "entrypoint" not in {key for service in SERVICES.values() for key in service}


def test_the_user_is_the_same() -> None:
    """And is made in the image, so that it owns the folder that it may write to."""
    assert {service["user"] for service in SERVICES.values()} == {last("USER")}
    user, group = last("USER").split(":")
    made = " ".join(rest for name, rest in instructions() if name == "RUN")
    assert f"--uid {user} " in made
    assert f"--gid {group} " in made


def test_the_ports_are_the_same() -> None:
    """Every port that a service uses is told by the image, and every port told is used."""
    used = {port for service in SERVICES.values() for port in service["expose"]}
    assert used == set(last("EXPOSE").split())


def test_what_is_installed_is_what_the_project_declares() -> None:
    """With the extra that the retriever's variables ask for, and with a Python that the project supports."""
    runs = [rest for name, rest in instructions() if name == "RUN"]
    installs = [re.findall(r"pip install ([^&]+)", run) for run in runs]
    assert [found.strip() for row in installs for found in row] == ["--requirement requirements.txt", "--no-deps ."]
    (made,) = [run for run in runs if "requirements.txt" in run]
    (extras,) = [shlex.split(rest.partition("=")[2])[0] for name, rest in instructions() if name == "ARG"]
    line = re.search(r"python -c (\"[^\"]+\") \$EXTRAS > requirements.txt ", made)
    assert line is not None
    command = [sys.executable, "-c", *shlex.split(line[1]), *extras.split()]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = [line for extra in extras.split() for line in PROJECT["optional-dependencies"][extra]]
    assert said.splitlines() == [*PROJECT["dependencies"], *wanted]
    assert ("qdrant" in extras.split()) == ("QDRANT_URL" in SERVICES["retriever"]["environment"])
    bases = {rest.split()[0] for name, rest in instructions() if name == "FROM"}
    (version,) = {re.fullmatch(r"python:(\d+\.\d+)-slim-\w+", base)[1] for base in bases}  # type: ignore[index]  # or fail
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


@pytest.mark.parametrize("path", copied())
def test_what_is_copied_is_there_and_reaches_docker(path: str) -> None:
    """A path that `.dockerignore` keeps out cannot be copied."""
    assert (ROOT / path).exists()
    assert not is_ignored(path)


@pytest.mark.parametrize("path", [".env", ".git", ".venv", ".penstock", "tests", "compose.yaml", "secret.pem"])
def test_what_is_private_does_not_reach_docker(path: str) -> None:
    """No secret, no data, no history, no tests."""
    assert is_ignored(path)


def test_what_is_copied_is_all_that_the_package_needs(tmp_path: Path) -> None:
    """The wheel made of it holds the programs, their scripts, the page of the API and the pages that `up` indexes."""
    for name in copied():
        source, target = ROOT / name, tmp_path / "src" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "src", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"penstock.py", "gateway/page.css", "gateway/page.js", "stages/llm.py", "loadtest/mock.py"}
    wanted |= {f"pipeline/scripts/{script.name}" for script in (ROOT / "pipeline/scripts").glob("*.lua")}
    wanted |= {f"pipeline/_docs/{text.name}" for text in (ROOT / "docs").glob("*.md")}
    assert wanted - packed == set()

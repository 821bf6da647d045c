"""What the documents tell a reader to type exists, with these options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import typer.main

from penstock import app

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE: Final = re.compile(r"^ *```.*?\n(.*?)^ *```|`([^`\n]+)`", re.MULTILINE | re.DOTALL)
END: Final = re.compile(r"\s#|&|\||;|\s{3,}|[\[\]…]")
"""Where what is typed ends: at a remark, at the shell's own signs, where the command ends or its explanation begins."""


def typed(page: Path, program: str) -> Iterator[list[str]]:
    """Yield the words behind *program* wherever a page's code begins a command with it."""
    for block, span in CODE.findall(page.read_text()):
        for line in (block or span).replace("\\\n", " ").splitlines():
            for found in re.finditer(rf"(?:^|&&|[\s=]|/bin/){program} (?P<words>[a-z-].*)", line):
                words = found["words"]
                quoted = [] if "'" not in words and '"' not in words else re.findall(r"'[^']*'|\"[^\"]*\"", words)
                for text in quoted:  # a promise holds signs that would end the command
                    words = words.replace(text, "QUOTED")
                yield shlex.split(END.split(words)[0])


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "ARCHITECTURE.md"], ids=lambda page: page.name)
def test_every_command_in_a_page_exists_with_its_options(page: Path) -> None:
    """`penstock dead retry --al` would be found here before a reader does. Ways that were not taken are left alone."""
    for words in typed(page, "penstock"):
        command: Any = typer.main.get_command(app)
        left = list(words)
        while hasattr(command, "commands"):
            name = left.pop(0) if left else ""
            if not name or name.startswith("-"):
                break
            assert name in command.commands, f"{page.name}: penstock {' '.join(words)}"
            command = command.commands[name]
        command.make_parser(command.context_class(command)).parse_args(left)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_in_a_page_exists(page: Path) -> None:
    """So are those of `just`."""
    recipes = set(re.findall(r"^([a-z][a-z-]*)[^:=\n]*:(?!=)", (ROOT / "Justfile").read_text(), re.MULTILINE))
    asked = {words[0] for words in typed(page, "just") if words and not words[0].startswith("-")}
    assert asked <= recipes


def test_the_pages_are_read() -> None:
    """A pattern that finds nothing would let everything pass."""
    assert ["up", "--llm", "http://127.0.0.1:11434"] in list(typed(ROOT / "README.md", "penstock"))
    assert ["ingest"] in [words[1:2] for words in typed(ROOT / "docs" / "PERFORMANCE.md", "just")]


def test_every_page_can_be_found_from_the_first() -> None:
    """README names each document."""
    first = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[2:] if f"(docs/{page.name})" not in first] == []

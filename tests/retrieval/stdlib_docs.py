"""A document set that is on any machine: the docstrings of Python's standard library, one Markdown file per module.

    python -m tests.retrieval.stdlib_docs FOLDER

Python modules are read, not imported, so nothing runs. What they take over from modules written in C (`csv` from
`_csv`) and public modules in C themselves (`zlib`) can only be imported. The same Python gives the same files every
time. Left out are tests, private modules, and packages that are programs of their own or differ between distributions.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

_LEFT_OUT = frozenset(
    {
        "__phello__",
        "antigravity",
        "config-3",
        "dist-packages",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
    }
    | {"pydoc_data", "site-packages", "test", "tests", "this", "turtledemo"}
)


def write(folder: Path) -> int:
    """Write one `<module>.md` per documented module into *folder*, which is made; return how many."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = dict(documents())
    for module, text in pages.items():
        (folder / f"{module}.md").write_text(text, encoding="utf-8")
    return len(pages)


def documents() -> Iterator[tuple[str, str]]:
    """Yield (module, Markdown) for every documented module of the running Python, in order of name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {_module(path.relative_to(root)): path for path in root.rglob("*.py")}
    for module in sorted({*sources, *sys.stdlib_module_names}):
        if not module or any(part.startswith("_") or part in _LEFT_OUT for part in module.split(".")):
            continue
        if module in sources:
            page = _page(_sections(_parse(sources[module]), module, 1))
        else:
            page = _page(_sections_in_c(module))
        if page:
            yield module, page


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # old escapes in somebody else's source are not our matter
        return ast.parse(path.read_bytes())


def _page(sections: Iterator[str]) -> str:
    text = "\n\n".join(sections)
    return f"{text}\n" if text else ""


def _sections(node: _Documented, name: str, level: int) -> Iterator[str]:
    doc = ast.get_docstring(node)
    inner = [section for child, label in _children(node, name) for section in _sections(child, label, level + 1)]
    if isinstance(node, ast.Module):
        doc, taken_over = _taken_over(node, doc)
        inner += taken_over
    if doc or inner:
        yield f"{'#' * level} {name}"
    if doc:
        yield doc
    yield from inner


def _children(node: _Documented, name: str) -> Iterator[tuple[_Documented, str]]:
    if not isinstance(node, ast.Module | ast.ClassDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield child, f"{name}.{child.name}" if isinstance(node, ast.ClassDef) else child.name


def _taken_over(tree: ast.Module, doc: str | None) -> tuple[str | None, list[str]]:
    """Return the module's docstring and the sections of functions that it imports from a private module in C."""
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    sections = []
    guarded = [inner for outer in tree.body if isinstance(outer, ast.Try | ast.If) for inner in outer.body]
    for statement in tree.body + guarded:
        if not isinstance(statement, ast.ImportFrom) or not (statement.module or "").startswith("_"):
            continue
        module = _import_c(statement.module or "")
        if module is None:
            continue
        names = {alias.name for alias in statement.names}
        if "__doc__" in names:
            doc = inspect.getdoc(module)
        for name in sorted(dir(module) if "*" in names else names):
            if not name.startswith("_") and name not in defined:
                defined.add(name)
                sections += _section_in_c(name, getattr(module, name, None), 2)
    return doc, sections


def _sections_in_c(name: str) -> Iterator[str]:
    module = _import_c(name)
    if module is None or not module.__doc__:
        return
    yield f"# {name}"
    yield inspect.cleandoc(module.__doc__)
    for member in sorted(vars(module)):
        if not member.startswith("_"):
            yield from _section_in_c(member, getattr(module, member), 2)


def _section_in_c(name: str, value: object, level: int) -> list[str]:
    if not callable(value) or not value.__doc__:
        return []
    return [f"{'#' * level} {name}", inspect.cleandoc(value.__doc__)]


def _import_c(name: str) -> ModuleType | None:
    """Import *name* if it is written in C, so that importing it runs no Python."""
    spec = importlib.util.find_spec(name)
    if spec is None or not (spec.origin == "built-in" or str(spec.origin).endswith((".so", ".pyd", ".dylib"))):
        return None
    with warnings.catch_warnings(action="ignore"):  # a few say that they will be removed
        try:
            return importlib.import_module(name)
        except ImportError:
            return None  # its C library is not on this machine


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.retrieval.stdlib_docs FOLDER")
    print(f"{write(Path(sys.argv[1]))} documents in {sys.argv[1]}")

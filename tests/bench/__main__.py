"""`python -m tests.bench [NAME] [options]`: run one benchmark, or all, and print the figures."""

from __future__ import annotations

import argparse
import datetime
import importlib
import inspect
import os
import platform
import sys
from typing import Final

BENCHES: Final = ("hops", "query", "backlog", "tail", "start", "ingest", "batch")


def main(arguments: list[str]) -> int:
    """Read the command line: the options of a benchmark are the parameters of its `run`."""
    parser = argparse.ArgumentParser(prog="just bench", description="Without a name: all of them, one after the other.")
    names = parser.add_subparsers(dest="name", metavar="NAME")
    for name in BENCHES:
        module = importlib.import_module(f"tests.bench.{name}")
        about = names.add_parser(name, help=module.__doc__, description=module.__doc__)
        about.add_argument("--json", action="store_true", help="for programs")
        for option in inspect.signature(module.run).parameters.values():
            flag = "--" + option.name.replace("_", "-")
            if isinstance(option.default, bool):
                about.add_argument(flag, action="store_true")
            else:
                about.add_argument(flag, type=type(option.default), default=option.default, help=f"{option.default}")
    options = vars(parser.parse_args(arguments))
    chosen = options.pop("name")
    as_json = options.pop("json", False)
    for name in [chosen] if chosen else BENCHES:
        report = importlib.import_module(f"tests.bench.{name}").run(**options)
        report.about |= {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        sys.stdout.write(report.as_json() + "\n" if as_json else report.as_text() + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The process that sends: `python -m tests.bench.driver NAME OPTIONS` obeys one line of JSON after the other.

`NAME` is a module of this package with `submitting(**options)`, a context manager that gives the call. The commands are
`closed`, `open` (with the planned starts), and whatever the module has in `COMMANDS`. `python -m tests.bench.driver
--work NAME URL HOP` is one hop of a peer.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
from typing import Any

import uvloop

from tests.bench import loads


async def drive(name: str, options: dict[str, Any]) -> None:
    """Obey commands until standard input ends, or SIGTERM."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    loop.add_signal_handler(signal.SIGTERM, reader.feed_eof)
    module = importlib.import_module(f"tests.bench.{name}")
    async with module.submitting(**options) as call:
        say({"ready": name})
        while line := await reader.readline():
            command = json.loads(line)
            pids = {**command.pop("pids", {}), "submitter": os.getpid()}
            match command.pop("do"):
                case "closed":
                    window = await loads.closed(call, pids=pids, **command)
                    say(window.as_json())
                case "open":
                    window = await loads.open_loop(call, pids=pids, **command)
                    say(window.as_json())
                case other:
                    say(await module.COMMANDS[other](call, pids=pids, **command))


def say(body: dict[str, Any]) -> None:
    """Answer with one line."""
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Read the command line."""
    if sys.argv[1] == "--work":
        _, _, name, url, hop = sys.argv
        uvloop.run(importlib.import_module(f"tests.bench.{name}").work(url, int(hop)))
    else:
        uvloop.run(drive(sys.argv[1], json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()

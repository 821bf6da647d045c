"""How a process of ours starts: soon, since `up` starts a dozen at once and nearly all they do at first is to import.

`begin` comes before any other import, `end` when all is imported and the work begins. Standard library only.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def begin() -> None:
    """Have the garbage collector wait until `end`, and import structlog, which everything of ours imports.

    To look again and again through modules that stay would take a tenth of the start.
    """
    gc.disable()
    with without_rich():
        import structlog  # noqa: F401


def end() -> None:
    """Set what was imported apart: to walk over it would stop the event loop for 25 ms now and then.

    It is not walked over before either, which would take 40 to 90 ms: of 100,000 objects a few hundred are garbage.
    """
    gc.freeze()
    gc.enable()


@contextmanager
def without_rich() -> Iterator[None]:
    """Import here what takes rich where it is installed and does without it elsewhere: structlog, httpx.

    They want it for tracebacks and a command line that we do not use, and it is half of what they take to import.
    """
    if "rich" in sys.modules:
        yield
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # Python's way to have an import refused
    try:
        yield
    finally:
        del sys.modules["rich"]

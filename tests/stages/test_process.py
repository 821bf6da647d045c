"""The process that stages run in."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from pipeline.settings import Settings
from stages import __main__ as program


@pytest.fixture
def _the_same_afterwards() -> Iterator[None]:
    before_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before_s)


class Looker:
    """A consumer that looks at how long a thread may hold the interpreter while it runs."""

    worker_name = "looker"
    seen_s = 0.0

    def __init__(self, *_: object, **__: object) -> None: ...

    def stop_on_signals(self) -> None:
        """It stops by itself."""

    async def run(self) -> None:
        Looker.seen_s = sys.getswitchinterval()


@pytest.mark.usefixtures("_the_same_afterwards")
async def test_threads_give_way_to_the_event_loop_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question comes to the loop several times in each stage; 5 ms at each, beside documents, is what it noticed."""
    monkeypatch.setattr(program, "Consumer", Looker)
    monkeypatch.setattr("stages.__main__.starting.end", lambda: None)
    settings = Settings()
    settings = settings.model_copy(update={"metrics": settings.metrics.model_copy(update={"port": 0})})
    await program.work(["encoder"], settings)
    assert Looker.seen_s == pytest.approx(program.SWITCH_S)

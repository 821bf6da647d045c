"""While the history is far behind, nothing is accepted that it would have to be told of; all else is."""

from __future__ import annotations

import pytest

from pipeline import keys
from pipeline.connection import Link
from pipeline.errors import Overloaded
from pipeline.front import Front
from pipeline.settings import Settings
from tests.conftest import wait_until
from tests.rig import changed, prompt, query


async def is_refused(front: Front) -> bool:
    try:
        await front.submit(prompt(front))
    except Overloaded as error:
        return "recorded" in str(error)
    return False


async def test_a_backlog_beyond_its_limit_refuses_what_is_recorded(link: Link, settings: Settings) -> None:
    """Until it is worked off; questions, which no history knows, go on."""
    async with Front(changed(settings, history={"max_backlog": 3}), "test") as front:
        for _ in range(3):
            await link.call("XADD", keys.EVENTS, "*", "kind", "message")
        await front._refresh()
        assert not await is_refused(front)
        await link.call("XADD", keys.EVENTS, "*", "kind", "message")
        await wait_until(lambda: is_refused(front))
        await front.submit(query(front))
        await link.call("XTRIM", keys.EVENTS, "MAXLEN", 3)
        await wait_until(lambda: is_accepted(front))


async def is_accepted(front: Front) -> bool:
    return not await is_refused(front)


async def test_a_stream_of_a_wrong_type_refuses_nothing_by_itself(link: Link, front: Front) -> None:
    """It is told in the log; the script that would write there finds it, too."""
    await link.call("SET", keys.EVENTS, "x")
    with pytest.raises(Exception, match="WRONGTYPE"):
        await front._refresh()
    await front.submit(query(front))

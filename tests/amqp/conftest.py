"""A broker for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rabbitmq import RabbitServer, a_broker


@pytest.fixture(scope="session")
def broker() -> Iterator[RabbitServer]:
    """One real broker."""
    with a_broker() as server:
        yield server


@pytest.fixture
def rabbitmq(broker: RabbitServer) -> RabbitServer:
    """It, running."""
    return broker.up()

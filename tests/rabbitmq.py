"""A private RabbitMQ for tests, of Debian's package `rabbitmq-server`: on loopback, with files of its own.

Nodes of Erlang find each other through a daemon (epmd) that the first one starts, and that stays when all have gone.
Here each server has one of its own, started before it and ended after it, so nothing stays behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Self

import pytest

from tests.ports import take_port
from tests.servers import Server

SCRIPT = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""What Debian's command of that name runs, as the user `rabbitmq` and on that user's files."""


class Epmd(Server):
    """The daemon in which a node of Erlang enters its port."""

    def __init__(self) -> None:
        super().__init__("epmd")
        self.port = take_port()

    def command(self) -> list[str]:
        """Return the command line; without `-daemon` it stays in the foreground."""
        binary = shutil.which("epmd")
        if binary is None:
            raise LookupError("RabbitMQ is missing: apt-get install rabbitmq-server")
        return [binary, "-address", "127.0.0.1", "-port", str(self.port)]

    def answers(self) -> bool:
        """Say whether it listens."""
        return _listens(self.port)

    def start_once(self) -> None:
        """Start it, unless it runs."""
        if self._process is None:
            self.start()


class RabbitServer(Server):
    """One RabbitMQ, with the user `guest` that comes with it. What is durable outlives `stop` and `kill`."""

    start_timeout_s = 600.0  # seconds of work for one core, which others may want, too

    def __init__(self) -> None:
        if not SCRIPT.exists():
            raise LookupError("RabbitMQ is missing: apt-get install rabbitmq-server")
        super().__init__("rabbitmq")
        self.port = take_port()
        self._epmd = Epmd()
        self._dist_port = take_port()
        for name, text in {"rabbitmq.conf": self._configuration(), "plugins": "[]."}.items():
            (self.directory / name).write_text(text)

    def _configuration(self) -> str:
        return f"listeners.tcp.1 = 127.0.0.1:{self.port}\nloopback_users.guest = true\nlog.console = true\n"

    @property
    def url(self) -> str:
        """The address, as `RABBITMQ_URL` takes it."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def command(self) -> list[str]:
        """Return the command line; its process becomes the node: a shell that waits for it would outlive a kill."""
        local = "inet_dist_use_interface {127,0,0,1}"
        environ = {
            "HOME": self.directory,  # of the cookie
            "RABBITMQ_NODENAME": f"penstock{self.port}@localhost",
            "RABBITMQ_CONF_ENV_FILE": self.directory / "none",
            "RABBITMQ_CONFIG_FILE": self.directory / "rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": self.directory / "plugins",
            "RABBITMQ_MNESIA_BASE": self.directory / "mnesia",
            "RABBITMQ_LOG_BASE": self.directory,
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": self.directory / "pid",
            "RABBITMQ_DIST_PORT": self._dist_port,
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-noinput +S 1:1 +sbwt none -kernel {local}",
            "RABBITMQ_ALLOW_INPUT": "1",  # the script makes way for the node, which `-noinput` keeps from a shell
            "ERL_EPMD_PORT": self._epmd.port,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        return ["env", *(f"{name}={value}" for name, value in environ.items()), str(SCRIPT)]

    def answers(self) -> bool:
        """Say whether it takes connections."""
        return _listens(self.port)

    def launch(self) -> None:
        """Start the node; the daemon, too, the first time."""
        self._epmd.start_once()
        super().launch()

    def up(self) -> Self:
        """Return it, running: a test that ended it and failed is not the next one's business."""
        if not self.answers():
            self.stop()
            self.start()
        return self

    def stop(self) -> None:
        """Let the node write what it has and end (SIGTERM)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the node as a crash would (SIGKILL)."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze the node (SIGSTOP): it holds its connections and answers nobody."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Thaw the node (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill the node and the daemon, and remove their files."""
        super().close()
        self._epmd.close()

    def __repr__(self) -> str:
        return f"<RabbitServer {self.url} {'up' if self._process else 'down'}>"


def a_broker() -> RabbitServer:
    """Return a server of the test's own, not started; skips where there is no RabbitMQ, as CI never does."""
    try:
        return RabbitServer()
    except LookupError as error:
        pytest.skip(str(error))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0

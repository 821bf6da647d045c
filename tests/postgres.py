"""A private PostgreSQL for tests.

It refuses to run as root, so for root it runs as the user `postgres`, whom Debian's package brings.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path

from tests.servers import Server

USER = "postgres"


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


class PostgresServer(Server):
    """One PostgreSQL. Its data outlives `stop` and `crash`."""

    def __init__(self) -> None:
        self._bin = binaries()
        super().__init__("postgres")
        self._data = self.directory / "data"
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

    def command(self) -> list[str]:
        """Return the command line."""
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.directory),
            "fsync": "off",  # a crash of the machine is no test here; of the server, nothing is lost without it
            "max_connections": "60",
            "shared_buffers": "16MB",
            "log_min_messages": "warning",
        }
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return [str(self._bin / "postgres"), "-D", str(self._data), *words]

    def tied(self, pipe: int) -> list[str]:
        """As another user too: that change takes a tie away, so the one who makes it ties afterwards."""
        return [*self._as_user, "--pdeathsig=KILL", *self.command()] if self._as_user else super().tied(pipe)

    def answers(self) -> bool:
        """Say whether it takes connections: it writes so into the last line of its pid file."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return lines[:1] == [str(self.pid)] and lines[-1].strip() == "ready"

    def stop(self) -> None:
        """End the server now: clients are cut off, nothing is lost (SIGINT)."""
        self._end(signal.SIGINT)

    def crash(self) -> None:
        """End the server without letting it tidy up (SIGQUIT): it recovers when it starts again."""
        self._end(signal.SIGQUIT)

    def close(self) -> None:
        """Crash the server and remove its folder: SIGKILL would leave its memory and its children behind."""
        self.crash()
        super().close()

    def __repr__(self) -> str:
        return f"<PostgresServer {self.directory} {'up' if self._process else 'down'}>"

"""A real PostgreSQL for tests: its own directory, a free loopback port, ended by its process id."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections import deque
from pathlib import Path

PASSWORD = "not a secret: this server lives as long as a test"
USER = "fleetmind"


class PostgresUnavailable(Exception):
    """This machine can't run one; the text says why."""


def binaries() -> Path:
    """The directory of the newest PostgreSQL's programs. Raises PostgresUnavailable."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    if on_path is None:
        raise PostgresUnavailable("no PostgreSQL server is installed (apt-get install postgresql)")
    return Path(on_path).resolve().parent


class Postgres:
    """A server that can be killed and started again on the same port and data."""

    def __init__(self) -> None:
        self._binaries = binaries()
        # PostgreSQL refuses to run as root, and what runs it must reach its directory.
        self._user = _unprivileged_user() if os.geteuid() == 0 else None
        self._home = Path(tempfile.mkdtemp(prefix="fleetmind-postgres-"))
        self._process: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque(maxlen=50)
        self.port = _free_port()
        (self._home / "password").write_text(PASSWORD)
        if self._user is not None:
            for path in (self._home, self._home / "password"):
                shutil.chown(path, self._user)
        self._run_to_end(
            "initdb", "-D", str(self._home / "data"), "-U", USER, "-A", "scram-sha-256", "-E", "UTF8", "--no-sync",
            "--locale=C", f"--pwfile={self._home / 'password'}",
        )  # fmt: skip

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        for _ in range(20):
            self._process = self._spawn()
            if self._is_ready():
                return
            # After a kill the old workers hold the shared memory for a moment; the start then ends by itself.
            self._process.wait()
        raise PostgresUnavailable("PostgreSQL doesn't start:\n" + "".join(self._lines))

    def kill(self) -> None:
        """End it as a crash does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Stop it and remove its files."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def url(self, database: str, *, password: str = PASSWORD, port: int | None = None) -> str:
        quoted = password.replace(" ", "%20").replace(":", "%3A")
        return f"postgresql://{USER}:{quoted}@127.0.0.1:{port or self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Make an empty database; returns its URL."""
        import pg8000.dbapi

        connection = pg8000.dbapi.connect(USER, "127.0.0.1", "postgres", self.port, PASSWORD)
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(f"CREATE DATABASE {name}")
        connection.close()
        return self.url(name)

    def _spawn(self) -> "subprocess.Popen[str]":
        # Without fsync it is fast; these tests kill processes, not machines.
        arguments = ("-D", str(self._home / "data"), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1")
        settings = ("-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "max_connections=40")
        return subprocess.Popen(
            [str(self._binaries / "postgres"), *arguments, *settings],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment(),
            cwd=self._home,
            user=self._user,
            extra_groups=[] if self._user else None,
        )

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.stderr is not None
        pipe = self._process.stderr
        for line in pipe:
            self._lines.append(line)
            if "ready to accept connections" in line:
                # Go on reading, or a full pipe would stop the server.
                threading.Thread(target=lambda: self._lines.extend(pipe), daemon=True).start()
                return True
        return False

    def _run_to_end(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._binaries / program), *arguments],
            capture_output=True,
            text=True,
            env=self._environment(),
            cwd=self._home,
            user=self._user,
            extra_groups=[] if self._user else None,
        )
        if done.returncode != 0:
            raise PostgresUnavailable(f"{program} failed:\n{done.stderr}")

    def _environment(self) -> dict[str, str]:
        # The messages are read by this program.
        return {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"}


def _unprivileged_user() -> str:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise PostgresUnavailable("PostgreSQL refuses to run as root, and there is no other user")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

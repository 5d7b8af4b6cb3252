"""Fleetmind under test: ``fleetmind up`` on a home of its own, as an owner would start it, everything on as by default.

Only what the benchmark needs is set: a free port, and no packaged model where a fixed upstream is measured.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from bench.processes import Memory, NotMeasured, Running, answers, ask, free_port, memory_of

PROGRAM = Path(sys.executable).with_name("fleetmind")


class Server:
    """A running ``fleetmind up``. ``start_s`` is from the command to ``/ready`` (or ``/health`` with no model)."""

    def __init__(
        self,
        home: Path,
        *,
        preload: bool,
        env: Mapping[str, str] | None = None,
        program: Path | None = None,
        start_s_max: float = 120.0,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.port = free_port()
        self._log = home.parent / f"{home.name}.log"
        wanted = {"FLEETMIND_LOGS_FORMAT": "json", **({} if preload else {"FLEETMIND_MODELS_PRELOAD": "[]"})}
        argv = (program or PROGRAM, "up", "--home", home, "--port", str(self.port))
        self.running = Running("Fleetmind", argv, log=self._log, env={**wanted, **(env or {})}, cwd=home)
        try:
            self.start_s = self.running.wait_until(
                answers(self.port, "/ready" if preload else "/health"), within_s=start_s_max
            )
            self.running.wait_until((home / "run" / "server.json").exists, within_s=start_s_max)
        except BaseException:
            self.running.stop()
            raise
        self._file: dict[str, Any] = json.loads((home / "run" / "server.json").read_bytes())
        self.pid = int(self._file["pid"])

    def stop(self) -> None:
        self.running.stop()

    def manage(self, method: str, path: str, body: object = None) -> Any:
        """A call to the management API with the owner's rights; what it answers, decoded. Raises NotMeasured."""
        data = None if body is None else json.dumps(body).encode()
        answer = ask(self.port, method, path, body=data, key=str(self._file["token"]))
        if answer.status >= 300:
            raise NotMeasured(f"{method} {path} answered {answer.status}: {answer.body[:500]!r}")
        return json.loads(answer.body) if answer.body else None

    def add_model(self, name: str, **document: object) -> None:
        """Add a model and wait until it is served."""
        self.manage("POST", "/api/models", {"name": name, **document})
        self.running.wait_until(lambda: self._serves(name), within_s=self._age_s() + 30)

    def _age_s(self) -> float:
        return self.running.wait_until(lambda: True, within_s=float("inf"))

    def _serves(self, name: str) -> bool:
        models = self.manage("GET", "/api/models")["models"]
        return any(model["name"] == name and model["state"] == "ready" for model in models)

    def create_key(self, name: str = "bench") -> str:
        """A new key that may ask models."""
        return str(self.manage("POST", "/api/keys", {"name": name, "scopes": ["infer"]})["key"])

    def logs(self, lines: int = 30) -> str:
        """The end of the server's log, for when something went wrong."""
        return "\n".join(self.manage("GET", f"/api/logs?lines={lines}")["lines"])

    def memory(self) -> Memory:
        """What the server's own process holds; engines are processes of their own and not counted."""
        return memory_of([psutil.Process(self.pid)])

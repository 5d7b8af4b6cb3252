"""While a server starts, its terminal tells what its models wait for."""

import io
import threading
from pathlib import Path
from typing import Any

from tests.unit.cli.answering import Reply, answering, model

from fleetmind.cli.output import Output
from fleetmind.cli.serving import narrated, progress


class Heard(io.StringIO):
    """A stream that tells when a word was written."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word = word
        self.is_heard = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._word in self.getvalue():
            self.is_heard.set()
        return written


def test_it_tells_each_change_once_and_ends_when_all_is_settled(tmp_path: Path) -> None:
    looks = [
        [model("a", "loading", reason="reading"), model("b")],
        [model("a", "loading", reason="reading"), model("b")],
        [model("a"), model("b")],
    ]

    def script(method: str, path: str, body: Any) -> Reply:
        return 200, {"models": looks.pop(0)}

    err = Heard("a: ready")
    with answering(script) as server:
        server.announce(tmp_path)
        with narrated(tmp_path, Output(out=io.StringIO(), err=err, environ={}), interval_s=0.001):
            assert err.is_heard.wait(30)
    assert err.getvalue() == "a: loading, reading\na: ready\n"
    assert looks == [], "and it asks no more"


def test_programs_are_told_nothing(tmp_path: Path) -> None:
    with answering(lambda *_: (200, {"models": [model("a", "loading")]})) as server:
        server.announce(tmp_path)
        with narrated(tmp_path, Output(is_json=True, out=io.StringIO(), err=io.StringIO()), interval_s=0.001):
            pass
    assert server.asked == []


def test_progress_names_the_state_and_its_reason() -> None:
    models = [model("a", "failed", reason="no memory"), model("b", "unplaced"), model("c")]
    assert progress(models) == {"a": "failed, no memory", "b": "unplaced", "c": "ready"}

"""What is drawn says what is simulated, and never a zero for what is not known."""

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType
from tests.unit.cli.answering import model

from fleetmind.cli import views


def drawn(view: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200, markup=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


DEVICE = {
    "id": "gpu-0", "kind": "cuda", "name": "H200", "is_simulated": True, "memory_bytes_total": 1024**3,
    "memory_bytes_used": None, "memory_bytes_granted": 0, "utilisation": None, "temperature_c": None, "power_w": 71.6,
    "fault": "driver lost", "reading_age_s": None, "processes": [],
}  # fmt: skip
STATUS: dict[str, Any] = {
    "version": "1.2.3", "url": "http://127.0.0.1:9200", "pid": 7, "started_at_s": 0.0, "uptime_s": 11000.0,
    "ready": False, "is_simulated": True, "devices": [DEVICE], "models": [model("m", "failed", reason="[bold]damaged")],
    "replicas": [
        {"id": "m-1", "model": "m", "state": "failed", "devices": ["gpu-0"], "memory_bytes": 0, "slots": 4,
         "context_tokens": 1, "pid": None, "url": None, "reason": "it broke", "created_at_s": 0.0, "ready_at_s": None,
         "outstanding": 0, "is_simulated": True}
    ],
    "loops": [{"name": "devices", "state": "backing_off", "restarts": 3, "last_error": "OSError"}],
    "calls": {"outstanding": 2, "queued": 5}, "refusals": [],
}  # fmt: skip


def test_status_shows_state_reasons_simulation_and_failing_loops() -> None:
    text = drawn(views.status(STATUS))
    for words in ("not ready", "3 h 3 min", "2 being answered, 5 waiting", "[bold]damaged", "it broke", "driver lost"):
        assert words in text
    assert "H200 (simulated)" in text
    assert "m (simulated)" in text
    assert "Loop devices" in text


def test_a_name_that_says_it_is_simulated_is_not_labelled_twice() -> None:
    assert drawn(views.devices([{**DEVICE, "name": "H200 (simulated)"}])).count("(simulated)") == 1


def test_refusals_that_say_the_same_share_a_line_and_long_lines_are_cut() -> None:
    refusals = [{"model": "m", "device": f"card-{number}", "message": "needs 9, 4 free"} for number in range(10)]
    refusals.append({"model": "m", "device": None, "message": "no devices"})
    _, first, second = drawn(views.status({**STATUS, "refusals": refusals})).splitlines()[-4:-1]
    assert "card-0, card-1" in first
    assert "card-7 and 2 more" in first
    assert "card-8" not in first
    assert second.split() == ["m", "all", "no", "devices"]


def test_what_a_device_does_not_say_is_a_dash() -> None:
    row = drawn(views.devices([DEVICE])).splitlines()[1]
    assert row.count(views.UNKNOWN) == 3  # used, busy, temperature
    assert "72" in row
    assert "0%" not in row


def test_empty_lists_say_what_to_do() -> None:
    assert "fleetmind models add" in drawn(views.models([]))
    assert "fleetmind keys create" in drawn(views.keys([]))


def test_fit_shows_each_devices_verdict() -> None:
    document = {
        "model": {"architecture": "llama", "quantisation": "Q4_0", "parameters": 1, "layers": 1,
                  "context_length_trained": 2048},
        "footprint": {"weights_bytes": 1024**2, "kv_bytes": 0, "compute_bytes": 0, "overhead_bytes": 0,
                      "total_bytes": 1024**2},
        "devices": [
            {"id": "a", "name": "A", "is_simulated": False, "fits": True, "memory_bytes_needed": 1,
             "memory_bytes_free": 2, "context_tokens_max": 512, "reason": "fine"},
            {"id": "b", "name": "B", "is_simulated": True, "fits": False, "memory_bytes_needed": 3,
             "memory_bytes_free": 2, "context_tokens_max": 0, "reason": "too small"},
        ],
    }  # fmt: skip
    first, second = drawn(views.fit(document)).splitlines()[-2:]
    assert first.split()[:2] == ["A", "yes"]
    assert second.split()[:3] == ["B", "(simulated)", "no"]
    assert "too small" in second


def test_settings_show_their_source_and_values_as_they_would_be_written() -> None:
    values = [
        {"name": "a.b", "value": True, "unit": "", "source": "default", "where": ""},
        {"name": "a.c", "value": ["x", "y"], "unit": "", "source": "file", "where": "/f.toml:3"},
    ]
    first, second = drawn(views.configuration(values)).splitlines()[1:]
    assert first.split() == ["a.b", "true", "default"]
    assert "x, y" in second
    assert "file: /f.toml:3" in second


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.9, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (90000, "1 d 1 h")],
)
def test_durations_name_their_two_largest_units(seconds: float, words: str) -> None:
    assert views.duration(seconds) == words

"""Logs without secrets, metrics by name, spans only for those who ask."""

import io
import json
import logging
import stat
import string
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetmind.core.settings import LogsSettings, TelemetrySettings
from fleetmind.core.telemetry import LogFile, Metrics, Spans, configure_logs, log, redact

ALPHANUMERIC = string.ascii_letters + string.digits
KEY = "fm_abcdefgh_" + "Zx9" * 14 + "Q_1a2B3c"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("fleetmind")
    before = (root.handlers[:], root.level, ours.level)
    yield
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers, root.level = before[0], before[1]
    ours.setLevel(before[2])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def json_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_are_json_away_from_a_terminal() -> None:
    stream = io.StringIO()
    configure_logs(LogsSettings(), stream=stream)
    log("node").bind(replica="r1").info("replica ready", seconds=2.5, event="clash", devices=frozenset({"b", "a"}))
    log("node").debug("not shown")
    try:
        raise ValueError("why")
    except ValueError:
        log("fleetmind.node").exception("it broke")
    first, second = json_lines(stream.getvalue())
    assert str(first.pop("at")).endswith("Z")
    assert first == {
        "level": "info",
        "log": "fleetmind.node",
        "event": "replica ready",
        "replica": "r1",
        "seconds": 2.5,
        "event_": "clash",
        "devices": ["a", "b"],
    }
    assert second["level"] == "error"
    assert "ValueError: why" in str(second["traceback"])


def test_lines_are_for_a_person_on_a_terminal() -> None:
    stream = Terminal()
    configure_logs(LogsSettings(level="debug"), stream=stream)
    log("node").debug("replica ready", name="a b", count=3, error=ValueError("x"))
    line = stream.getvalue()
    assert line.endswith('debug   node: replica ready name="a b" count=3 error="ValueError: x"\n')


def test_a_value_cannot_break_its_line() -> None:
    for stream in (Terminal(), io.StringIO()):
        configure_logs(LogsSettings(), stream=stream)
        log("api").warning("refused\n12:00:00 info root: forged", path="/a\r\n\x1b[31mforged")
        assert stream.getvalue().count("\n") == 1
        assert "\x1b" not in stream.getvalue()


def test_an_exception_s_text_cannot_forge_a_line() -> None:
    stream = Terminal()
    configure_logs(LogsSettings(), stream=stream)
    log("api").exception("it broke", ValueError("x\n12:00:00 info root: forged\x1b[2J"))
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("it broke")
    assert all(line.startswith("    ") for line in rest)
    assert "\x1b" not in stream.getvalue()


def test_format_and_level_are_as_configured_and_can_be_set_again() -> None:
    first, second = Terminal(), io.StringIO()
    configure_logs(LogsSettings(format="json", level="error"), stream=first)
    log("x").warning("dropped")
    log("x").error("kept")
    assert [line["event"] for line in json_lines(first.getvalue())] == ["kept"]
    configure_logs(LogsSettings(format="console"), stream=second)
    log("x").info("now here")
    assert "now here" in second.getvalue()
    assert "now here" not in first.getvalue()


def test_lines_of_libraries_pass_the_same_way() -> None:
    stream = io.StringIO()
    configure_logs(LogsSettings(level="debug"), stream=stream)
    logging.getLogger("uvicorn").info("chatter")
    logging.getLogger("aiohttp").warning("sent %s", f"Authorization: Bearer {KEY}")
    (line,) = json_lines(stream.getvalue())
    assert line["event"] == "sent Authorization: Bearer ***"


def test_secrets_are_hidden_wherever_they_stand() -> None:
    for stream in (Terminal(), io.StringIO()):
        configure_logs(LogsSettings(), stream=stream)
        try:
            raise ValueError(f"bad key {KEY}")
        except ValueError as error:
            log("api").exception(
                f"call with {KEY}",
                error,
                header=f"bearer {KEY[3:]}",
                headers={"Authorization": f"Basic {KEY[5:]}", "x": [KEY]},
                url="postgresql://me:hunter2@host/db",
                foreign="sk-proj-abcdefghijklmnop",
            )
        text = stream.getvalue()
        assert KEY[12:40] not in text
        assert "hunter2" not in text
        assert "abcdefghijklmnop" not in text
        assert "fm_abcdefgh_***" in text, "the public part of a key should stay, to say which it was"


@given(
    st.text(st.characters(exclude_characters=f"{ALPHANUMERIC}_-"), max_size=20),
    st.text(ALPHANUMERIC, min_size=43, max_size=43),
    st.text(max_size=20),
)
def test_no_surrounding_lets_a_key_through(before: str, secret: str, after: str) -> None:
    assert secret not in redact(f"{before}fm_abcdefgh_{secret}_123456{after}")


def test_ordinary_text_stays_as_it_is() -> None:
    for text in ("fm_total calls", "the bearer of news", "http://a:9200/x?limit=3", "user@example.org said: hello"):
        assert redact(text).replace("bearer ***", "bearer of") == text


def test_the_file_is_private_bounded_and_json(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "server.log"
    configure_logs(LogsSettings(), path, stream=Terminal())
    log("x").info("hello", text="é\ud800")
    assert json_lines(path.read_text())[0]["event"] == "hello"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    small = LogFile(tmp_path / "small.log", bytes_max=2000, kept=2)
    for number in range(200):
        small.handle(logging.LogRecord("x", logging.INFO, "", 0, f"line {number} {'x' * 50}", (), None))
    small.close()
    files = sorted(tmp_path.glob("small.log*"))
    assert [file.name for file in files] == ["small.log", "small.log.1", "small.log.2"]
    assert all(file.stat().st_size <= 2000 for file in files)
    assert "line 199" in files[0].read_text()
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_full_disk_costs_lines_not_calls() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    handler = LogFile(full)
    handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "lost", (), None))
    assert handler.lines_dropped == 1
    handler.lines_dropped = 0
    handler.stream = io.StringIO()  # type: ignore[assignment]  # its close would report the full disk again


def test_a_long_field_is_cut() -> None:
    stream = io.StringIO()
    configure_logs(LogsSettings(), stream=stream)
    log("x").info("big", body="y" * 100_000)
    assert len(stream.getvalue()) < 5000
    assert "(100000 characters)" in stream.getvalue()


def test_every_metric_has_its_name_and_registries_do_not_mix() -> None:
    metrics, other = Metrics(), Metrics()
    metrics.calls.add("m", "ok", prompt_tokens=3, completion_tokens=4, seconds=0.2, ttft_s=0.03)
    metrics.calls.add("m", "ok", prompt_tokens=1, completion_tokens=0, seconds=400, ttft_s=None)
    metrics.device_memory_bytes_used.labels(device="d").set(5)
    text = metrics.render().decode()
    assert 'fleetmind_calls_total{model="m",status="ok"} 2.0' in text
    assert 'fleetmind_tokens_total{kind="prompt",model="m"} 4.0' in text
    assert 'fleetmind_ttft_seconds_bucket{le="0.025",model="m"} 0.0' in text
    assert 'fleetmind_ttft_seconds_bucket{le="0.05",model="m"} 1.0' in text
    assert 'fleetmind_call_seconds_bucket{le="300.0",model="m"} 1.0' in text
    assert 'fleetmind_call_seconds_bucket{le="+Inf",model="m"} 2.0' in text
    assert 'fleetmind_call_seconds_sum{model="m"} 400.2' in text
    assert 'fleetmind_device_memory_bytes_used{device="d"} 5.0' in text
    assert "fleetmind_calls_total{" not in other.render().decode()
    for name in vars(metrics):
        if name not in ("registry", "calls"):
            assert f"# HELP fleetmind_{name.removesuffix('_total')}" in text, name


# Spans


def test_without_an_endpoint_there_is_one_shared_nothing_and_no_import() -> None:
    code = (
        "import sys\n"
        "from fleetmind.core.telemetry import Spans\n"
        "from fleetmind.core.settings import TelemetrySettings\n"
        "spans = Spans(TelemetrySettings())\n"
        "assert spans.span('a', x=1) is spans.span('b')\n"
        "with spans.span('a') as span, spans.span('b'): span.set_attribute('k', 1)\n"
        "spans.close()\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_with_an_endpoint_spans_arrive_there() -> None:
    bodies: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            return None

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        spans = Spans(TelemetrySettings(otlp_endpoint=f"http://127.0.0.1:{server.server_port}", service_name="lab-7"))
        with spans.span("call", model="m1") as outer:
            outer.set_attribute("tokens", 3)
            with pytest.raises(ValueError), spans.span("attempt"):
                raise ValueError("engine away")
        spans.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert [path for path, _ in bodies] == ["/v1/traces"]
    for expected in (b"lab-7", b"call", b"attempt", b"m1", b"tokens", b"engine away"):
        assert expected in bodies[0][1]

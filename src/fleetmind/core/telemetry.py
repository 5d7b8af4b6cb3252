"""What an operator sees: logs, metrics and spans.

Declares every metric in one place, writes log lines with fields, and opens spans. It never decides anything and never
fails its caller: a full disk costs log lines, not calls. Invariant: no line leaves with a Fleetmind key, a bearer
token or a password of an address in it, whoever wrote it.
"""

import json
import logging
import logging.handlers
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from io import TextIOWrapper
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from fleetmind.core.config import mask
from fleetmind.core.settings import LogsSettings, TelemetrySettings
from fleetmind.core.types import MIB

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

LOG_FILE_BYTES_MAX = 8 * MIB
LOG_FILES_KEPT = 3
FIELD_CHARS_MAX = 4096
_ROOT = "fleetmind"

# Logs


class Log:
    """A named logger whose lines are an event and fields: ``log.info("replica ready", replica=id, seconds=2.1)``.

    Fields are kept apart from the text so that a machine can read them. Lines below the level cost one comparison.
    """

    __slots__ = ("_fields", "_logger")

    def __init__(self, logger: logging.Logger, fields: Mapping[str, object] | None = None) -> None:
        self._logger = logger
        self._fields = dict(fields or {})

    def bind(self, **fields: object) -> "Log":
        """The same logger with ``fields`` on every line."""
        return Log(self._logger, self._fields | fields)

    def debug(self, event: str, /, **fields: object) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, /, exception: BaseException | None = None, **fields: object) -> None:
        """An error with the traceback of ``exception``, or of the one being handled."""
        self._write(logging.ERROR, event, fields, exception or sys.exc_info()[1])

    def _write(
        self, level: int, event: str, fields: Mapping[str, object], exception: BaseException | None = None
    ) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"fields": {**self._fields, **fields}}
            self._logger.log(level, "%s", event, exc_info=exception, extra=extra)


def log(name: str) -> Log:
    """The logger ``fleetmind.<name>``; ``name`` may already begin with it."""
    return Log(logging.getLogger(name if name.split(".")[0] == _ROOT else f"{_ROOT}.{name}"))


def configure_logs(settings: LogsSettings, file: Path | None = None, *, stream: IO[str] | None = None) -> None:
    """Send logs to ``stream`` (standard error by default) and, as rotated JSON lines, to ``file``.

    May be called again: what it set up before is replaced. Other libraries' lines below warning are dropped.
    Raises OSError when ``file`` can't be opened.
    """
    stream = stream or sys.stderr
    is_console = settings.format == "console" or (settings.format == "auto" and stream.isatty())
    handlers: list[logging.Handler] = [logging.StreamHandler(stream)]
    handlers[0].setFormatter(ConsoleFormatter() if is_console else JsonFormatter())
    if file is not None:
        handlers.append(LogFile(file))
        handlers[1].setFormatter(JsonFormatter())
    root = logging.getLogger()
    for handler in [one for one in root.handlers if getattr(one, "is_fleetmind", False)]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.is_fleetmind = True  # type: ignore[attr-defined]  # ours to replace; others' handlers stay
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(_ROOT).setLevel(settings.level.upper())


_SECRETS = (
    # Our keys keep their public id, so that an operator can tell which key a line is about.
    (re.compile(r"fm_([0-9A-Za-z]{8})_[0-9A-Za-z_]+"), r"fm_\1_***"),
    (re.compile(r"(?i)\b(bearer|basic)((?:\s|%20|\\u0020)+)[^\s\"',;)\]}]+"), r"\1\2***"),
    (re.compile(r"\bsk-[0-9A-Za-z_-]{12,}"), "sk-***"),
)


def redact(text: str) -> str:
    """``text`` without Fleetmind keys, bearer tokens, foreign API keys and passwords of addresses."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return mask(text) if "://" in text or "?" in text or "&" in text else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: at, level, log, event, then the fields; ``traceback`` last."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": _timestamp(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "log": record.name,
            "event": record.getMessage(),
        }
        for name, value in _fields(record):
            line[f"{name}_" if name in line else name] = value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=_text, ensure_ascii=False))


class ConsoleFormatter(logging.Formatter):
    """Time, level, event and ``name=value`` for a person. Values can't break the line they stand in."""

    def format(self, record: logging.LogRecord) -> str:
        at = _timestamp(record).astimezone().strftime("%H:%M:%S")
        name = record.name.removeprefix(f"{_ROOT}.")
        parts = [f"{at} {record.levelname.lower():7} {name}: {_escaped(record.getMessage())}"]
        parts += [f"{key}={_bare(value)}" for key, value in _fields(record)]
        line = " ".join(parts)
        if record.exc_info:
            # Indented, so that the text of an exception can't pass for a line of its own.
            trace = self.formatException(record.exc_info).splitlines()
            line = "\n    ".join((line, *map(_escaped, trace)))
        return redact(line)


class LogFile(logging.handlers.RotatingFileHandler):
    """A log file of bounded size that only its owner may read. A line that can't be written is counted and dropped."""

    def __init__(self, path: Path, bytes_max: int = LOG_FILE_BYTES_MAX, kept: int = LOG_FILES_KEPT) -> None:
        self.lines_dropped = 0
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        super().__init__(path, maxBytes=bytes_max, backupCount=kept, encoding="utf-8", errors="backslashreplace")

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=_open_private)

    def handleError(self, record: logging.LogRecord) -> None:
        # The same line also went to standard error; raising here would fail whoever logged.
        self.lines_dropped += 1


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)


def _timestamp(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, object]]:
    fields = getattr(record, "fields", None)
    for name, value in (fields if isinstance(fields, Mapping) else {}).items():
        if isinstance(value, str) and len(value) > FIELD_CHARS_MAX:
            value = f"{value[:FIELD_CHARS_MAX]}… ({len(value)} characters)"
        yield name, value


def _text(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, frozenset | set | tuple):
        return sorted(map(str, value))
    return f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)


def _bare(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _escaped(str(_text(value)) if isinstance(value, BaseException) else str(value))
    return json.dumps(text, ensure_ascii=False) if not text or " " in text or '"' in text else text


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# Metrics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_COMMIT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


class Metrics:
    """Every metric of the server, in a registry of its own: several servers in one process don't mix.

    Names are the attributes with the prefix ``fleetmind_``. Labels take only values we chose (a model of the
    catalogue, a state, a reason), never a client's text, so the number of series is bounded.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=_ROOT, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace=_ROOT, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, namespace=_ROOT, registry=registry, buckets=buckets)

        self.calls = CallCounts()
        registry.register(self.calls)
        self.queue_calls = gauge("queue_calls", "Calls waiting for a slot.", "model")
        self.queue_refused_total = counter("queue_refused_total", "Calls refused for capacity.", "model", "reason")
        self.outstanding_calls = gauge("outstanding_calls", "Calls an engine is answering.", "model")
        self.replicas = gauge("replicas", "Replicas, by state.", "model", "state")
        self.replica_starts_total = counter("replica_starts_total", "Replicas started.", "model")
        self.replica_failures_total = counter("replica_failures_total", "Replicas that failed.", "model")
        self.device_memory_bytes_used = gauge("device_memory_bytes_used", "Memory of a device in use.", "device")
        self.device_memory_bytes_total = gauge("device_memory_bytes_total", "Memory of a device.", "device")
        self.device_utilisation = gauge("device_utilisation", "Share of time a device computes, 0 to 1.", "device")
        self.device_temperature_c = gauge("device_temperature_c", "Degrees Celsius of a device.", "device")
        self.device_power_w = gauge("device_power_w", "Watts a device draws.", "device")
        self.loop_restarts_total = counter("loop_restarts_total", "Restarts of a supervised loop.", "loop")
        self.commits_total = counter("commits_total", "Transactions committed.")
        self.commit_seconds = histogram("commit_seconds", "Seconds of one commit.", _COMMIT_SECONDS)
        self.journal_entries_total = counter("journal_entries_total", "Entries appended to the journal.")
        self.usage_dropped_total = counter(
            "usage_dropped_total", "Usage rows dropped because the database refused them."
        )
        self.http_refused_total = counter("http_refused_total", "Requests refused before a call.", "reason")

    def render(self) -> bytes:
        """Prometheus' text format, version 0.0.4."""
        return generate_latest(self.registry)


class CallCounts(Collector):
    """The metrics that every call adds to. Kept as plain numbers, because they are on the hot path: adding a call takes
    a microsecond, and Prometheus sees them when it asks. One thread only."""

    def __init__(self) -> None:
        self._ended: dict[tuple[str, str], int] = {}
        self._tokens: dict[tuple[str, str], int] = {}
        self._seconds: dict[str, _Durations] = {}
        self._ttft: dict[str, _Durations] = {}

    def add(
        self,
        model: str,
        status: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        seconds: float,
        ttft_s: float | None,
    ) -> None:
        """Count a call that ended, ``seconds`` after its admission."""
        key = (model, status)
        self._ended[key] = self._ended.get(key, 0) + 1
        durations = self._seconds.get(model)
        if durations is None:
            durations = self._seconds[model] = _Durations()
            self._ttft[model] = _Durations()
            self._tokens[model, "prompt"] = self._tokens[model, "completion"] = 0
        durations.add(seconds)
        if ttft_s is not None:
            self._ttft[model].add(ttft_s)
        self._tokens[model, "prompt"] += prompt_tokens
        self._tokens[model, "completion"] += completion_tokens

    def collect(self) -> Iterator[Metric]:
        """What Prometheus asks for."""
        ended = CounterMetricFamily(f"{_ROOT}_calls", "Calls that ended, by outcome.", labels=("model", "status"))
        for labels, count in self._ended.items():
            ended.add_metric(labels, count)
        tokens = CounterMetricFamily(f"{_ROOT}_tokens", "Tokens: prompt or completion.", labels=("model", "kind"))
        for labels, count in self._tokens.items():
            tokens.add_metric(labels, count)
        yield from (ended, tokens)
        for name, text, by_model in (
            ("call_seconds", "Seconds from admission to the last token.", self._seconds),
            ("ttft_seconds", "Seconds from admission to the first token.", self._ttft),
        ):
            family = HistogramMetricFamily(f"{_ROOT}_{name}", text, labels=("model",))
            for model, durations in by_model.items():
                family.add_metric((model,), durations.cumulated(), durations.sum_s)
            yield family


class _Durations:
    """A histogram of seconds over the buckets of _SECONDS and one without end."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum_s += seconds

    def cumulated(self) -> list[tuple[str, float]]:
        bounds = (*map(floatToGoString, _SECONDS), "+Inf")
        return list(zip(bounds, accumulate(self.counts), strict=True))


# Spans


class Span(Protocol):
    """Something that takes time and has attributes."""

    def set_attribute(self, key: str, value: str | bool | int | float) -> None: ...


class _NoSpan:
    __slots__ = ()

    def set_attribute(self, key: str, value: str | bool | int | float) -> None:
        return None


_NO_SPAN: AbstractContextManager[Span] = nullcontext(_NoSpan())


class Spans:
    """Opens spans, nested as the code is. Without an endpoint it opens one shared nothing and imports nothing."""

    def __init__(self, settings: TelemetrySettings) -> None:
        self._provider: TracerProvider | None = _provider(settings) if settings.otlp_endpoint else None
        self._tracer = self._provider.get_tracer(_ROOT) if self._provider else None

    def span(self, name: str, **attributes: str | bool | int | float) -> AbstractContextManager[Span]:
        """A span for the time inside ``with``; an exception is recorded on it and passes through."""
        return _NO_SPAN if self._tracer is None else self._open(name, attributes)

    @contextmanager
    def _open(self, name: str, attributes: Mapping[str, str | bool | int | float]) -> Iterator[Span]:
        assert self._tracer is not None
        with self._tracer.start_as_current_span(name, attributes=attributes) as span:
            yield span

    def close(self) -> None:
        """Send what is left and stop the exporter's thread. Blocks for seconds when the collector is away."""
        if self._provider is not None:
            self._provider.shutdown()


def _provider(settings: TelemetrySettings) -> "TracerProvider":
    # OpenTelemetry costs some 20 MB and a third of a second: paid only by those who ask for it.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": settings.service_name}))
    endpoint = settings.otlp_endpoint.rstrip("/")
    address = endpoint if endpoint.endswith("/v1/traces") else f"{endpoint}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address, timeout=5)))
    return provider

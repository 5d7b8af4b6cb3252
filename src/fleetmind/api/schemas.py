"""What goes over the wire below ``/api``: the shapes that the OpenAPI document shows.

Sizes are bytes, times seconds since 1970 unless the name says otherwise; null means not known, never zero.
"""

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ModelState = Literal["ready", "loading", "failed", "unplaced"]


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, value: object) -> object:
        """Half of a surrogate pair, which JSON can write as an escape, is no text: it can't be stored or shown."""
        if isinstance(value, dict):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError("there is half of a surrogate pair in a text") from None
        return value


class ProcessOut(BaseModel):
    """Who holds memory of a device."""

    pid: int
    name: str
    memory_bytes: int
    is_ours: bool


class DeviceOut(BaseModel):
    """A device and its last reading, ``reading_age_s`` old. ``utilisation`` is a share from 0 to 1."""

    id: str
    kind: str
    name: str
    is_simulated: bool
    memory_bytes_total: int
    memory_bytes_used: int | None
    memory_bytes_granted: int
    utilisation: float | None
    temperature_c: float | None
    power_w: float | None
    fault: str | None
    reading_age_s: float | None
    processes: list[ProcessOut]


class ModelOut(BaseModel):
    """A model of the catalogue, and whether it is served."""

    name: str
    source: str
    engine: str
    state: ModelState
    reason: str
    context_tokens: int
    slots: int
    replicas_wanted: int
    replicas_ready: int
    path: str | None
    url: str | None
    weights_bytes: int | None
    quantisation: str | None
    abilities: list[str]
    is_simulated: bool


class ReplicaOut(BaseModel):
    """A replica as it was last seen."""

    id: str
    model: str
    state: str
    devices: list[str]
    memory_bytes: int
    slots: int
    context_tokens: int
    pid: int | None
    url: str | None
    reason: str
    created_at_s: float
    ready_at_s: float | None
    outstanding: int
    is_simulated: bool


class LoopOut(BaseModel):
    """A supervised loop of the server."""

    name: str
    state: str
    restarts: int
    last_error: str | None


class CallsOut(BaseModel):
    """Calls being answered, and calls waiting for a slot."""

    outstanding: int
    queued: int


class StatusOut(BaseModel):
    """Everything at one moment."""

    version: str
    url: str
    pid: int
    started_at_s: float
    uptime_s: float
    ready: bool
    is_simulated: bool
    devices: list[DeviceOut]
    models: list[ModelOut]
    replicas: list[ReplicaOut]
    loops: list[LoopOut]
    calls: CallsOut


class DevicesOut(BaseModel):
    """All devices."""

    devices: list[DeviceOut]


class ModelsOut(BaseModel):
    """The catalogue."""

    models: list[ModelOut]


class ReplicasOut(BaseModel):
    """All replicas."""

    replicas: list[ReplicaOut]


class ModelIn(_In):
    """A model to add. ``file`` needs path, ``remote`` url and name, ``fake`` name; ``packaged`` nothing.

    ``key_env`` names the environment variable of this server that holds the remote one's key. ``context_tokens`` is per
    slot. ``options`` of a file are ``embedding`` (true: it makes vectors and nothing else) and ``pooling``; of a fake
    one its knobs.
    """

    source: Literal["file", "remote", "fake", "packaged"]
    name: str | None = None
    path: str | None = None
    url: str | None = None
    remote_model: str | None = None
    key_env: str | None = None
    context_tokens: int | None = Field(default=None, ge=64, le=16 * 1024**2)
    slots: int | None = Field(default=None, ge=1, le=4096)
    replicas: int = Field(default=1, ge=0, le=64)
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)


class LinesOut(BaseModel):
    """The last lines of a log, oldest first."""

    lines: list[str]


class RefusalOut(BaseModel):
    """Why a model is not on a device; no device means on none at all."""

    model: str
    device: str | None
    code: str
    message: str
    memory_bytes_needed: int
    memory_bytes_free: int


class StartOut(BaseModel):
    """A replica that the plan starts, and why there."""

    model: str
    devices: list[str]
    memory_bytes: int
    reason: str


class StopOut(BaseModel):
    """A replica that the plan stops, and why."""

    replica: str
    reason: str


class PlacementOut(BaseModel):
    """The last placement plan."""

    at_s: float
    starts: list[StartOut]
    stops: list[StopOut]
    refusals: list[RefusalOut]


class FitIn(_In):
    """A model file to be judged before it is loaded."""

    path: str
    context_tokens: int = Field(default=4096, ge=64, le=16 * 1024**2)
    slots: int = Field(default=4, ge=1, le=4096)


class FootprintOut(BaseModel):
    """Memory a model needs, by what needs it."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    total_bytes: int


class DeviceFitOut(BaseModel):
    """Whether the model fits on a device."""

    id: str
    name: str
    is_simulated: bool
    fits: bool
    memory_bytes_needed: int
    memory_bytes_free: int
    context_tokens_max: int
    reason: str


class FitModelOut(BaseModel):
    """What the file's header says."""

    architecture: str
    quantisation: str
    parameters: int
    layers: int
    context_length_trained: int


class FitOut(BaseModel):
    """Whether a model fits, device by device, and what it needs."""

    model: FitModelOut
    footprint: FootprintOut
    devices: list[DeviceFitOut]


class KeyOut(BaseModel):
    """A key without its text. No ``models`` means all."""

    id: str
    name: str
    scopes: list[str]
    models: list[str]
    created_at_s: float
    expires_at_s: float | None
    revoked_at_s: float | None
    last_used_at_s: float | None


class KeysOut(BaseModel):
    """All keys."""

    keys: list[KeyOut]


class KeyIn(_In):
    """A key to make."""

    name: str
    scopes: list[Literal["infer", "read", "metrics", "admin"]] = Field(default_factory=lambda: ["infer"])  # type: ignore[arg-type]
    models: list[str] = Field(default_factory=list, max_length=1000)
    expires_in_s: float | None = Field(default=None, gt=0, le=100 * 366 * 86400, strict=False)


class NewKeyOut(KeyOut):
    """A key with its text, which is shown this once."""

    key: str


class ValueOut(BaseModel):
    """A setting and where its value came from."""

    name: str
    value: object
    default: object
    unit: str
    help: str
    source: str
    where: str


class ConfigOut(BaseModel):
    """Every setting."""

    values: list[ValueOut]


class EntryOut(BaseModel):
    """An entry of the journal; ``hash`` covers it and everything before it."""

    position: int
    kind: str
    subject: str
    at_s: float
    data: dict[str, object]
    hash: str


class JournalOut(BaseModel):
    """A page of the journal, oldest first."""

    entries: list[EntryOut]


class UsageRowOut(BaseModel):
    """What a key used of a model."""

    model: str
    key_id: str
    calls: int
    is_simulated: bool
    prompt_tokens: int
    completion_tokens: int


class UsageOut(BaseModel):
    """What was used since a time."""

    since_s: float
    rows: list[UsageRowOut]


class CheckOut(BaseModel):
    """One thing the doctor looked at."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str


class DoctorOut(BaseModel):
    """All checks, worst first."""

    checks: list[CheckOut]


class HealthOut(BaseModel):
    """The server runs."""

    status: Literal["ok"]
    version: str


class ReadyOut(BaseModel):
    """Whether every wanted model is served, and if not which one isn't."""

    ready: bool
    reason: str

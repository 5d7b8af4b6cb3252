"""The one configuration: its values, and where each came from.

Reads the leaves of ``core/settings.py`` from ``fleetmind.toml``, the environment and
flags, each over the one before. It never reads the process's environment by itself and changes nothing on disk.
Invariant: a value that is in ``Settings`` was accepted by its leaf; an unknown name or a malformed value is refused
even where something stronger overrides it, because a setting that is silently ignored is the hardest fault to find.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from fleetmind.core.errors import ConfigurationError
from fleetmind.core.home import home_from
from fleetmind.core.settings import (
    FleetSettings,
    GatewaySettings,
    LogsSettings,
    ModelsSettings,
    NodeSettings,
    Section,
    ServerSettings,
    Settings,
    StoreSettings,
    TelemetrySettings,
)
from fleetmind.core.types import MIB, parse_bytes, parse_tokens

__all__ = [
    "Configuration",
    "FleetSettings",
    "GatewaySettings",
    "Leaf",
    "LogsSettings",
    "ModelsSettings",
    "NodeSettings",
    "Origin",
    "ServerSettings",
    "Settings",
    "Source",
    "StoreSettings",
    "TelemetrySettings",
    "example",
    "home_from",
    "leaves",
    "load",
    "mask",
]

FILE_NAME = "fleetmind.toml"
ENVIRONMENT_PREFIX = "FLEETMIND_"
ENVIRONMENT_RESERVED = frozenset({"FLEETMIND_HOME"})
FILE_BYTES_MAX = MIB
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Source(StrEnum):
    """Where a value came from, weakest first."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"


@dataclass(frozen=True, slots=True)
class Origin:
    """``where`` is for a person: ``/home/me/fleetmind.toml:12``, the variable's name, or ``--set``."""

    source: Source
    where: str = ""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One setting. ``type`` and ``accepts`` are words for a person; ``default`` is None, a scalar or a tuple."""

    name: str
    type: str
    default: object
    unit: str
    help: str
    accepts: str
    variable: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """Settings, and for every leaf its origin. ``home`` is where state lives."""

    home: Path
    settings: Settings
    origins: Mapping[str, Origin]

    def value(self, name: str) -> object:
        """The value of the leaf ``section.name``."""
        section, _, key = name.partition(".")
        return getattr(getattr(self.settings, section), key)

    def show(self) -> tuple[dict[str, object], ...]:
        """Every leaf as ``config show`` prints it, passwords masked."""
        return tuple(
            {
                "name": leaf.name,
                "value": _shown(self.value(leaf.name)),
                "default": _shown(leaf.default),
                "unit": leaf.unit,
                "help": leaf.help,
                "source": self.origins[leaf.name].source.value,
                "where": self.origins[leaf.name].where,
            }
            for leaf in leaves()
        )


def load(home: Path, *, environ: Mapping[str, str], flags: Mapping[str, str]) -> Configuration:
    """Read the configuration: defaults, then the home's file, then ``FLEETMIND_*``, then flags (``section.name``).

    Raises ConfigurationError for an unknown name (with the nearest valid one) and for a value that can't be used
    (with the name, what was given, from where, and what is accepted).
    """
    values: dict[str, object] = {}
    origins = dict.fromkeys(_fields(), Origin(Source.DEFAULT))
    for name, value, origin in (
        *_from_file(home / FILE_NAME),
        *_from_environment(environ),
        *_from_flags(flags),
    ):
        values[name] = _accept(name, value, origin)
        origins[name] = origin
    tree: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    settings = Settings.model_validate(tree)
    _check_pairs(settings, origins)
    return Configuration(home, settings, origins)


@cache
def leaves() -> tuple[Leaf, ...]:
    """Every leaf, in the order of the tree."""
    return tuple(_describe(name, field) for name, field in _fields().items())


def example() -> str:
    """An example ``fleetmind.toml``: every leaf with its help, commented out at its default."""
    lines = [
        "# Fleetmind's configuration. Every value below is the default; take away the # to change one.",
        f"# Stronger: the environment ({ENVIRONMENT_PREFIX}SECTION_NAME), then --set section.name=value.",
    ]
    section = ""
    for leaf in leaves():
        of, _, key = leaf.name.partition(".")
        if of != section:
            section = of
            lines += ["", f"[{section}]"]
        unit = f" Unit: {leaf.unit}." if leaf.unit else ""
        lines += [f"# {leaf.help}{unit} Accepts {leaf.accepts}.", f"# {key} = {_toml(leaf.default)}"]
    return "\n".join(lines) + "\n"


def mask(text: str) -> str:
    """``text`` with the passwords of addresses in it hidden."""
    text = re.sub(r"(://[^:/@\s]*):[^\s\"']*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|token|key)=)[^&\s\"']+", r"\1***", text)


# Reading the sources


def _from_file(path: Path) -> Iterator[tuple[str, object, Origin]]:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigurationError(f"{path} is larger than {FILE_BYTES_MAX} bytes", hint="Is it the right file?")
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigurationError(
            f"{path} can't be read: {error.strerror}", hint="Check its owner and its mode."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}", hint="Correct it, or move it away.") from error
    lines = _lines(text)
    for section, table in tables.items():
        if section not in Settings.model_fields:
            raise _unknown("section", section, _place(path, lines, section), Settings.model_fields)
        if not isinstance(table, dict):
            place = _place(path, lines, section)
            raise ConfigurationError(f"{section} from {place} must be a table: [{section}]", param=section)
        for key, value in table.items():
            name = f"{section}.{key}"
            place = _place(path, lines, name)
            if name not in _fields():
                raise _unknown("setting", name, place, _fields())
            yield name, value, Origin(Source.FILE, place)


def _lines(text: str) -> dict[str, int]:
    """Where each name stands; a guess by pattern, good enough to point a person to it."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            section = header[1]
            found.setdefault(section, number)
        elif key := re.match(r"\s*([\w-]+)(?:\s*\.\s*([\w-]+))?\s*=", line):
            found.setdefault(".".join(part for part in (section, key[1], key[2]) if part), number)
            found.setdefault(key[1], number)
    return found


def _place(path: Path, lines: Mapping[str, int], name: str) -> str:
    return f"{path}:{lines[name]}" if name in lines else str(path)


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, object, Origin]]:
    by_variable = {_variable(name): name for name in _fields()}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in ENVIRONMENT_RESERVED:
            continue
        if variable not in by_variable:
            raise _unknown("variable", variable, "the environment", (*by_variable, *ENVIRONMENT_RESERVED))
        name = by_variable[variable]
        origin = Origin(Source.ENVIRONMENT, variable)
        yield name, _from_text(name, environ[variable], origin), origin


def _from_flags(flags: Mapping[str, str]) -> Iterator[tuple[str, object, Origin]]:
    for name, text in flags.items():
        if name not in _fields():
            raise _unknown("setting", name, "the command line", _fields())
        origin = Origin(Source.FLAG, f"--set {name}")
        yield name, _from_text(name, text, origin), origin


def _unknown(what: str, given: str, where: str, valid: Iterable[str]) -> ConfigurationError:
    names = list(valid)
    # The right name in the wrong section is common, and far away for difflib; a prefix all share makes all near.
    near = [name for name in names if name.rpartition(".")[2] == given.rpartition(".")[2]]
    if not near:
        bare = {name.removeprefix(ENVIRONMENT_PREFIX): name for name in names}
        near = [bare[one] for one in difflib.get_close_matches(given.removeprefix(ENVIRONMENT_PREFIX), bare, n=1)]
    hint = f"Did you mean {near[0]}?" if near else "See `fleetmind config show` for every name."
    return ConfigurationError(f"unknown {what} {given!r} in {where}", hint=hint, param=given)


# Values


def _from_text(name: str, text: str, origin: Origin) -> object:
    """What ``text`` means for this leaf. Only here do words become values; the file has types of its own."""
    kind = _fields()[name].annotation
    text = text.strip()
    try:
        if kind is bool:
            return _BOOLEANS[text.lower()]
        if kind is int:
            return _whole(name, text)
        if kind is float:
            return float(text)
        if get_origin(kind) is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
    except (ValueError, KeyError) as error:
        raise _refused(name, text, origin) from error
    return text


def _whole(name: str, text: str) -> int:
    key = name.rpartition(".")[2]
    if "bytes" in key.split("_"):
        return parse_bytes(text)
    if "tokens" in key.split("_"):
        return parse_tokens(text)
    if not re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        raise ValueError(text)
    return int(text)


def _accept(name: str, value: object, origin: Origin) -> object:
    """``value`` as this leaf keeps it, or ConfigurationError."""
    field = _fields()[name]
    kind = field.annotation
    try:
        if kind is int and isinstance(value, str):
            value = _whole(name, value) if {"bytes", "tokens"} & set(re.split(r"[._]", name)) else value
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif get_origin(kind) is tuple and isinstance(value, list):
            value = tuple(value)
        return _adapter(name).validate_python(value, strict=True)
    except (ValidationError, ValueError, OverflowError) as error:
        # Not chained: the cause would print the value, which may hold a password.
        raise _refused(name, value, origin) from (None if isinstance(error, ValidationError) else error)


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    field = _fields()[name]
    form: Any = Annotated[field.annotation, field]
    return TypeAdapter(form, config=ConfigDict(allow_inf_nan=False))


def _refused(name: str, value: object, origin: Origin) -> ConfigurationError:
    leaf = next(leaf for leaf in leaves() if leaf.name == name)
    # An address that isn't understood can't be masked reliably: show no more than its scheme.
    given = f"{str(value).partition(':')[0]}:***" if leaf.name == "store.url" else mask(repr(value))
    if len(given) > 200:
        given = given[:200] + "…"
    return ConfigurationError(
        f"{name} can't be {given} (from {origin.where}); it accepts {leaf.accepts}",
        hint=f"Correct {origin.where}." if origin.source is not Source.FLAG else f"Give --set {name}=VALUE anew.",
        param=name,
    )


def _check_pairs(settings: Settings, origins: Mapping[str, Origin]) -> None:
    server, fleet = settings.server, settings.fleet
    if bool(server.tls_certificate) != bool(server.tls_key):
        given, missing = ("certificate", "key") if server.tls_certificate else ("key", "certificate")
        raise ConfigurationError(
            f"server.tls_{given} (from {origins[f'server.tls_{given}'].where}) needs server.tls_{missing}",
            hint=f"Set server.tls_{missing} too, or neither.",
            param=f"server.tls_{missing}",
        )
    if fleet.restart_backoff_s > fleet.restart_backoff_s_max:
        raise ConfigurationError(
            f"fleet.restart_backoff_s ({fleet.restart_backoff_s}) is larger than"
            f" fleet.restart_backoff_s_max ({fleet.restart_backoff_s_max})",
            hint="Set the first pause to at most the longest one.",
            param="fleet.restart_backoff_s",
        )


# The leaves, from the models


@cache
def _fields() -> Mapping[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for section, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        found |= {f"{section}.{key}": leaf for key, leaf in field.annotation.model_fields.items()}
    return found


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.replace(".", "_").upper()


def _describe(name: str, field: FieldInfo) -> Leaf:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    assert field.description
    kind, accepts = _words(name, field)
    return Leaf(
        name=name,
        type=kind,
        default=field.default,
        unit=str(extra["unit"]),
        help=field.description,
        accepts=str(extra["accepts"]) or accepts,
        variable=_variable(name),
    )


def _words(name: str, field: FieldInfo) -> tuple[str, str]:
    kind = field.annotation
    if kind is bool:
        return "yes or no", "true or false"
    if kind in (int, float):
        words = "whole number" if kind is int else "number"
        if "bytes" in name:
            words = "size"
        return words, f"a {words}{_range(field)}{', such as 32MiB' if words == 'size' else ''}"
    if get_origin(kind) is tuple:
        return "list", "a list of texts (in the environment separated by commas)"
    if get_origin(kind) is Literal:
        return "choice", " or ".join(str(choice) for choice in get_args(kind))
    return "text", "text that isn't empty" if field.metadata else "text"


def _range(field: FieldInfo) -> str:
    low = high = ""
    for bound in field.metadata:
        if (least := getattr(bound, "ge", None)) is not None:
            low = f" from {least}"
        elif (above := getattr(bound, "gt", None)) is not None:
            low = f" above {above}"
        elif (most := getattr(bound, "le", None)) is not None:
            high = f" to {most}" if low.startswith(" from") else f" up to {most}"
    return low + high


def _shown(value: object) -> object:
    if isinstance(value, str):
        return mask(value)
    return [_shown(one) for one in value] if isinstance(value, tuple) else value


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    assert not isinstance(value, float) or math.isfinite(value)
    return json.dumps(value)

"""Ids and units that every package shares.

Pure: no clock, chance, files, network, log or loop. Ids are distinct types so that a device is never passed for a
model; sizes are whole bytes and times are seconds, and say so at the end of their names.
"""

import re
from typing import NewType

CallId = NewType("CallId", str)
DeviceId = NewType("DeviceId", str)
KeyId = NewType("KeyId", str)
ModelName = NewType("ModelName", str)
ReplicaId = NewType("ReplicaId", str)

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 1000,
    "m": MIB,
    "mib": MIB,
    "mb": 1000**2,
    "g": GIB,
    "gib": GIB,
    "gb": 1000**3,
    "t": 1024 * GIB,
    "tib": 1024 * GIB,
    "tb": 1000**4,
}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes from ``"24 GiB"``, ``"512m"`` or ``"1000"``; bare letters are binary (``g`` is GiB), ``gb`` is decimal.

    Raises ValueError, whose text says what is accepted.
    """
    match = _QUANTITY.fullmatch(text)
    unit = match[2].lower() if match else None
    if match is None or unit not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 512MiB, 24GiB or 1000000")
    return int(float(match[1]) * _BYTE_UNITS[unit])


def parse_tokens(text: str) -> int:
    """Tokens from ``"8k"`` (8192), ``"32K"`` or ``"4096"``.

    Raises ValueError, whose text says what is accepted.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*", text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{text!r} is not a number of tokens; write for example 4096 or 8k")
    return int(match[1]) * (1024 if match[2] else 1)


def format_bytes(size_bytes: float) -> str:
    """A size for a person: ``"92.0 MiB"``, ``"1.5 GiB"``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes:.0f} B"

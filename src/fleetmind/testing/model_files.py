"""Writes small GGUF files, honest ones and liars, for tests.

Pure: gives bytes. It checks nothing, so that every field can be made wrong; the weights are zeros.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
_FORMS = {UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?"} | {
    UINT64: "Q",
    INT64: "q",
    FLOAT64: "d",
}
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
_SIZES = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34)}


@dataclass(frozen=True)
class Typed:
    """A value with its GGUF type; of an array the element type and, to lie, another count than it has."""

    kind: int
    value: object
    element: int = UINT32
    count: int | None = None


@dataclass(frozen=True)
class Tensor:
    """A tensor info; without an offset it gets the right one."""

    name: str
    dimensions: tuple[int, ...] = (32, 4)
    kind: int = F32
    offset: int | None = None


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A GGUF string, with another length than it has when told to lie."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def value_bytes(typed: Typed) -> bytes:
    """The bytes of a value, without its type."""
    if typed.kind == STRING:
        assert isinstance(typed.value, str | bytes)
        return text(typed.value)
    if typed.kind == ARRAY:
        assert isinstance(typed.value, list | tuple)
        count = len(typed.value) if typed.count is None else typed.count
        items = b"".join(value_bytes(Typed(typed.element, item)) for item in typed.value)
        return struct.pack("<IQ", typed.element, count) + items
    return struct.pack("<" + _FORMS[typed.kind], typed.value)


def typed(value: object) -> Typed:
    """The usual type for a Python value."""
    if isinstance(value, Typed):
        return value
    if isinstance(value, bool):
        return Typed(BOOL, value)
    if isinstance(value, int):
        return Typed(UINT32, value)
    if isinstance(value, float):
        return Typed(FLOAT32, value)
    if isinstance(value, str | bytes):
        return Typed(STRING, value)
    assert isinstance(value, list | tuple)
    return Typed(ARRAY, value, element=STRING if value and isinstance(value[0], str) else INT32)


def gguf(
    metadata: Mapping[str, object] | Iterable[tuple[str, object]],
    tensors: Iterable[Tensor] = (Tensor("token_embd.weight"),),
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    alignment: int = 32,
    keys: int | None = None,
    tensor_count: int | None = None,
    missing_bytes: int = 0,
) -> bytes:
    """A whole file. ``keys`` and ``tensor_count`` lie about the counts; ``missing_bytes`` are cut off the end."""
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    infos = list(tensors)
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if tensor_count is None else tensor_count,
        len(pairs) if keys is None else keys,
    )
    for key, value in pairs:
        head += text(key) + struct.pack("<I", typed(value).kind) + value_bytes(typed(value))
    end = 0
    for info in infos:
        offset = -(-end // alignment) * alignment if info.offset is None else info.offset
        head += text(info.name) + struct.pack("<I", len(info.dimensions))
        head += struct.pack(f"<{len(info.dimensions)}Q", *info.dimensions) + struct.pack("<IQ", info.kind, offset)
        elements = 1
        for length in info.dimensions:
            elements *= length
        block, size = _SIZES.get(info.kind, (1, 4))
        end = offset + elements // block * size if elements < 2**24 and offset < 2**24 else end
    whole = head + b"\0" * (-len(head) % alignment) + b"\0" * end
    return whole[: len(whole) - missing_bytes]


def llama(**changes: object) -> dict[str, object]:
    """Metadata of a tiny llama: 2 layers, 4 heads of 16, 2 for keys and values. Dots are written as double underscores.

    A change to None leaves a key out.
    """
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.file_type": 0,
        "llama.block_count": 2,
        "llama.context_length": 2048,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "tokenizer.ggml.tokens": ["<s>", "a", "b", "ü"],
        "tokenizer.chat_template": "{{ messages }}",
    }
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            metadata.pop(key, None)
        else:
            metadata[key] = value
    return metadata


def tiny_model() -> bytes:
    """A small honest file."""
    tensors = (
        Tensor("token_embd.weight", (64, 4), F16),
        Tensor("blk.0.attn_q.weight", (64, 64), Q8_0),
        Tensor("output_norm.weight", (64,), F32),
    )
    return gguf(llama(), tensors)

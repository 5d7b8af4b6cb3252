"""Reads the header of a GGUF file, believing nothing.

A model file comes from anywhere, and headers that lie about sizes have broken engines before (CVE-2026-7482). So every
length and count is held against a named limit and against the bytes that are really there *before* it is used; nothing
is allocated by a number from the file; long arrays (a tokenizer has 50 000 strings) are walked, never built. It reads
one file and decides nothing. The invariant: whatever the file, the answer is a GgufHeader or an InvalidModelFile, in
bounded time and a few megabytes.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fleetmind.core.errors import InvalidModelFile
from fleetmind.core.types import KIB, MIB, format_bytes
from fleetmind.fleet.ggml import EMBEDDING_ARCHITECTURES, FILE_TYPES, TENSOR_TYPES
from fleetmind.fleet.shape import Scalar, Value, shape_of
from fleetmind.fleet.snapshot import ModelShape

HEADER_BYTES_MAX = 64 * MIB
KEYS_MAX = 2048
KEY_BYTES_MAX = 256
TENSORS_MAX = 16384
TENSOR_NAME_BYTES_MAX = 127
DIMENSIONS_MAX = 4
STRINGS_MAX = 2 * 1024 * 1024
"""Strings in all arrays together. The largest vocabularies have 262 144 tokens and as many merges."""
KEPT_STRING_BYTES_MAX = 4 * KIB
KEPT_ITEMS_MAX = 1024
KEPT_BYTES_MAX = MIB
ALIGNMENT_MAX = 64 * KIB
CHUNK_BYTES = 256 * KIB

_KEPT_ARRAYS = (".head_count", ".head_count_kv", ".feed_forward_length", ".sliding_window_pattern")
_KEY_BYTES_MIN = 8 + 4 + 1
_TENSOR_BYTES_MIN = 8 + 4 + 8 + 4 + 8

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Mapping[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}

_PARTS = {"mmproj": "a vision projector", "adapter": "an adapter (LoRA)", "imatrix": "an importance matrix"}
_FOREIGN = (
    (b"\x1f\x8b", "gzip", "a gzip archive; unpack it first"),
    (b"PK\x03\x04", "zip", "a zip archive; unpack it first"),
    (b"PK\x05\x06", "zip", "an empty zip archive"),
    (b"\x28\xb5\x2f\xfd", "zstd", "a zstd archive; unpack it first"),
    (b"\xfd7zXZ\x00", "xz", "an xz archive; unpack it first"),
    (b"BZh", "bzip2", "a bzip2 archive; unpack it first"),
    (b"version https://git-lfs", "git-lfs-pointer", "a Git LFS pointer, not the model; run git lfs pull"),
    (b"tjgg", "ggml-old", "an old GGJT file; convert it to GGUF"),
    (b"lmgg", "ggml-old", "an old GGML file; convert it to GGUF"),
    (b"fmgg", "ggml-old", "an old GGMF file; convert it to GGUF"),
    (b"\x80\x02", "pickle", "a Python pickle, which can run code; get the GGUF file"),
    (b"\x80\x03", "pickle", "a Python pickle, which can run code; get the GGUF file"),
    (b"\x80\x04", "pickle", "a Python pickle, which can run code; get the GGUF file"),
    (b"<!DOCTYPE", "html", "a web page, not a model; the download failed"),
    (b"<html", "html", "a web page, not a model; the download failed"),
)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself.

    ``metadata`` holds its scalar values, short texts and the few arrays that the shape needs. ``header_bytes`` is where
    the weights begin, ``file_bytes`` the file's size. ``gives_embeddings`` means vectors come out, not text.
    """

    version: int
    tensors: int
    header_bytes: int
    file_bytes: int
    name: str
    shape: ModelShape
    gives_embeddings: bool
    metadata: Mapping[str, Value]


def read_header(path: Path | str) -> GgufHeader:
    """The header of the GGUF file at ``path``. Blocking, some 30 ms for a vocabulary of 50 000; use a thread.

    Raises InvalidModelFile; ``fault`` is one of

    - of the file: ``missing``, ``unreadable``, ``not-a-file`` (directory, pipe, device, socket), ``empty-file``
    - of another format: ``gzip``, ``zip``, ``zstd``, ``xz``, ``bzip2``, ``safetensors``, ``pickle``, ``html``,
      ``git-lfs-pointer``, ``ggml-old``, ``bad-magic``
    - of the header: ``bad-version``, ``big-endian``, ``truncated`` (the file ends inside the header), ``lying-count``
      and ``lying-length`` (a number larger than the bytes that follow could hold), ``too-many-keys``,
      ``too-many-tensors``, ``too-many-strings``, ``too-much-metadata``, ``header-too-large``, ``key-too-long``,
      ``name-too-long``, ``duplicate-key``, ``duplicate-tensor``, ``unknown-type``, ``nested-array``, ``invalid-utf8``,
      ``bad-alignment``
    - of the tensors: ``bad-dimensions``, ``overflow``, ``unknown-tensor-type``, ``misplaced-tensor``,
      ``truncated-weights`` (the file ends before its last tensor does), ``no-tensors``
    - of what it describes: ``missing-key``, ``wrong-type``, ``absurd-value``, ``split-file``, ``not-a-language-model``
    """
    descriptor = _open(path)
    try:
        size_bytes = os.fstat(descriptor).st_size
        return _Parser(_Reader(descriptor, size_bytes)).parse()
    finally:
        os.close(descriptor)


def _open(path: Path | str) -> int:
    """A descriptor of a regular file with something in it. Never waits: a pipe without a writer would hang forever."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise InvalidModelFile("not-a-file", f"{path} is {_kind(mode)}", hint="give the path of a .gguf file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise InvalidModelFile("missing", f"there is no file {path}", hint="check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InvalidModelFile("unreadable", f"can't open {str(path)!r}: {error}") from error
    status = os.fstat(descriptor)  # once more, on what was opened: the name may point elsewhere by now
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return descriptor
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModelFile("not-a-file", f"{path} is {_kind(status.st_mode)}")
    raise InvalidModelFile("empty-file", f"{path} has no content", hint="download it again")


def _kind(mode: int) -> str:
    names = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return names.get(stat.S_IFMT(mode), "not a regular file")


class _Reader:
    """A window that moves forward over the file. Every read names what it is for, so that a fault can say so."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.at = 0
        self._descriptor = descriptor
        self._window = b""
        self._window_at = 0

    @property
    def remaining(self) -> int:
        return self.size_bytes - self.at

    def take(self, length: int, what: str) -> bytes:
        """The next ``length`` bytes; callers bound it."""
        start = self._within(length, what)
        self.at += length
        return self._window[start : start + length]

    def skip(self, length: int, what: str) -> None:
        """Go past ``length`` bytes without reading them."""
        self._check(self.at + length, what)
        self.at += length

    def u32(self, what: str) -> int:
        value: int = _U32.unpack(self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack(self.take(8, what))[0]
        return value

    def skip_strings(self, count: int, what: str) -> None:
        """Go past ``count`` strings. The one hot loop here: some 200 ns a string, none of them built."""
        unpack = _U64.unpack_from
        window, origin, at, end = self._window, self._window_at, self.at - self._window_at, len(self._window)
        for _ in range(count):
            if end - at < 8:
                self.at = origin + at
                self._within(8, what)
                window, origin, at, end = self._window, self._window_at, self.at - self._window_at, len(self._window)
            at += 8 + unpack(window, at)[0]
            if at > end:
                self._check(origin + at, what)
        self.at = origin + at

    def _within(self, length: int, what: str) -> int:
        """Make the next ``length`` bytes part of the window; their place in it."""
        self._check(self.at + length, what)
        start = self.at - self._window_at
        if start < 0 or start + length > len(self._window):
            self._window = os.pread(self._descriptor, max(length, CHUNK_BYTES), self.at)
            self._window_at, start = self.at, 0
            if len(self._window) < length:  # it shrank while we read
                raise InvalidModelFile("truncated", f"the file ends inside {what}", hint="download it again")
        return start

    def _check(self, until: int, what: str) -> None:
        if until > self.size_bytes:
            raise InvalidModelFile("truncated", f"the file ends inside {what}", hint="download it again")
        if until > HEADER_BYTES_MAX:
            raise InvalidModelFile("header-too-large", f"{what} lies past {format_bytes(HEADER_BYTES_MAX)} of header")


class _Parser:
    """One pass over the header, in the order of the file."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._metadata: dict[str, Value] = {}
        self._lengths: dict[str, int] = {}
        """How long the arrays and texts are that weren't kept."""
        self._strings = 0
        self._kept_bytes = 0
        self._tensor_types: dict[str, int] = {}
        """Bytes of weights per type of tensor."""
        self._parameters = 0

    def parse(self) -> GgufHeader:
        reader = self._reader
        version = self._preamble()
        tensors = self._count("tensors", _TENSOR_BYTES_MIN, TENSORS_MAX, "too-many-tensors")
        keys = self._count("keys", _KEY_BYTES_MIN, KEYS_MAX, "too-many-keys")
        seen: set[str] = set()
        for number in range(keys):
            self._pair(number, seen)
        alignment = self._alignment()
        self._refuse_what_is_no_model(tensors)
        end = self._tensors(tensors, alignment)
        header_bytes = _pad(reader.at, alignment)
        if header_bytes + end > reader.size_bytes:
            raise InvalidModelFile(
                "truncated-weights",
                f"the weights end at byte {header_bytes + end}, the file at {reader.size_bytes}",
                hint="download it again",
            )
        shape = shape_of(
            self._metadata,
            self._lengths,
            weights_bytes=sum(self._tensor_types.values()),
            parameters=self._parameters,
            quantisation=self._quantisation(),
        )
        name = self._metadata.get("general.name")
        return GgufHeader(
            version=version,
            tensors=tensors,
            header_bytes=header_bytes,
            file_bytes=reader.size_bytes,
            name=name if isinstance(name, str) else "",
            shape=shape,
            gives_embeddings=shape.architecture in EMBEDDING_ARCHITECTURES
            or self._metadata.get(f"{shape.architecture}.pooling_type") in (1, 2, 3),
            metadata=self._metadata,
        )

    def _preamble(self) -> int:
        """Magic and version."""
        head = self._reader.take(min(24, self._reader.size_bytes), "the magic number")
        if head[:4] != b"GGUF":
            _refuse_foreign(head, self._reader.size_bytes)
        if len(head) < 24:
            raise InvalidModelFile("truncated", "the file ends inside its first 24 bytes", hint="download it again")
        version: int = _U32.unpack_from(head, 4)[0]
        if version not in (2, 3):
            swapped = int.from_bytes(head[4:8], "big")
            if swapped in (2, 3):
                raise InvalidModelFile("big-endian", "the file is for big-endian machines", hint="convert it again")
            raise InvalidModelFile("bad-version", f"GGUF version {version}; 2 and 3 are known")
        self._reader.at = 8
        return version

    def _count(self, what: str, bytes_min: int, limit: int, fault: str) -> int:
        count = self._reader.u64(f"the number of {what}")
        if count * bytes_min > self._reader.remaining:
            raise InvalidModelFile(
                "lying-count", f"{count} {what} in a file with {self._reader.remaining} more bytes", hint="don't use it"
            )
        if count > limit:
            raise InvalidModelFile(fault, f"{count} {what}; {limit} are allowed")
        return count

    def _pair(self, number: int, seen: set[str]) -> None:
        """One key with its value."""
        key = self._text(f"key {number}", KEY_BYTES_MAX, "key-too-long")
        if key in seen:
            raise InvalidModelFile("duplicate-key", f"{key!r} comes twice")
        seen.add(key)
        kind = self._reader.u32(f"the type of {key!r}")
        if kind == _STRING:
            self._string_value(key)
        elif kind == _ARRAY:
            self._array_value(key)
        else:
            self._metadata[key] = self._scalar(kind, key)

    def _scalar(self, kind: int, key: str) -> Scalar:
        if kind not in _SCALARS:
            raise InvalidModelFile("unknown-type", f"{key!r} has a value of type {kind}")
        form = _SCALARS[kind]
        value: int | float = form.unpack(self._reader.take(form.size, f"the value of {key!r}"))[0]
        return bool(value) if kind == _BOOL else value

    def _string_value(self, key: str) -> None:
        """Keep a short text; of a long one (a chat template) only the length."""
        length = self._length(f"the value of {key!r}")
        self._lengths[key] = length
        if length > KEPT_STRING_BYTES_MAX:
            self._reader.skip(length, f"the value of {key!r}")
            return
        self._keep(length)
        self._metadata[key] = _decode(self._reader.take(length, f"the value of {key!r}"), key)

    def _array_value(self, key: str) -> None:
        """Count an array; keep it only if it is one of the few that a shape is made of."""
        reader = self._reader
        kind = reader.u32(f"the element type of {key!r}")
        count = reader.u64(f"the length of {key!r}")
        if kind == _ARRAY:
            raise InvalidModelFile("nested-array", f"{key!r} is an array of arrays")
        if kind != _STRING and kind not in _SCALARS:
            raise InvalidModelFile("unknown-type", f"{key!r} has elements of type {kind}")
        element_bytes = 8 if kind == _STRING else _SCALARS[kind].size
        if count * element_bytes > reader.remaining:
            raise InvalidModelFile(
                "lying-count", f"{key!r} has {count} elements in {reader.remaining} more bytes", hint="don't use it"
            )
        self._lengths[key] = count
        if kind == _STRING:
            self._strings += count
            if self._strings > STRINGS_MAX:
                raise InvalidModelFile("too-many-strings", f"{key!r} brings them to {self._strings}; {STRINGS_MAX} fit")
            reader.skip_strings(count, f"the strings of {key!r}")
        elif key.endswith(_KEPT_ARRAYS) and count <= KEPT_ITEMS_MAX and kind not in (6, 12):
            self._keep(count * 36)  # what a small int costs in a tuple
            self._metadata[key] = tuple(int(self._scalar(kind, key)) for _ in range(count))
        else:
            reader.skip(count * element_bytes, f"the elements of {key!r}")

    def _tensors(self, count: int, alignment: int) -> int:
        """Walk the tensor infos; how many bytes of weights they claim.

        ggml lays tensors one behind the other, padded; an offset that isn't exactly where the one before ends is a
        gap or an overlap, and its reader refuses both.
        """
        reader = self._reader
        names: set[str] = set()
        end = 0
        for number in range(count):
            name = self._text(f"the name of tensor {number}", TENSOR_NAME_BYTES_MAX, "name-too-long")
            if name in names:
                raise InvalidModelFile("duplicate-tensor", f"{name!r} comes twice")
            names.add(name)
            elements, size_bytes = self._tensor_size(name)
            offset = reader.u64(f"the offset of tensor {name!r}")
            if offset != _pad(end, alignment):
                raise InvalidModelFile("misplaced-tensor", f"{name!r} is at {offset}, expected {_pad(end, alignment)}")
            end = offset + size_bytes
            if end > reader.size_bytes:
                raise InvalidModelFile(
                    "truncated-weights",
                    f"{name!r} ends at byte {end} of the weights of a file of {reader.size_bytes} bytes",
                    hint="download it again",
                )
            self._parameters += elements
        return end

    def _tensor_size(self, name: str) -> tuple[int, int]:
        """Elements and bytes of one tensor."""
        reader = self._reader
        dimensions = reader.u32(f"the dimensions of tensor {name!r}")
        if not 1 <= dimensions <= DIMENSIONS_MAX:
            raise InvalidModelFile("bad-dimensions", f"{name!r} has {dimensions} dimensions; 1 to {DIMENSIONS_MAX} fit")
        lengths = [reader.u64(f"the dimensions of tensor {name!r}") for _ in range(dimensions)]
        elements = 1
        for length in lengths:
            elements *= length
        if elements == 0:
            raise InvalidModelFile("bad-dimensions", f"{name!r} has no elements")
        kind = TENSOR_TYPES.get(number := reader.u32(f"the type of tensor {name!r}"))
        if kind is None:
            raise InvalidModelFile("unknown-tensor-type", f"{name!r} is of type {number}", hint="it may be too new")
        if elements * kind.block_bytes >= 2**63:
            raise InvalidModelFile("overflow", f"{name!r} would have {elements} elements")
        if lengths[0] % kind.block_elements:
            raise InvalidModelFile(
                "bad-dimensions", f"{name!r}: rows of {lengths[0]} don't divide into {kind.name} blocks"
            )
        size_bytes = elements // kind.block_elements * kind.block_bytes
        self._tensor_types[kind.name] = self._tensor_types.get(kind.name, 0) + size_bytes
        return elements, size_bytes

    def _alignment(self) -> int:
        value = self._metadata.get("general.alignment", 32)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not 0 < value <= ALIGNMENT_MAX
            or value & (value - 1)
        ):
            raise InvalidModelFile(
                "bad-alignment", f"general.alignment is {value!r}; a power of two to {ALIGNMENT_MAX}"
            )
        return value

    def _refuse_what_is_no_model(self, tensors: int) -> None:
        parts = self._metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            part = self._metadata.get("split.no")
            which = part + 1 if isinstance(part, int) else "one"
            raise InvalidModelFile(
                "split-file",
                f"this is part {which} of {parts}",
                hint="join the parts first: llama-gguf-split --merge FIRST_PART WHOLE.gguf",
            )
        kind = self._metadata.get("general.type")
        if self._metadata.get("general.architecture") == "clip":
            kind = "mmproj"
        if kind in _PARTS:
            raise InvalidModelFile("not-a-language-model", f"the file is {_PARTS[str(kind)]}, not a whole model")
        if tensors == 0:
            raise InvalidModelFile("no-tensors", "the file has a header and no weights")

    def _quantisation(self) -> str:
        """What people call it; where the file doesn't say, the type that most of its bytes have."""
        named = self._metadata.get("general.file_type")
        if isinstance(named, int) and named in FILE_TYPES:
            return FILE_TYPES[named]
        return max(sorted(self._tensor_types), key=lambda name: self._tensor_types[name])

    def _text(self, what: str, bytes_max: int, fault: str) -> str:
        length = self._length(what)
        if length > bytes_max:
            raise InvalidModelFile(fault, f"{what} has {length} bytes; {bytes_max} are allowed")
        return _decode(self._reader.take(length, what), what)

    def _length(self, what: str) -> int:
        length = self._reader.u64(f"the length of {what}")
        if length > self._reader.remaining:
            raise InvalidModelFile(
                "lying-length", f"{what} claims {length} bytes of {self._reader.remaining} left", hint="don't use it"
            )
        return length

    def _keep(self, size_bytes: int) -> None:
        self._kept_bytes += size_bytes
        if self._kept_bytes > KEPT_BYTES_MAX:
            raise InvalidModelFile("too-much-metadata", f"more than {format_bytes(KEPT_BYTES_MAX)} of values")


def _refuse_foreign(head: bytes, size_bytes: int) -> NoReturn:
    """Say what a file is that isn't GGUF."""
    for magic, fault, text in _FOREIGN:
        if head.startswith(magic):
            raise InvalidModelFile(fault, f"this is {text}")
    if len(head) >= 10 and head[8:9] == b"{" and _U64.unpack_from(head)[0] <= size_bytes:
        raise InvalidModelFile(
            "safetensors", "this is a safetensors file", hint="convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    raise InvalidModelFile("bad-magic", f"the file begins with {head[:4]!r}, not with b'GGUF'")


def _decode(text: bytes, what: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InvalidModelFile("invalid-utf8", f"{what} isn't UTF-8 at byte {error.start}") from error


def _pad(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment

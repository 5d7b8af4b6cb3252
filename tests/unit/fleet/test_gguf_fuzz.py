"""Whatever the bytes: a header or an InvalidModelFile, soon, and in a few megabytes.

The bounds are ten times what is measured, so that a busy machine does not fail them; a reader that believes a length
fails them by orders of magnitude.
"""

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetmind.core.errors import InvalidModelFile
from fleetmind.core.types import MIB
from fleetmind.fleet.gguf import GgufHeader, read_header
from fleetmind.testing.model_files import ARRAY, Tensor, Typed, gguf, llama, text, tiny_model

WHOLE = tiny_model()
HEADER_END = 700
SECONDS_MAX = 0.5
BYTES_MAX = 6 * MIB

fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
extremes = st.sampled_from([0, 1, 2, 7, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64 - 1])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


def judge(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    began = time.thread_time()
    found: GgufHeader | InvalidModelFile
    try:
        found = read_header(path)
    except InvalidModelFile as refusal:
        found = refusal
    finally:
        taken_s, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert taken_s < SECONDS_MAX
    assert peak < BYTES_MAX
    if isinstance(found, InvalidModelFile):
        assert found.fault in (read_header.__doc__ or "")
        assert len(found.message) < 2000, "a refusal must not carry the file along"
    else:
        assert 0 < found.shape.weights_bytes <= found.file_bytes
        assert len(found.shape.kv_heads_per_layer) == found.shape.layers


@fuzz
@given(edits=st.lists(st.tuples(st.integers(0, HEADER_END), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes(path: Path, edits: list[tuple[int, int]]) -> None:
    content = bytearray(WHOLE)
    for at, byte in edits:
        content[at] = byte
    judge(path, bytes(content))


@fuzz
@given(at=st.integers(4, HEADER_END), number=extremes, form=st.sampled_from(["<I", "<Q", ">I", ">Q"]))
def test_extreme_numbers_anywhere(path: Path, at: int, number: int, form: str) -> None:
    size = struct.calcsize(form)
    content = bytearray(WHOLE)
    content[at : at + size] = struct.pack(form, number % 256**size)
    judge(path, bytes(content))


@fuzz
@given(start=st.integers(0, HEADER_END), length=st.integers(0, 64), other=st.binary(max_size=64))
def test_spliced_bytes(path: Path, start: int, length: int, other: bytes) -> None:
    judge(path, WHOLE[:start] + other + WHOLE[start + length :])


@fuzz
@given(noise=st.binary(max_size=400), keys=extremes, tensors=extremes)
def test_noise_behind_a_good_beginning(path: Path, noise: bytes, keys: int, tensors: int) -> None:
    judge(path, b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + noise)


@fuzz
@given(
    name=st.sampled_from([key for key in llama() if key.startswith("llama.")]),
    value=st.one_of(
        extremes.map(lambda number: Typed(10, number)),
        st.integers(-(2**31), 2**31 - 1).map(lambda number: Typed(5, number)),
        st.floats(width=32).map(lambda number: Typed(6, number)),
        st.text(max_size=20),
        st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(lambda items: Typed(ARRAY, items, element=5)),
    ),
)
def test_any_value_under_any_key(path: Path, name: str, value: object) -> None:
    judge(path, gguf(llama() | {name: value}))


@fuzz
@given(
    dimensions=st.lists(extremes, max_size=6),
    kind=st.one_of(st.integers(0, 45), extremes.map(lambda number: number % 2**32)),
    offset=extremes,
)
def test_any_tensor(path: Path, dimensions: list[int], kind: int, offset: int) -> None:
    head = gguf(llama(), [])
    info = text("a") + struct.pack("<I", len(dimensions)) + struct.pack(f"<{len(dimensions)}Q", *dimensions)
    content = head[:8] + struct.pack("<Q", 1) + head[16:].rstrip(b"\0") + info + struct.pack("<IQ", kind, offset)
    judge(path, content + b"\0" * 200)


@fuzz
@given(count=extremes, element=st.integers(0, 20), body=st.binary(max_size=200))
def test_any_array(path: Path, count: int, element: int, body: bytes) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + text("a") + struct.pack("<IIQ", ARRAY, element, count)
    judge(path, head + body)


def test_the_untouched_file_passes(path: Path) -> None:
    path.write_bytes(WHOLE)
    assert read_header(path).tensors == 3
    assert Tensor("a").offset is None

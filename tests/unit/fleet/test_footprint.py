"""What a model takes, against what llama.cpp said it took."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetmind.core.types import MIB
from fleetmind.fleet.footprint import CACHE_TYPES, OVERHEAD_BYTES, estimate
from fleetmind.fleet.snapshot import ModelShape
from fleetmind.node.protocol import DeviceKind
from fleetmind.testing.snapshots import make_shape

SMOLLM2 = ModelShape(
    architecture="llama",
    weights_bytes=96576768,
    layers=30,
    embedding_length=576,
    kv_heads_per_layer=(3,) * 30,
    key_length=64,
    value_length=64,
    vocabulary=49152,
    context_length_trained=8192,
    feed_forward_length=1536,
)


@pytest.mark.parametrize(
    ("context", "slots", "kv_mib", "compute_mib", "resident_mib"),
    [
        (1024, 1, 22.5, 15.83, 172.3),
        (1024, 4, 90.0, 16.39, 240.3),
        (1024, 16, 360.0, 18.64, 512.6),
        (4096, 1, 90.0, 18.83, 239.8),
        (4096, 4, 360.0, 19.39, 510.4),
        (8192, 1, 180.0, 22.83, 329.7),
        (1000, 3, 67.5, 16.23, 217.8),
    ],
)
def test_the_estimate_is_what_llama_cpp_logged(
    context: int, slots: int, kv_mib: float, compute_mib: float, resident_mib: float
) -> None:
    """Logged by xllamacpp 2026.10 on a CPU: KV buffer; compute and output buffers; resident memory after loading."""
    footprint = estimate(SMOLLM2, context, slots)
    assert footprint.kv_bytes == kv_mib * MIB
    assert footprint.compute_bytes / MIB == pytest.approx(compute_mib, rel=0.01)
    assert resident_mib <= footprint.total_bytes / MIB <= 1.05 * resident_mib


def test_the_total_is_the_sum() -> None:
    parts = estimate(make_shape(), 4096, 4)
    total = parts.weights_bytes + parts.kv_bytes + parts.compute_bytes + parts.overhead_bytes
    assert parts.total_bytes == total


def test_a_gpu_needs_more_overhead() -> None:
    on_gpu = estimate(SMOLLM2, 4096, 4, kind=DeviceKind.CUDA)
    assert on_gpu.overhead_bytes == OVERHEAD_BYTES[DeviceKind.CUDA] > estimate(SMOLLM2, 4096, 4).overhead_bytes


def test_a_smaller_cache_type_is_counted_in_blocks() -> None:
    full, small = estimate(SMOLLM2, 4096, 4), estimate(SMOLLM2, 4096, 4, "q8_0")
    assert small.kv_bytes / full.kv_bytes == pytest.approx(34 / 32 / 2)


def test_a_sliding_layer_holds_its_window_only() -> None:
    """gpt-oss-like: half the layers see 128 tokens; they keep that and a micro-batch, rounded up to 256."""
    sliding = replace(SMOLLM2, sliding_window=128, sliding_layers=(True, False) * 15)
    cell_bytes = 3 * 128 * 2
    assert estimate(sliding, 8192, 2).kv_bytes == 2 * cell_bytes * (15 * 768 + 15 * 8192)
    assert estimate(sliding, 512, 2).kv_bytes == 2 * cell_bytes * 30 * 512


def test_a_recurrent_model_needs_no_more_for_more_context() -> None:
    recurrent = replace(SMOLLM2, kv_heads_per_layer=(0,) * 30, recurrent_state_bytes=1000)
    assert estimate(recurrent, 256, 3).kv_bytes == estimate(recurrent, 8192, 3).kv_bytes == 3000


def test_latent_attention_counts_one_row() -> None:
    latent = replace(SMOLLM2, kv_heads_per_layer=(1,) * 30, key_length=576, value_length=0)
    assert estimate(latent, 1024, 1).kv_bytes == 30 * 1024 * 576 * 2


@pytest.mark.parametrize(("context", "slots", "cache"), [(0, 1, "f16"), (1, 0, "f16"), (1, 1, "q9")])
def test_nonsense_is_a_value_error(context: int, slots: int, cache: str) -> None:
    with pytest.raises(ValueError):
        estimate(SMOLLM2, context, slots, cache)


@given(
    context=st.integers(1, 200_000),
    more=st.integers(0, 200_000),
    slots=st.integers(1, 64),
    window=st.integers(0, 9000),
    cache=st.sampled_from(sorted(CACHE_TYPES)),
)
def test_more_never_needs_less(context: int, more: int, slots: int, window: int, cache: str) -> None:
    shape = replace(SMOLLM2, sliding_window=window, sliding_layers=(True, False) * 15 if window else ())
    least = estimate(shape, context, slots, cache).total_bytes
    assert estimate(shape, context + more, slots, cache).total_bytes >= least
    assert estimate(shape, context, slots + 1, cache).total_bytes >= least

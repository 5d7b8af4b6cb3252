"""How much memory a model takes, from the numbers in its file's header.

Pure. Five terms, each shown, so that an owner sees what the memory is for:

  1. weights   every tensor, as it is stored
  2. kv        keys and values: layers × slots × tokens × heads × (key + value length) × bytes an element; a sliding
               layer holds its window and one micro-batch at most, a recurrent one its state
  3. compute   activations of one micro-batch, the attention mask, and the logits of one token a slot
  4. overhead  the process itself: code, tokenizer, the driver's context on a GPU

It knows nothing of devices or of what is free (``fit`` does). The invariant: more context or more slots never need
less.

Compared with what llama.cpp itself logged at load (xllamacpp 2026.10, SmolLM2-135M Q4_1 on a CPU; MiB, its figure and
ours; the log has no figure for overhead, so the last column is the process's resident memory after load):

  context × slots   weights          kv               compute + output    resident, total
  1024 × 1          92.1   92.1      22.5   22.5      15.8   15.8         172   178
  1024 × 4          92.1   92.1      90.0   90.0      16.4   16.4         240   246
  4096 × 4          92.1   92.1     360.0  360.0      19.4   19.4         510   519
  8192 × 1          92.1   92.1     180.0  180.0      22.8   22.8         330   343

so the terms agree within 1 % and the total is 2 to 4 % high for this model. The compute term is fitted to a dense model
with flash attention on; it is not checked on mixtures, and builds of llama-server from before logits were reserved per
slot take up to micro-batch × vocabulary × 4 bytes more.
"""

from dataclasses import dataclass

from fleetmind.core.types import MIB
from fleetmind.fleet.snapshot import ModelShape
from fleetmind.node.protocol import DeviceKind

CACHE_TYPES: dict[str, tuple[int, int]] = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_1": (24, 32),
    "q5_0": (22, 32),
    "q4_1": (20, 32),
    "q4_0": (18, 32),
}
"""Bytes for how many elements."""

MICRO_BATCH_TOKENS = 512
"""llama.cpp's default ``n_ubatch``."""
CACHE_CELLS_STEP = 256
"""llama.cpp rounds the context of a slot up to this."""
OVERHEAD_BYTES = {DeviceKind.CPU: 48 * MIB, DeviceKind.CUDA: 512 * MIB}
"""CPU: 41 to 50 MiB measured. CUDA: context, cuBLAS workspace and kernels; not measured by us, hence generous."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes a replica takes, by what for; ``total_bytes`` is their sum."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    total_bytes: int


def estimate(
    shape: ModelShape,
    context_tokens: int,
    slots: int,
    cache_type: str = "f16",
    *,
    kind: DeviceKind = DeviceKind.CPU,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
) -> Footprint:
    """What a replica of ``shape`` takes with ``context_tokens`` for each of ``slots`` on a device of ``kind``.

    ``micro_batch_tokens`` is how many tokens the engine computes at once; a model that gives vectors needs a whole
    prompt in one.

    ValueError for a ``cache_type`` that isn't in CACHE_TYPES, or for a context or slots below 1.
    """
    if context_tokens < 1 or slots < 1:
        raise ValueError(f"context_tokens and slots must be at least 1, not {context_tokens} and {slots}")
    if cache_type not in CACHE_TYPES:
        raise ValueError(f"cache type {cache_type!r}; known are {', '.join(CACHE_TYPES)}")
    cells = _round_up(context_tokens, CACHE_CELLS_STEP)
    kv = _kv_bytes(shape, cells, slots, cache_type, micro_batch_tokens)
    compute = _compute_bytes(shape, cells, slots, micro_batch_tokens)
    overhead = OVERHEAD_BYTES[kind]
    return Footprint(shape.weights_bytes, kv, compute, overhead, shape.weights_bytes + kv + compute + overhead)


def _kv_bytes(shape: ModelShape, cells: int, slots: int, cache_type: str, micro_batch_tokens: int) -> int:
    """Keys and values of all slots, and the state of recurrent layers.

    A model whose sliding layers have shorter keys than its others is taken to have the longer ones everywhere; that
    costs at most the window.
    """
    window_cells = min(cells, _round_up(shape.sliding_window + micro_batch_tokens, CACHE_CELLS_STEP))
    rows = 0  # one row: the keys and values that one head keeps of one token
    for layer, heads in enumerate(shape.kv_heads_per_layer):
        is_sliding = layer < len(shape.sliding_layers) and shape.sliding_layers[layer]
        rows += heads * (window_cells if is_sliding else cells)
    size, elements = CACHE_TYPES[cache_type]
    row_bytes = sum(-(-length * size // elements) for length in (shape.key_length, shape.value_length))
    return slots * (rows * row_bytes + shape.recurrent_state_bytes)


def _compute_bytes(shape: ModelShape, cells: int, slots: int, micro_batch_tokens: int) -> int:
    """Fitted to llama.cpp's log: 5 rows of the embedding and 3 of the feed-forward in 32-bit floats for each token of a
    micro-batch, a mask of 16 bits for each of its tokens and each cell of one slot, and a token's logits a slot."""
    activations = micro_batch_tokens * 4 * (5 * shape.embedding_length + 3 * shape.feed_forward_length)
    mask = micro_batch_tokens * 2 * cells
    logits = slots * 4 * shape.vocabulary
    return activations + mask + logits


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step

"""From the metadata of a model file to the numbers its memory depends on.

Pure. Takes what ``gguf`` read, holds every value against a range that real models stay far inside of, and knows the
habits of the architectures (sliding windows, recurrent layers, shared keys and values, latent attention). The
invariant: a ModelShape that comes out can be multiplied without surprise.
"""

from collections.abc import Mapping

from fleetmind.core.errors import InvalidModelFile
from fleetmind.fleet.ggml import HYBRID_PERIODS, SLIDING_PERIODS
from fleetmind.fleet.snapshot import ModelShape

Scalar = int | float | bool | str
Value = Scalar | tuple[int, ...]

LAYERS_MAX = 512
LENGTH_MAX = 1024 * 1024
CONTEXT_MAX = 2**31 - 1
VOCABULARY_MAX = 16 * 1024 * 1024
_F32_BYTES = 4


def shape_of(
    metadata: Mapping[str, Value],
    lengths: Mapping[str, int],
    *,
    weights_bytes: int,
    parameters: int,
    quantisation: str,
) -> ModelShape:
    """The shape of a model. ``lengths`` are those of the arrays and texts that were counted and not kept.

    Raises InvalidModelFile with ``missing-key``, ``wrong-type`` or ``absurd-value``.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise InvalidModelFile("missing-key", "general.architecture isn't there")
    facts = _Facts(metadata, architecture)
    layers = facts.whole("block_count", minimum=1, maximum=LAYERS_MAX)
    embedding = facts.whole("embedding_length", minimum=1)
    heads = facts.per_layer("attention.head_count", layers, default=0)
    kv_heads = _kv_heads(facts, layers, heads)
    attention_heads = next((count for count in heads if count), 0)
    head_length = embedding // attention_heads if attention_heads else 0
    # Latent attention (DeepSeek): keys and values are one compressed row, stored once.
    is_latent = facts.has("attention.key_length_mla")
    window = facts.whole("attention.sliding_window", default=0, maximum=CONTEXT_MAX)
    return ModelShape(
        architecture=architecture,
        weights_bytes=weights_bytes,
        layers=layers,
        embedding_length=embedding,
        kv_heads_per_layer=kv_heads,
        key_length=facts.whole("attention.key_length", default=head_length),
        value_length=0 if is_latent else facts.whole("attention.value_length", default=head_length),
        vocabulary=_vocabulary(facts, lengths),
        context_length_trained=facts.whole("context_length", minimum=1, maximum=CONTEXT_MAX),
        sliding_window=window,
        quantisation=quantisation,
        parameters=parameters,
        has_chat_template=lengths.get("tokenizer.chat_template", 0) > 0,
        feed_forward_length=_feed_forward(facts, layers),
        sliding_layers=_sliding_layers(facts, layers) if window else (),
        recurrent_state_bytes=_recurrent_state_bytes(facts, kv_heads, embedding),
    )


class _Facts:
    """The values under the architecture's own prefix, each checked when it is asked for."""

    def __init__(self, metadata: Mapping[str, Value], architecture: str) -> None:
        self._metadata = metadata
        self.architecture = architecture

    def has(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self._metadata

    def value(self, name: str) -> Value | None:
        return self._metadata.get(f"{self.architecture}.{name}")

    def whole(self, name: str, *, default: int | None = None, minimum: int = 0, maximum: int = LENGTH_MAX) -> int:
        key = f"{self.architecture}.{name}"
        value = self._metadata.get(key, default)
        if value is None:
            raise InvalidModelFile("missing-key", f"{key} isn't there")
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidModelFile("wrong-type", f"{key} is {value!r:.80}, not a whole number")
        return _bounded(key, value, minimum, maximum)

    def per_layer(self, name: str, layers: int, *, default: int) -> tuple[int, ...]:
        """One number a layer, from a number for all or an array with one for each."""
        value = self.value(name)
        if not isinstance(value, tuple):
            return (self.whole(name, default=default),) * layers
        key = f"{self.architecture}.{name}"
        if len(value) < layers:
            raise InvalidModelFile("wrong-type", f"{key} has {len(value)} elements for {layers} layers")
        return tuple(_bounded(key, number, 0, LENGTH_MAX) for number in value[:layers])


def _bounded(key: str, value: int, minimum: int, maximum: int) -> int:
    if not minimum <= value <= maximum:
        raise InvalidModelFile("absurd-value", f"{key} is {value}; {minimum} to {maximum} makes sense")
    return value


def _kv_heads(facts: _Facts, layers: int, heads: tuple[int, ...]) -> tuple[int, ...]:
    """Heads that keep keys and values, per layer."""
    if facts.has("attention.head_count_kv"):
        kv_heads = list(facts.per_layer("attention.head_count_kv", layers, default=0))
    else:
        kv_heads = list(heads)
    period = facts.whole("full_attention_interval", default=HYBRID_PERIODS.get(facts.architecture, 0))
    if period:
        kv_heads = [count if (layer + 1) % period == 0 else 0 for layer, count in enumerate(kv_heads)]
    # The last layers of some models read an earlier layer's keys, or exist only to draft tokens.
    without = facts.whole("attention.shared_kv_layers", default=0) + facts.whole("nextn_predict_layers", default=0)
    keeping = max(0, layers - without)
    return tuple(kv_heads[:keeping]) + (0,) * (layers - keeping)


def _sliding_layers(facts: _Facts, layers: int) -> tuple[bool, ...]:
    pattern = facts.value("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return tuple(bool(item) for item in pattern[:layers]) + (False,) * (layers - len(pattern))
    period = facts.whole("attention.sliding_window_pattern", default=SLIDING_PERIODS.get(facts.architecture, 1))
    if period == 0:
        return (True,) * layers
    return tuple(layer % period < period - 1 for layer in range(layers))


def _feed_forward(facts: _Facts, layers: int) -> int:
    """The widest feed-forward row one token goes through; of a mixture, through all the experts it is sent to."""
    dense = max(facts.per_layer("feed_forward_length", layers, default=0))
    expert = facts.whole("expert_feed_forward_length", default=0)
    return max(dense, expert * facts.whole("expert_used_count", default=0))


def _recurrent_state_bytes(facts: _Facts, kv_heads: tuple[int, ...], embedding: int) -> int:
    """What recurrent layers keep per slot, as llama.cpp's ``n_embd_r`` and ``n_embd_s`` have it, in 32-bit floats."""
    inner, state = facts.whole("ssm.inner_size", default=0), facts.whole("ssm.state_size", default=0)
    kernel, groups = facts.whole("ssm.conv_kernel", default=0), facts.whole("ssm.group_count", default=0)
    per_layer = max(0, kernel - 1) * (inner + 2 * groups * state) + inner * state
    short = facts.whole("shortconv.l_cache", default=0)
    per_layer += embedding * max(0, short - 1)
    head = facts.whole("wkv.head_size", default=0)
    per_layer += embedding * (head + 2) if head else 0
    recurrent = kv_heads.count(0) or (len(kv_heads) if per_layer else 0)  # falcon-h1 has both in every layer
    return per_layer * recurrent * _F32_BYTES


def _vocabulary(facts: _Facts, lengths: Mapping[str, int]) -> int:
    counted = lengths.get("tokenizer.ggml.tokens", 0)
    value = counted or facts.whole("vocab_size", default=0, maximum=VOCABULARY_MAX)
    return _bounded("the vocabulary", value, 0, VOCABULARY_MAX)

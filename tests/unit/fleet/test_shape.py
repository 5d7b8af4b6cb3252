"""From metadata to numbers: the habits of architectures."""

import pytest

from fleetmind.core.errors import InvalidModelFile
from fleetmind.fleet.shape import shape_of
from fleetmind.fleet.snapshot import ModelShape


def shape(**values: object) -> ModelShape:
    """The shape of an ``x`` of 4 layers; double underscores are dots, architecture says another than x."""
    architecture = str(values.pop("architecture", "x"))
    metadata = {"block_count": 4, "embedding_length": 64, "context_length": 1024, "attention.head_count": 4}
    metadata |= {name.replace("__", "."): value for name, value in values.items()}  # type: ignore[misc]
    prefixed = {f"{architecture}.{name}": value for name, value in metadata.items()}
    return shape_of(
        {"general.architecture": architecture, **prefixed},  # type: ignore[arg-type]
        {},
        weights_bytes=1,
        parameters=1,
        quantisation="F16",
    )


def test_without_grouping_every_head_keeps_its_keys() -> None:
    assert shape().kv_heads_per_layer == (4, 4, 4, 4)


def test_lengths_of_keys_and_values_may_be_given() -> None:
    given = shape(attention__key_length=128, attention__value_length=96)
    assert (given.key_length, given.value_length) == (128, 96)


def test_latent_attention_stores_one_row_for_keys_and_values() -> None:
    given = shape(attention__key_length=576, attention__value_length=512, attention__key_length_mla=192)
    assert (given.key_length, given.value_length) == (576, 0)


def test_a_hybrid_has_attention_in_every_so_many_layers() -> None:
    assert shape(full_attention_interval=2).kv_heads_per_layer == (0, 4, 0, 4)
    assert shape(architecture="qwen3next").kv_heads_per_layer == (0, 0, 0, 4)


def test_layers_that_share_anothers_keys_keep_none() -> None:
    assert shape(attention__shared_kv_layers=3).kv_heads_per_layer == (4, 0, 0, 0)
    assert shape(nextn_predict_layers=1).kv_heads_per_layer == (4, 4, 4, 0)
    assert shape(attention__shared_kv_layers=99).kv_heads_per_layer == (0, 0, 0, 0)


def test_a_window_without_a_known_pattern_counts_for_nothing() -> None:
    assert shape(attention__sliding_window=128).sliding_layers == (False,) * 4


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        ({"architecture": "gpt-oss"}, (True, False, True, False)),
        ({"attention__sliding_window_pattern": 4}, (True, True, True, False)),
        ({"attention__sliding_window_pattern": 0}, (True, True, True, True)),
        ({"attention__sliding_window_pattern": (1, 0, 1, 1)}, (True, False, True, True)),
        ({"attention__sliding_window_pattern": (1,)}, (True, False, False, False)),
    ],
)
def test_a_window_holds_in_the_layers_of_the_pattern(values: dict[str, object], layers: tuple[bool, ...]) -> None:
    assert shape(attention__sliding_window=128, **values).sliding_layers == layers


def test_a_recurrent_model_keeps_a_state_and_no_keys() -> None:
    """Mamba 130M as llama.cpp logs it: 24 layers of 3·1536 and 16·1536 floats are 2.67 MiB."""
    given = shape(block_count=24, attention__head_count=0, ssm__inner_size=1536, ssm__state_size=16, ssm__conv_kernel=4)
    assert given.kv_heads_per_layer == (0,) * 24
    assert given.recurrent_state_bytes == 24 * (3 * 1536 + 16 * 1536) * 4


def test_a_mixture_is_as_wide_as_the_experts_one_token_meets() -> None:
    given = shape(feed_forward_length=100, expert_feed_forward_length=64, expert_used_count=8)
    assert given.feed_forward_length == 512


def test_nothing_absurd_gets_through() -> None:
    for name in ("embedding_length", "attention__head_count", "attention__shared_kv_layers", "ssm__inner_size"):
        with pytest.raises(InvalidModelFile, match="absurd-value"):
            shape(**{name: 2**40})

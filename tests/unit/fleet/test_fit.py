"""Whether a model fits, why not, and how much context would."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fleetmind.core.types import GIB, MIB
from fleetmind.fleet.fit import fit, largest_context
from fleetmind.fleet.footprint import estimate
from fleetmind.node.protocol import DeviceKind
from fleetmind.testing.snapshots import make_shape, make_view


def test_each_device_gets_a_verdict_in_order() -> None:
    verdicts = fit(make_shape(), [make_view("b"), make_view("a", memory_bytes=GIB)], 4096, 4, 256 * MIB)
    assert [(verdict.device_id, verdict.fits) for verdict in verdicts] == [("b", True), ("a", False)]


def test_what_does_not_fit_says_what_is_missing_and_what_would() -> None:
    view = make_view(memory_bytes=4 * GIB, granted=GIB, foreign=GIB // 2)
    shape = make_shape(weights_bytes=GIB)
    (verdict,) = fit(shape, [view], 8192, 4, 256 * MIB)
    assert verdict.memory_bytes_free == 4 * GIB - GIB - GIB // 2 - 256 * MIB
    assert not verdict.fits
    assert verdict.reason.startswith("needs 2.5 GiB, 2.2 GiB free of 4.0 GiB after 256.0 MiB reserve; with 4 slots")
    assert str(verdict.context_tokens_max) in verdict.reason
    (again,) = fit(shape, [view], verdict.context_tokens_max, 4, 256 * MIB)
    assert again.fits


def test_a_model_larger_than_the_device_has_no_context_that_fits() -> None:
    (verdict,) = fit(make_shape(weights_bytes=30 * GIB), [make_view()], 256, 1, 0)
    assert (verdict.fits, verdict.context_tokens_max) == (False, 0)
    assert "no context would fit" in verdict.reason


def test_a_device_with_a_fault_takes_nothing() -> None:
    views = [make_view("broken", fault="fell off the bus"), replace(make_view("unread"), reading=None)]
    broken, unread = fit(make_shape(), views, 256, 1, 0)
    assert (broken.fits, broken.context_tokens_max, broken.reason) == (False, 0, "it can't be read: fell off the bus")
    assert not unread.fits


def test_more_context_than_trained_for_is_remarked() -> None:
    (verdict,) = fit(make_shape(context=2048), [make_view()], 4096, 1, 0)
    assert verdict.fits
    assert "trained for 2048" in verdict.reason


@given(
    total=st.integers(0, 8 * GIB),
    slots=st.integers(1, 16),
    context=st.integers(1, 100_000),
    kind=st.sampled_from(list(DeviceKind)),
)
def test_the_largest_context_fits_and_the_next_does_not(total: int, slots: int, context: int, kind: DeviceKind) -> None:
    shape, view = make_shape(context=context), make_view(memory_bytes=total, kind=kind)
    largest = largest_context(shape, view, slots, 0)
    assert 0 <= largest <= context
    if largest:
        assert estimate(shape, largest, slots, kind=kind).total_bytes <= total
    if largest < context:
        assert estimate(shape, min(largest + 256, context), slots, kind=kind).total_bytes > total

"""The knobs of the fake engine: how it loads, how fast it talks, and how it fails.

Pure. Invariant: a knob that does not exist or a value that makes no sense is refused by name, so that a test or demo
never quietly runs without the failure it asked for.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class Knobs:
    """What the fake engine does. Times are seconds. A ``…_after_tokens`` of None never happens; 0 is before the first.

    ``load_s`` until ready · ``ttft_s`` until the first token · ``tokens_per_s`` of each stream, 0 as fast as possible ·
    ``slots`` calls at once, more wait · ``context_tokens`` per slot · ``reply_tokens`` when max_tokens says no less ·
    ``error_after_tokens`` a proper error, ``hang_after_tokens`` silence, ``garbage_after_tokens`` bytes that are no
    answer, ``crash_after_tokens`` a segmentation fault · ``crash_on_start`` · ``never_ready`` · ``silent`` nothing is
    answered at all · ``ignore_sigterm`` · ``outlives_server`` does not notice that its server died ·
    ``embedding_dimensions`` 0 refuses embeddings · ``log_bytes`` printed at the start · ``memory_bytes`` held ·
    ``seed`` of the text.
    """

    load_s: float = 0.0
    ttft_s: float = 0.0
    tokens_per_s: float = 0.0
    slots: int = 4
    context_tokens: int = 4096
    reply_tokens: int = 32
    error_after_tokens: int | None = None
    hang_after_tokens: int | None = None
    garbage_after_tokens: int | None = None
    crash_after_tokens: int | None = None
    crash_on_start: bool = False
    never_ready: bool = False
    silent: bool = False
    ignore_sigterm: bool = False
    outlives_server: bool = False
    embedding_dimensions: int = 0
    log_bytes: int = 0
    memory_bytes: int = 0
    seed: int = 0

    def changed(self, wanted: Mapping[str, object]) -> "Knobs":
        """These knobs with ``wanted`` set. Raises ValueError, whose text names the knob and what it takes."""
        defaults = {field.name: field.default for field in fields(Knobs)}
        for name, value in wanted.items():
            if name not in defaults:
                near = difflib.get_close_matches(name, defaults, n=1)
                raise ValueError(f"there is no knob {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            _check(name, value, defaults[name])
        return replace(self, **wanted)  # type: ignore[arg-type]  # checked just now, one by one


def _check(name: str, value: object, default: object) -> None:
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, float):
        fits = type(value) in (int, float) and math.isfinite(float(str(value))) and float(str(value)) >= 0
        wanted = "a number of at least 0"
    else:
        least = 1 if name in ("slots", "context_tokens") else 0
        fits = (value is None and default is None) or (type(value) is int and int(str(value)) >= least)
        wanted = f"a whole number of at least {least}" + (" or null" if default is None else "")
    if not fits:
        raise ValueError(f"the knob {name} takes {wanted}, not {value!r}")

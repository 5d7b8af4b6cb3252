"""Where a Fleetmind keeps its state.

Asks only for the user's own folder. Apart from ``core/config.py`` so that a command that only asks a running server
need not load the whole configuration.
"""

from collections.abc import Mapping
from pathlib import Path


def home_from(environ: Mapping[str, str]) -> Path:
    """The directory of all state: ``FLEETMIND_HOME``, or ``~/.local/share/fleetmind``."""
    given = environ.get("FLEETMIND_HOME", "").strip()
    base = Path(given) if given else Path("~/.local/share/fleetmind")
    user_home = environ.get("HOME", "")
    if user_home and base.parts[:1] == ("~",):
        base = Path(user_home, *base.parts[1:])
    return base.expanduser().absolute()

"""The child process that is one llama.cpp server, by way of xllamacpp.

Run with ``python -m``; reads one JSON object on stdin: ``parameters`` (names and values of xllamacpp's CommonParams,
as :mod:`fleetmind.node.engines.llamacpp` makes them, dots for nested ones) and ``api_key``. It has no logic of its
own: what is served is llama.cpp's HTTP surface. Invariant: without a key it does not start.
"""

import json
import signal
import sys

from fleetmind.node import lifeline


def main() -> None:
    """Load the model and serve until told to end."""
    lifeline.hold()
    order = json.load(sys.stdin)
    import xllamacpp  # only here: 20 MB of native code have no place in the server

    parameters = xllamacpp.CommonParams()
    for name, value in order["parameters"].items():
        owner, _, leaf = name.rpartition(".")
        target = getattr(parameters, owner) if owner else parameters
        present = getattr(target, leaf)
        if isinstance(present, set):
            value = set(value)
        elif hasattr(type(present), "__members__"):
            value = type(present).__members__[value]
        setattr(target, leaf, value)
    assert order["api_key"]
    parameters.api_keys = [order["api_key"]]
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as fault:
        print(f"llama.cpp could not start: {fault}", file=sys.stderr)  # noqa: T201 - this is the replica's log
        sys.exit(1)
    print(f"serving at {server.listening_address}", flush=True)  # noqa: T201
    signal.pause()


if __name__ == "__main__":
    main()

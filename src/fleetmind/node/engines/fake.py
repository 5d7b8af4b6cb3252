"""The fake engine, seen from the daemon: a program of our own that invents its answers.

``options`` of a spec are its knobs (``fake_knobs``); slots and context come from the spec unless a knob says
otherwise. Invariant: labelled simulated, always.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fleetmind.core.errors import ConfigurationError
from fleetmind.node.engine import Command, EngineFacts, Health, HealthState
from fleetmind.node.engines import llamacpp
from fleetmind.node.engines.fake_knobs import Knobs
from fleetmind.node.protocol import Ability, Device, Endpoint, ReplicaSpec

FACTS = EngineFacts(name="fake", is_simulated=True)
CHILD = "fleetmind.node.engines.fake_server"


class Fake:
    """The fake engine."""

    @property
    def facts(self) -> EngineFacts:
        return FACTS

    def command(self, spec: ReplicaSpec, devices: Sequence[Device], endpoint: Endpoint) -> Command:
        """The program that serves ``spec``. Raises ConfigurationError for a knob it doesn't have."""
        host, _, port = endpoint.base_url.removeprefix("http://").rpartition(":")
        order = {
            "host": host,
            "port": int(port),
            "api_key": endpoint.api_key,
            "model": spec.model,
            "knobs": {"slots": spec.slots, "context_tokens": spec.context_tokens} | dict(spec.options),
        }
        check_options(spec.options)
        return Command(argv=(sys.executable, "-P", "-m", CHILD), stdin=json.dumps(order).encode())

    async def endpoint(self, spec: ReplicaSpec) -> Endpoint | None:
        return None

    async def probe(self, endpoint: Endpoint, spec: ReplicaSpec) -> Health:
        """It answers like llama.cpp, and is asked like it; what it can do stands in the spec."""
        health = await llamacpp.probe(endpoint, spec)
        if health.state is not HealthState.READY:
            return health
        abilities = frozenset({Ability.CHAT, Ability.COMPLETION})
        if spec.options.get("embedding_dimensions"):
            abilities |= {Ability.EMBEDDING}
        return replace(health, abilities=abilities, version=health.version.removeprefix("llama.cpp "))


def check_options(options: Mapping[str, object]) -> None:
    """Raises ConfigurationError for a knob that does not exist or a value that makes no sense."""
    try:
        Knobs().changed(options)
    except ValueError as fault:
        raise ConfigurationError(str(fault), hint="see fleetmind.node.engines.fake_knobs", param="options") from None

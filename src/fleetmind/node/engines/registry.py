"""Which engines there are. A new one is one module and one line here.

Invariant: an engine's key is the name in its facts, which is what a replica spec names.
"""

from collections.abc import Mapping

from fleetmind.core.settings import NodeSettings
from fleetmind.node.engine import Engine
from fleetmind.node.engines import llama_server, llamacpp
from fleetmind.node.engines.fake import Fake
from fleetmind.node.engines.remote import Remote


async def engines(settings: NodeSettings, environ: Mapping[str, str]) -> Mapping[str, Engine]:
    """The engines by name. Raises ConfigurationError when ``node.llama_server`` names a program that is none."""
    binary = await llama_server.find(settings.llama_server, environ)
    found: tuple[Engine, ...] = (binary or await llamacpp.find(environ), Remote(environ), Fake())
    return {engine.facts.name: engine for engine in found}

"""Any server with OpenAI's API that somebody else runs: asked whether it is there, never started or stopped.

The key is read from the environment variable the spec names, at the moment it is needed, and goes to that server
alone. Invariant: a server that refuses the key is FAILED with that reason, never tried in a loop.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from fleetmind.core.errors import EngineStartFailed
from fleetmind.node.engine import Command, EngineFacts, Health, HealthState
from fleetmind.node.engines.probing import Asker
from fleetmind.node.protocol import Device, Endpoint, ReplicaSpec

FACTS = EngineFacts(name="remote", needs_url=True, is_external=True)


class Remote:
    """The engine of remote servers. ``environ`` is where their keys are."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    @property
    def facts(self) -> EngineFacts:
        return FACTS

    def command(self, spec: ReplicaSpec, devices: Sequence[Device], endpoint: Endpoint) -> Command:
        raise AssertionError("a remote server has no process here")

    async def endpoint(self, spec: ReplicaSpec) -> Endpoint | None:
        """Where it answers. Raises EngineStartFailed for a URL that is none, or a key that is not set."""
        assert spec.url is not None
        try:
            parts = urlsplit(spec.url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url:
            raise EngineStartFailed(f"{spec.url!r} is not an http or https URL", hint="it usually ends with /v1")
        api_key = self._environ.get(spec.key_env, "") if spec.key_env else ""
        if spec.key_env and not api_key:
            raise EngineStartFailed(
                f"the environment variable {spec.key_env} with the server's key is not set",
                hint="set it where Fleetmind starts",
            )
        return Endpoint(spec.url.rstrip("/").removesuffix("/v1"), api_key)

    async def probe(self, endpoint: Endpoint, spec: ReplicaSpec) -> Health:
        """Ask for its list of models. A server without one, that says 404 there, is as good as any."""
        async with Asker(endpoint.base_url, endpoint.api_key) as asker:
            answer = await asker.get("/v1/models")
        if answer.status == 0:
            return Health(HealthState.UNREACHABLE, detail=answer.fault)
        if answer.status in (401, 403):
            which = f"the key in {spec.key_env}" if spec.key_env else "a call without a key"
            return Health(HealthState.FAILED, detail=f"the server refuses {which} ({answer.status})")
        if answer.status not in (200, 404, 405):
            return Health(HealthState.UNREACHABLE, detail=f"the server answers {answer.status} when asked for models")
        return Health(
            HealthState.READY,
            slots=spec.slots,
            context_tokens=spec.context_tokens,
            abilities=spec.abilities,
            version="remote",
            detail=_doubt(answer.body, spec),
        )


def _doubt(body: Mapping[str, Any], spec: ReplicaSpec) -> str:
    """What to say when the server lists models and ours is not among them: some serve more than they list."""
    entries = body.get("data")
    names = [str(entry.get("id")) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    wanted = spec.remote_model or spec.model
    return (
        f"the server does not list {wanted!r}; it lists {', '.join(names[:5])}" if names and wanted not in names else ""
    )

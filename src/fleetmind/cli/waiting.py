"""Waiting for a model, in words a person can follow.

Asks the server again and again; never longer than is useful: a model that failed or fits nowhere is told at once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fleetmind.cli.exits import ServerRefused
from fleetmind.cli.output import Output
from fleetmind.core.clock import pause

if TYPE_CHECKING:
    from fleetmind.cli.client import Client

LOOK_INTERVAL_S = 0.3
REMOTE_LOOKS_MAX = 50
"""A remote server that is down may come back in days: after so many looks the wait is not ours any more."""
UNPLACED_LOOKS_MAX = 10
"""A model is unplaced for a moment after it was added; if it still is after so many looks, it doesn't fit."""


def until_ready(
    client: "Client", name: str, output: Output, *, wait: Callable[[float], None] = pause
) -> dict[str, Any]:
    """Wait until ``name`` is served, and return it. Raises ServerRefused when it failed or fits nowhere."""
    looks = unplaced = 0
    with output.waiting(f"Loading {name} …") as tell:
        while True:
            model = model_of(client, name)
            if model["state"] == "ready":
                return model
            if model["state"] == "failed":
                raise not_served(model["name"], model["reason"])
            words = _starting_words(client, name) or model["reason"] or model["state"]
            looks += 1
            if model["source"] == "remote" and looks > REMOTE_LOOKS_MAX:
                raise not_served(name, f"{words}; it is tried again and again")
            unplaced = unplaced + 1 if model["state"] == "unplaced" else 0
            if unplaced > UNPLACED_LOOKS_MAX:
                raise not_served(name, _refusals(client, name) or model["reason"])
            tell(f"Loading {name}: {words}")
            wait(LOOK_INTERVAL_S)


def model_of(client: "Client", name: str) -> dict[str, Any]:
    """The catalogue's entry. Raises ServerRefused (model_not_found)."""
    found: list[dict[str, Any]] = client.get("/api/models")["models"]
    for model in found:
        if model["name"] == name:
            return model
    raise ServerRefused(f"{name} is not in the catalogue.", code="model_not_found", hint="See: fleetmind models ls")


def not_served(name: str, reason: str) -> ServerRefused:
    """A model that is in the catalogue and will not become ready by waiting."""
    return ServerRefused(
        f"{name} is in the catalogue but can't be served: {reason}",
        code="model_failed",
        hint="See more with: fleetmind status, fleetmind doctor, fleetmind logs",
    )


def _starting_words(client: "Client", name: str) -> str:
    """What the newest replica of the model says it is doing."""
    starting = [one for one in client.get("/api/replicas")["replicas"] if one["model"] == name and one["reason"]]
    return str(max(starting, key=lambda one: one["created_at_s"])["reason"]) if starting else ""


def _refusals(client: "Client", name: str) -> str:
    """Why placement put it nowhere, device by device."""
    refusals = client.get("/api/placement")["refusals"]
    return "; ".join(
        f"{refusal['device']}: {refusal['message']}" if refusal["device"] else refusal["message"]
        for refusal in refusals
        if refusal["model"] == name
    )

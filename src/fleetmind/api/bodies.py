"""The bodies of requests, read whole within a bound of size.

Knows neither routes nor what a body means; how long a body may take is the connection's business. Invariant: never
holds more than the bound and one piece of the network; what a client sends beyond it is dropped by its connection as it
comes, so that the client gets to read the refusal.
"""

from starlette.types import Message, Receive, Scope

from fleetmind.core.errors import PayloadTooLarge


async def read_body(scope: Scope, receive: Receive, *, bytes_max: int) -> bytes:
    """The whole body of a request.

    Raises PayloadTooLarge past ``bytes_max``, at once where the client says how much will come; ConnectionResetError
    where the client left, or was sent away because it took too long.
    """
    for name, value in scope["headers"]:
        # The parser has seen to it that it is a number. Longer than any that we'd take, it isn't worth being read.
        if name == b"content-length" and (len(value) > _LENGTH_DIGITS_MAX or int(value) > bytes_max):
            raise _too_large(bytes_max)
    message = await _next(receive)
    if not message.get("more_body") and len(message["body"]) <= bytes_max:
        return bytes(message["body"])
    parts, size = [message["body"]], len(message["body"])
    while message.get("more_body") and size <= bytes_max:
        message = await _next(receive)
        parts.append(message["body"])
        size += len(message["body"])
    if size > bytes_max:
        raise _too_large(bytes_max)
    return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """``receive`` of a request whose body was read already: it comes once more, in one piece."""
    is_due = True

    async def again() -> Message:
        nonlocal is_due
        if not is_due:
            return await receive()
        is_due = False
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _next(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ConnectionResetError
    return message


def _too_large(bytes_max: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The body is larger than {bytes_max} bytes.",
        hint="Send less; for calls to models server.body_bytes_max can be raised.",
    )


_LENGTH_DIGITS_MAX = 18

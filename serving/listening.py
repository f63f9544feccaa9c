"""A socket that listens, before anything slow is done for it."""

from __future__ import annotations

import socket

from mindomni_rt.errors import BadRequestError


def listen(host: str, port: int) -> socket.socket:
    """Port 0 takes a free one. Raises BadRequestError for an address that is in use or not of this machine."""
    if not 0 <= port <= 65535:
        raise BadRequestError(f"--port {port}: expected 0 to 65535")
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        made = socket.create_server(family[4][:2], family=family[0], backlog=1024)
    except (OSError, UnicodeError) as error:
        raise BadRequestError(f"--host {host} --port {port}: {getattr(error, 'strerror', error)}") from error
    return made

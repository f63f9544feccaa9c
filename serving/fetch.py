"""Pictures from other servers: off by default, and from allowed hosts alone.

Against a server that is made to call its own network (SSRF): the host must be on the list, each of its addresses must
be public, the connection goes to the address that was checked, redirects are not followed, and size and time are
bounded.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, urlsplit

from .errors import ApiError, bad
from .settings import Settings

SECONDS = 20.0
_PORTS = {"http": 80, "https": 443}


def fetch(address: str, settings: Settings, *, seconds: float = SECONDS, private: bool = False) -> bytes:
    """What is at an address, at most max_image_bytes of it. Raises ApiError.

    private: allow addresses that are not public; for tests, which have no others.
    """
    parts = _allowed(address, settings)
    host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
    where = _public_address(host, port, private)
    connection = _Pinned(host, port, where, parts.scheme == "https", seconds)
    # One end for the whole exchange: a timeout of the socket begins anew with each byte that comes.
    timer = threading.Timer(seconds, connection.abort)
    timer.daemon = True
    timer.start()
    try:
        path = parts.path or "/"
        connection.request("GET", f"{path}?{parts.query}" if parts.query else path, headers={"Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise _refused(f"{host} answered with status {answer.status}; redirects are not followed")
        data = answer.read(settings.max_image_bytes + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = " in time" if connection.aborted else ""
        raise _refused(f"the picture at {host} could not be downloaded{late}") from error
    finally:
        timer.cancel()
        connection.close()
    if connection.aborted:
        raise _refused(f"the picture at {host} could not be downloaded in time")
    if len(data) > settings.max_image_bytes:
        raise _refused(f"the picture at {host} has more than {settings.max_image_bytes} bytes")
    return data


def _refused(message: str) -> ApiError:
    return bad(message, "image_url", code="image_not_downloaded")


def _allowed(address: str, settings: Settings) -> SplitResult:
    """The parts of an address that may be called."""
    if not settings.fetch_hosts:
        raise bad(
            "image_url.url: this server downloads no pictures; send a data URI (data:image/png;base64,…)",
            "image_url",
            code="image_url_not_allowed",
        )
    try:
        if len(address) > 2048 or not address.isascii() or any(c <= " " or c in '\\"<>' for c in address):
            raise ValueError
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise bad("image_url.url: is no address of a picture", "image_url") from None
    names = [parts.hostname] if port in (None, _PORTS.get(parts.scheme)) else []
    names.append(f"{parts.hostname}:{port or _PORTS.get(parts.scheme)}")
    allowed = {name.lower() for name in settings.fetch_hosts}
    if parts.scheme not in _PORTS or parts.username or parts.password or not allowed & set(names):
        raise bad(
            "image_url.url: its host is not one from which this server downloads pictures; send a data URI",
            "image_url",
            code="image_url_not_allowed",
        )
    return parts


def _public_address(host: str, port: int, private: bool) -> str:
    """The address to connect to; every address of the host must be public."""
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise _refused(f"the host {host} was not found") from error
    if not private and not all(is_public(address) for address in found):
        raise _refused(f"the host {host} is in a private network, from which nothing is downloaded")
    return found[0]


def is_public(address: str) -> bool:
    """Whether an address is in the public internet; one that wraps another (IPv4 in IPv6) is as public as that."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class _Pinned(http.client.HTTPConnection):
    """A connection to one checked address under a host's name."""

    def __init__(self, host: str, port: int, address: str, tls: bool, seconds: float) -> None:
        super().__init__(host, port, timeout=min(seconds, 10.0))
        self._address, self._tls = address, tls
        self._end = time.monotonic() + seconds
        self.aborted = False
        self._socket: socket.socket | None = None  # `sock` is given away once the answer's head is read

    def connect(self) -> None:
        """Connects to the address; the certificate must be the host's."""
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._tls:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        self._socket = self.sock

    def abort(self) -> None:
        """Ends the exchange from another thread."""
        self.aborted = True
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

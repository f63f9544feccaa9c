"""Downloading pictures for clients: from allowed public hosts alone, bounded in size and time."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mindomni_rt.serving import fetch as module
from mindomni_rt.serving.errors import ApiError
from mindomni_rt.serving.fetch import fetch, is_public
from mindomni_rt.serving.settings import Settings
from serving.serving_tools import png

SETTINGS = Settings(fetch_hosts=("localhost", "example.com", "images.example.com:8443"), max_image_bytes=100_000)


class Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("location", "http://169.254.169.254/latest/meta-data/")
            self.end_headers()
            return
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        if self.path == "/picture.png?a=b":
            self.wfile.write(png())
        if self.path == "/large":
            for _ in range(200):
                self.wfile.write(b"x" * 1000)
        if self.path == "/slow":
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("localhost", 0), Pictures)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def on(port: int) -> Settings:
    return Settings(fetch_hosts=(f"LocalHost:{port}",), max_image_bytes=100_000)


def test_a_picture_is_downloaded(port: int) -> None:
    assert fetch(f"http://localhost:{port}/picture.png?a=b", on(port), private=True) == png()


def test_private_addresses_are_refused_even_on_allowed_hosts(port: int) -> None:
    with pytest.raises(ApiError, match="private network"):
        fetch(f"http://localhost:{port}/picture.png", on(port))


@pytest.mark.parametrize(("path", "words"), [("redirect", "302"), ("missing", "404"), ("large", "more than 100000")])
def test_answers_that_are_refused(port: int, path: str, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        fetch(f"http://localhost:{port}/{path}", on(port), private=True)


def test_the_whole_exchange_has_one_end(port: int) -> None:
    """Though a byte comes again and again, in the body or in the head."""
    with socket.create_server(("localhost", 0)) as silent:

        def dribble() -> None:
            connection, _ = silent.accept()
            with connection:
                try:
                    for _ in range(100):
                        connection.sendall(b"H")
                        time.sleep(0.05)
                except OSError:
                    return

        threading.Thread(target=dribble, daemon=True).start()
        for where in (port, silent.getsockname()[1]):
            began = time.monotonic()
            with pytest.raises(ApiError, match="in time"):
                fetch(f"http://localhost:{where}/slow", on(where), seconds=0.4, private=True)
            assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "address",
    [
        "http://other.example/a.png",
        "http://example.com.evil.example/a.png",
        "http://example.com@evil.example/a.png",
        "http://user:word@example.com/a.png",
        "http://example.com:8080/a.png",
        "http://images.example.com/a.png",
        "https://evil.example/?example.com",
        "http://evil.example\\@example.com/",
        "http://[::1]/",
        "http://127.0.0.1/",
        "http://2130706433/",
        "file:///etc/passwd",
        "ftp://example.com/a.png",
        "gopher://example.com/",
        "example.com/a.png",
        "//example.com/a.png",
        "http://example.com:99999999/",
        "http://exa mple.com/",
        "http://example.com/\r\nhost: x",
        "http://ex\u0430mple.com/",
        "http://example.com/" + "a" * 3000,
        "http://[/",
        "",
    ],
)
def test_addresses_that_are_not_called(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a host was looked up")

    monkeypatch.setattr(module.socket, "getaddrinfo", never)
    with pytest.raises(ApiError) as caught:
        fetch(address, SETTINGS)
    assert caught.value.status == 400 and caught.value.param == "image_url"


def test_off_unless_a_host_is_allowed() -> None:
    with pytest.raises(ApiError, match="downloads no pictures"):
        fetch("http://example.com/a.png", Settings())


def test_every_address_of_a_host_must_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to an address that was checked: a name that changes in between changes nothing."""
    asked: list[Any] = []

    def connect(address: Any, *_: Any) -> Any:
        asked.append(address)
        raise OSError("not connected in this test")

    def lookup(*found: str) -> None:
        info = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in found]
        monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: info)

    monkeypatch.setattr(module.socket, "create_connection", connect)
    for private in ("10.0.0.1", "127.0.0.1", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1"):
        lookup("93.184.216.34", private)
        with pytest.raises(ApiError, match="private network"):
            fetch("http://example.com/a.png", SETTINGS)
    assert not asked
    lookup("93.184.216.34")
    with pytest.raises(ApiError, match="could not be downloaded"):
        fetch("http://example.com/a.png", SETTINGS)
    assert asked == [("93.184.216.34", 80)]


def test_public_addresses() -> None:
    for address in ("93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"):
        assert is_public(address), address
    for address in (
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.1.2.3", "169.254.169.254", "172.16.0.1", "192.168.0.1", "224.0.0.1",
        "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "2001:0:7f00:1::",
    ):  # fmt: skip
        assert not is_public(address), address

"""Who may call, and what a hostile client can do: the limits, seen over real sockets."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest

import mindomni_rt
from mindomni_rt.errors import BadRequestError
from mindomni_rt.serving.settings import Settings
from serving.serving_tools import BUNDLE, PROMPT, Served, png, serving

PATH = "/v1/images/generations"
KEY = "a key of some length"


@pytest.fixture(scope="module")
def strict() -> Iterator[Served]:
    """A server with a key and small limits."""
    settings = Settings(
        api_key=KEY,
        names=("painter", "gpt-image-1"),
        max_body=200_000,
        max_body_total=300_000,
        max_image_bytes=100_000,
        max_image_pixels=10_000,
        header_seconds=0.5,
        body_seconds=0.5,
        write_seconds=0.5,
        max_connections=40,
    )
    with serving(settings) as found:
        yield found


def raw(served: Served, data: bytes, wait: float = 5.0) -> bytes:
    """What a server answers to bytes, up to its closing the connection."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=wait) as connection:
        connection.sendall(data)
        found = b""
        while piece := connection.recv(65536):
            found += piece
        return found


def error(answer: httpx.Response) -> dict[str, Any]:
    found = answer.json()
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}
    return dict(found["error"])


def test_the_key(strict: Served) -> None:
    with strict.http() as http:
        for headers in ({}, {"authorization": KEY}, {"authorization": "Bearer"}, {"authorization": f"Bearer {KEY}x"}):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                answer = http.get(path, headers=headers)
                assert answer.status_code == 401 and error(answer)["code"] == "invalid_api_key"
            assert http.post(PATH, headers=headers, content=b"x" * 1000).status_code == 401
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        assert http.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        strict.client().models.list()
    assert [m.id for m in strict.client(api_key=KEY).models.list()] == ["painter", "gpt-image-1"]
    assert KEY not in repr(strict.settings)
    with serving(Settings(api_key=KEY, open_metrics=True)) as served, served.http() as http:
        assert http.get("/metrics").status_code == 200 and http.get("/v1/models").status_code == 401
    for wrong in ("", "a\nb", "ü"):
        with pytest.raises(BadRequestError, match="API key"):
            Settings(api_key=wrong)


def test_pages_of_other_sites_may_not_call() -> None:
    """Neither from their own origin, nor under a name that they point at this machine."""
    rules = Settings(hosts=("localhost", "127.0.0.1"), origins=("https://friend.example",))
    with serving(rules) as served, served.http() as http:
        strangers = [{"origin": origin} for origin in ("https://evil.example", "null", "http://[")]
        for headers in (*strangers, {"host": "evil.example"}):
            answer = http.get("/v1/models", headers=headers)
            assert answer.status_code == 403 and error(answer)["code"] in ("origin_not_allowed", "host_not_allowed")
        for headers in ({"origin": served.url}, {"origin": "https://friend.example"}, {"host": "localhost:1"}):
            assert http.get("/v1/models", headers=headers).status_code == 200
        friend = http.get("/v1/models", headers={"origin": "https://friend.example"})
        assert friend.headers["access-control-allow-origin"] == "https://friend.example"
        asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert http.options(PATH, headers={"origin": "https://friend.example", **asking}).status_code == 200
        assert http.options(PATH, headers={"origin": "https://evil.example", **asking}).status_code == 403
        assert "access-control-allow-origin" not in http.get("/v1/models").headers
        # What a page may send without asking first is no JSON.
        answer = http.post(PATH, content=json.dumps({"prompt": "x"}), headers={"content-type": "text/plain"})
        assert answer.status_code == 400 and "application/json" in error(answer)["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000, b'{"n":' + b"9" * 9999],
)
def test_what_is_no_json_object(strict: Served, body: bytes) -> None:
    with strict.http(headers={"authorization": f"Bearer {KEY}"}) as http:
        for path in (PATH, "/v1/chat/completions"):
            answer = http.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400 and error(answer)["message"]
            assert error(answer)["code"] == ("invalid_value" if b"NaN" in body else "invalid_body")


def test_routes_and_methods(strict: Served) -> None:
    with strict.http(headers={"authorization": f"Bearer {KEY}"}) as http:
        assert error(http.get("/nowhere"))["code"] == "not_found"
        assert http.get(PATH).status_code == 405 and error(http.get(PATH))["code"] == "method_not_allowed"
        assert http.get("/docs").status_code == 404
        assert http.post("/v1/images/edits", json={"prompt": "x"}).status_code == 415


def head(length: int, *more: str, path: str = PATH, key: str = KEY) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"authorization: Bearer {key}", "content-type: application/json"]
    return "\r\n".join([*lines, f"content-length: {length}", *more, "", ""]).encode()


def test_bodies_that_are_too_large(strict: Served) -> None:
    """Refused by what they declare, before a byte is read; and without a length, once they are too long."""
    assert b" 413 " in raw(strict, head(10**12))
    assert b" 413 " in raw(strict, head(200_001))
    chunked = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + KEY.encode()
    chunked += b"\r\ntransfer-encoding: chunked\r\n\r\n" + (b"ffff\r\n" + b"x" * 65535 + b"\r\n") * 4
    assert b" 413 " in raw(strict, chunked)
    assert b" 400 " in raw(strict, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n")


def test_all_bodies_together_are_bounded(strict: Served) -> None:
    held = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(2)]
    try:
        answers = []
        for connection in held:
            connection.sendall(head(199_000) + b"x" * 180_000)
            time.sleep(0.1)
            connection.settimeout(5)
        answers = [connection.recv(4096) for connection in held]
    finally:
        for connection in held:
            connection.close()
    assert sorted(answer.split()[1] for answer in answers) == [b"408", b"503"]
    assert strict.client(api_key=KEY).models.list()


def test_slow_clients_are_disconnected(strict: Served) -> None:
    """Those that send no head, half a head, a head byte by byte, or half a body."""
    began = time.monotonic()
    assert raw(strict, b"") == b"" and raw(strict, b"GET /health HT") == b""
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection, pytest.raises(OSError):
        for byte in b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
            assert time.monotonic() - began < 20
    assert b" 408 " in raw(strict, head(1000) + b"{")
    # A connection that is kept alive has the same time for its next request.
    assert raw(strict, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET").count(b"HTTP/1.1 200") == 1


def test_a_client_that_does_not_read_is_disconnected(strict: Served) -> None:
    """It asks for megabytes and takes none: the connection is cut, not held."""
    request = f"GET /metrics HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n\r\n".encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", strict.port))
        connection.settimeout(10)
        with pytest.raises(ConnectionError):
            for _ in range(100_000):
                connection.sendall(request * 10)
    assert strict.client(api_key=KEY).models.list()


def test_heads_that_attack(strict: Served) -> None:
    """Too many headers, a split line, a smuggled body: refused by the parser; an id is taken only if it is one."""
    assert b" 400 " in raw(strict, b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n")
    both = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    assert raw(strict, both).split()[1] in (b"400", b"401")
    with strict.http() as http:
        good = http.get("/health", headers={"x-request-id": "abc-1.2_3"})
        assert good.headers["x-request-id"] == "abc-1.2_3"
        for bad in ("a b", "x" * 65, "a;b", "<script>"):
            found = http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
            assert found != bad and len(found) == 24
        assert good.headers["x-content-type-options"] == "nosniff" and "server" not in good.headers
    split = raw(
        strict, b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: a\rset-cookie: b\r\nconnection: close\r\n\r\n"
    )
    assert b"set-cookie" not in split.lower()


def form(http: httpx.Client, files: Any, **fields: str) -> httpx.Response:
    return http.post("/v1/images/edits", files=files, data={"prompt": "x", "think": "false", **fields})


def test_forms_that_attack(strict: Served) -> None:
    with strict.http(headers={"authorization": f"Bearer {KEY}"}) as http:
        ok = form(http, {"image": ("../../../tmp/owned.png", png(), "text/html")}, seed="1", num_inference_steps="1")
        assert ok.status_code == 200, ok.text
        assert form(http, {"image": ("a\r\nset-cookie: b", png())}).headers.get("set-cookie") is None
        many = [("image", ("a", b"x"))] * 10
        for files, fields, words in (
            (many, {}, "cannot be read"),
            ([("image", ("a", png())), ("image", ("b", png()))], {}, "2 pictures"),
            ({"mask": ("a", png())}, {}, "one picture"),
            ({"image": ("a", b"")}, {}, "cannot be read"),
            ({"image": ("a", b"<svg xmlns='http://www.w3.org/2000/svg'/>")}, {}, "expected one of PNG"),
            ({"image": ("a", b"%!PS-Adobe-3.0 EPSF-3.0")}, {}, "expected one of PNG"),
            ({"image": ("a", png())}, {f"f{i}": "1" for i in range(100)}, "cannot be read"),
            ({"image": ("a", png())}, {"seed": "9" * 5000}, "whole number"),
            ({"image": ("a", png())}, {"image": "/etc/passwd"}, "no option 'image'"),
        ):
            answer = form(http, files, **fields)
            assert answer.status_code == 400 and words in error(answer)["message"], answer.text
        answer = http.post("/v1/images/edits", content=b"--x", headers={"content-type": "multipart/form-data"})
        assert answer.status_code == 400


def test_pictures_that_explode_when_opened(strict: Served) -> None:
    """Refused by their header: nothing is decoded."""
    import io
    import zlib
    from struct import pack

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    size = 50_000
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", pack(">IIBBBBB", size, size, 1, 0, 0, 0, 0))
    bomb += chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")
    with strict.http(headers={"authorization": f"Bearer {KEY}"}) as http:
        for data in (bomb, png(101, 100)):
            answer = form(http, {"image": ("a", io.BytesIO(data))})
            assert answer.status_code in (400, 413) and "pixels" in error(answer)["message"], answer.text
        answer = form(http, {"image": ("a", b"\x89PNG" + b"x" * 100_001)})
        assert answer.status_code == 413 and "bytes" in error(answer)["message"]


def test_no_prompt_is_logged_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    secret = "a purple elephant at 5 Main Street"
    for log_prompts in (False, True):
        caplog.clear()
        with caplog.at_level(logging.DEBUG), serving(Settings(log_prompts=log_prompts, max_steps=5)) as served:
            client = served.client()
            client.images.generate(prompt=secret, extra_body={"seed": 1, "think": False})
            for extra in ({secret: 1}, {"num_inference_steps": 6}):
                with pytest.raises(openai.BadRequestError):
                    client.images.generate(prompt=secret, extra_body=extra)
            with pytest.raises(openai.NotFoundError):
                client.get(f"/{secret}", cast_to=object)
        ours = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith(("mindomni_rt", "uvicorn")))
        assert ("elephant" in ours) == log_prompts and "/v1/images/generations 200" in ours


def test_requests_are_counted(client: openai.OpenAI, served: Served) -> None:
    client.images.generate(prompt=PROMPT, extra_body={"seed": 1})
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="")
    with served.http() as http:
        http.get("/an/unknown/path")
        text = http.get("/metrics").text
    for line in (
        'mindomni_requests_total{outcome="200",route="/v1/images/generations"}',
        'mindomni_requests_total{outcome="invalid_value",route="/v1/images/generations"}',
        'mindomni_requests_total{outcome="not_found",route="other"}',
        "mindomni_queue_length 0.0",
        "mindomni_queue_seconds_count",
        'mindomni_stage_seconds_count{stage="denoiser"}',
        "mindomni_tokens_total",
        "mindomni_steps_total",
        "process_resident_memory_bytes",
    ):
        assert line in text, line
    assert "/an/unknown/path" not in text


def slow(**options: Any) -> dict[str, Any]:
    return {"prompt": "x", "num_inference_steps": 200, "size": "96x96", "think": False, **options}


def test_deadlines(served: Served) -> None:
    with served.http() as http:
        answer = http.post(PATH, json=slow(deadline=0.05))
        assert answer.status_code == 504 and error(answer)["code"] == "deadline"
        assert answer.headers["x-should-retry"] == "false"
        events = http.post(PATH, json=slow(deadline=0.3, stream=True, n=4)).text
        assert "event: error" in events and '"code": "deadline"' in events
        with pytest.raises(openai.APIError, match="deadline"):
            list(served.client().images.generate(prompt="x", stream=True, n=4, extra_body=slow(deadline=0.3)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_request(served: Served, stream: bool) -> None:
    value = served.engine.metrics.registry.get_sample_value
    labels = {"route": PATH, "outcome": "cancelled"}
    before, steps = value("mindomni_requests_total", labels) or 0, value("mindomni_steps_total") or 0
    body = json.dumps(slow(stream=stream, n=4)).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head(len(body)).replace(b"host: x", b"host: 127.0.0.1") + body)
        while (value("mindomni_steps_total") or 0) < steps + 5:
            time.sleep(0.005)
    end = time.monotonic() + 10
    while (value("mindomni_requests_total", labels) or 0) == before:
        assert time.monotonic() < end
        time.sleep(0.01)
    while served.engine._running:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert (value("mindomni_steps_total") or 0) < steps + 150


def test_full_queue_and_loading_over_http() -> None:
    hold = threading.Event()
    with serving(load=lambda: hold.wait(60) and mindomni_rt.load(BUNDLE)) as served, served.http() as http:
        assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 503
        answer = http.post(PATH, json={"prompt": "x"})
        assert answer.status_code == 503 and error(answer)["code"] == "loading" and answer.headers["retry-after"]
        hold.set()
    with serving(Settings(max_queue=1)) as served:
        client = served.client()
        bodies = [slow(prompt=str(i), n=3) for i in range(2)]
        threads = [threading.Thread(target=served.http().post, args=(PATH,), kwargs={"json": b}) for b in bodies]
        end = time.monotonic() + 20
        for thread, place in zip(threads, ("_running", "_waiting"), strict=True):
            thread.start()
            while not getattr(served.engine, place):
                assert time.monotonic() < end
                time.sleep(0.005)
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="x")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join(60)


def test_a_server_full_of_connections_still_says_that_it_lives() -> None:
    with serving(Settings(max_connections=5)) as served, ExitStack() as held:
        for _ in range(20):
            held.enter_context(socket.create_connection(("127.0.0.1", served.port)))
        with served.http() as http:
            assert http.get("/health").status_code == http.get("/ready").status_code == 200
            answer = http.get("/v1/models")
            assert answer.status_code == 503 and error(answer)["code"] == "busy"

"""The HTTP server: what it answers, what it refuses, and what becomes of requests when something goes wrong."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_safetensors

import radio_fast
from radio_fast.images import ImageError
from radio_fast.serve import gate, listen, service
from radio_fast.serve import server as server_module
from radio_fast.serve.embedder import Embedder
from radio_fast.serve.gate import OPEN
from radio_fast.serve.server import create_app
from radio_fast.serve.types import DeadlineExceeded, EmbedderClosed, QueueFull
from tests.conftest import golden_source
from tests.numerics import assert_relative
from tests.serve.live import Scripted, picture, result, serving, until


@pytest.fixture(scope="module")
def embedder():
    model = radio_fast.load(golden_source("vit_h16"), adaptor_names=["clip", "dino_v2"])
    with Embedder(model, resolution=64, max_tokens=256, max_pixels=10**6) as embedder:
        yield embedder


@pytest.fixture(scope="module")
def server(embedder):
    with serving(embedder, max_body_bytes=2**20) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def files(*images: bytes) -> list:
    return [("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(images)]


def error_of(answer: httpx.Response) -> dict:
    """Every error has OpenAI's form."""
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


# -- OpenAI's ---------------------------------------------------------------------------------------------------------


def test_openai_embeddings(client, embedder):
    images = [picture(1), picture(2, kind="JPEG"), picture(3, 100, 30, kind="WEBP")]
    wanted = [embedder.submit(image).result() for image in images]
    mime = "\n".join(b64(images[2])[i : i + 76] for i in range(0, len(b64(images[2])), 76))
    urlsafe = base64.urlsafe_b64encode(images[1]).decode().rstrip("=")
    assert "_" in urlsafe and "-" in urlsafe
    texts = [f"data:image/png;base64,{b64(images[0])}", urlsafe, f"DATA:image/webp;foo=bar;BASE64,{mime}"]
    answer = client.post("/v1/embeddings", json={"input": texts, "model": "tiny", "user": "me"})
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["object"] == "list" and content["model"] == "tiny"
    assert content["usage"] == {"prompt_tokens": 48, "total_tokens": 48}
    assert [(item["object"], item["index"]) for item in content["data"]] == [("embedding", i) for i in range(3)]
    for item, embedding in zip(content["data"], wanted, strict=True):
        assert_relative(torch.tensor(item["embedding"]), embedding.summary)

    for name in ("clip", "dino_v2"):
        asked = {"input": texts[0], "model": f"tiny:{name}", "encoding_format": "base64"}
        wide = wanted[0].outputs[name].summary
        wrong = client.post("/v1/embeddings", json=asked | {"dimensions": len(wide) + 1})
        assert error_of(wrong)["message"] == f"dimensions must be {len(wide)}"
        answer = client.post("/v1/embeddings", json=asked | {"dimensions": len(wide)})
        [item] = answer.json()["data"]
        assert_relative(torch.tensor(struct.unpack(f"<{len(wide)}f", base64.b64decode(item["embedding"]))), wide)
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny", "tiny:clip", "tiny:dino_v2"]


IMAGE = b64(picture())


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"input": IMAGE, "model": "gpt"}, 404, "model_not_found", "tiny, tiny:clip, tiny:dino_v2, got 'gpt'"),
        ({"input": IMAGE, "model": "\ud800"}, 400, "invalid_value", "body: Invalid JSON"),
        ({"input": IMAGE, "model": "\0"}, 404, "model_not_found", "x00"),
        ({"input": IMAGE, "model": "tiny:backbone"}, 404, "model_not_found", "tiny"),
        ({"input": IMAGE, "model": "tiny", "dimensions": 7}, 400, "invalid_value", "dimensions must be"),
        ({"input": IMAGE, "model": "tiny", "dimensions": float("nan")}, 400, "invalid_value", "integer"),
        ({"input": IMAGE, "model": "tiny", "encoding_format": "hex"}, 400, "invalid_value", "'float' or 'base64'"),
        ({"input": [], "model": "tiny"}, 400, "invalid_value", "at least 1 item"),
        ({"input": [IMAGE[:4]] * 257, "model": "tiny"}, 400, "invalid_value", "at most 256 items"),
        ({"input": {"image": IMAGE}, "model": "tiny"}, 400, "invalid_value", "input"),
        ({"input": None, "model": "tiny"}, 400, "invalid_value", "input"),
        ({"model": "tiny"}, 400, "invalid_value", "input: Field required"),
        ({"input": [IMAGE, "http://127.0.0.1/a.png"], "model": "tiny"}, 400, "url_not_fetched", "input[1]: URLs are"),
        ({"input": "file:///etc/passwd", "model": "tiny"}, 400, "url_not_fetched", "not fetched"),
        ({"input": "a photo of a cat!", "model": "tiny"}, 400, "invalid_image", "no data URI and no base64"),
        ({"input": "ümlaut", "model": "tiny"}, 400, "invalid_image", "base64"),
        ({"input": "data:image/png," + IMAGE, "model": "tiny"}, 400, "invalid_image", "data:image/…;base64,…"),
        ({"input": "data:", "model": "tiny"}, 400, "invalid_image", "data:image/…;base64,…"),
        ({"input": "data:text/html;base64," + IMAGE, "model": "tiny"}, 415, "not_an_image", "of no image"),
        ({"input": [IMAGE, b64(b"no image at all")], "model": "tiny"}, 415, "not_an_image", "image 1"),
        ({"input": "data:image/png;base64,", "model": "tiny"}, 415, "not_an_image", "image 0"),
    ],
)  # fmt: skip
def test_openai_errors(client, body, status, code, says):
    answer = client.post("/v1/embeddings", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (status, code), error
    assert says in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 200_000, b'{"input": 1e999}', b"1" * 5000]
)
def test_openai_bodies_that_are_no_request(client, content):
    answer = client.post("/v1/embeddings", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and error_of(answer)


def test_openai_bodies_are_json(client):
    for kind in ("", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        answer = client.post(
            "/v1/embeddings", content=b'{"input": "AA==", "model": "tiny"}', headers={"Content-Type": kind}
        )
        assert answer.status_code == 415 and error_of(answer)["code"] == "not_json"


def test_bodies_are_parsed_one_at_a_time_and_beside_the_server(monkeypatch):
    """Health is answered meanwhile."""
    together, most, go, read = [], [], threading.Event(), server_module.read_request

    def slow(body):
        together.append(body)
        most.append(len(together))
        assert go.wait(30)
        together.pop()
        return read(body)

    monkeypatch.setattr(server_module, "read_request", slow)
    with serving(Scripted(lambda number: result())) as running, ThreadPoolExecutor(3) as pool:
        body = {"input": "AA==", "model": "tiny"}
        asked = [pool.submit(httpx.post, f"{running.url}/v1/embeddings", json=body, timeout=60) for _ in range(3)]
        until(lambda: running.app.state.service.requests == 3 and together)
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        go.set()
        assert [one.result().status_code for one in asked] == [200] * 3
    assert most == [1] * 3


# -- /embed -----------------------------------------------------------------------------------------------------------


def test_embed_as_json(client, embedder):
    images = [picture(1), picture(2, 30, 90, kind="JPEG")]
    answer = client.post("/embed", files=files(*images), params={"adaptor": ["clip", "backbone", "clip"]})
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["model"] == "tiny" and [item["index"] for item in content["images"]] == [0, 1]
    for item, image in zip(content["images"], images, strict=True):
        wanted = embedder.submit(image).result()
        assert (item["height"], item["width"], item["grid"]) == (64, 64, [4, 4])
        assert list(item["summary"]) == ["clip", "backbone"]
        for name, values in item["summary"].items():
            assert_relative(torch.tensor(values), wanted.outputs[name].summary)
        assert min(item["seconds"].values()) >= 0 and item["seconds"]["total"] >= item["seconds"]["compute"] > 0
    assert answer.headers["server-timing"].startswith("decode;dur=")


def test_embed_as_safetensors(client, embedder):
    images = [picture(1), picture(2)]
    params = {"output": "both", "adaptor": ["backbone", "clip"], "resolution": "32x48"}
    answer = client.post("/embed", files=files(*images), params=params)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    found = load_safetensors(answer.content)
    names = {f"{i}.{name}{kind}" for i in (0, 1) for name in ("", "clip.") for kind in ("summary", "features")}
    assert set(found) == names
    header = json.loads(answer.content[8 : 8 + int.from_bytes(answer.content[:8], "little")])
    assert header["__metadata__"] == {"model": "tiny", "0.size": "32x48", "1.size": "32x48"}
    for i, image in enumerate(images):
        wanted = embedder.submit(image, features=True, resolution=(32, 48)).result()
        for name, prefix in (("backbone", ""), ("clip", "clip.")):
            summary, features = wanted.outputs[name]
            assert_relative(torch.from_numpy(found[f"{i}.{prefix}summary"]), summary)
            assert found[f"{i}.{prefix}features"].shape[:2] == (2, 3)
            assert_relative(torch.from_numpy(found[f"{i}.{prefix}features"]).flatten(0, 1), features)
    answer = client.post("/embed", files=files(*images), params={"format": "safetensors"})
    assert set(load_safetensors(answer.content)) == {"0.summary", "1.summary"}


def test_embed_as_npy(client, embedder):
    wanted = embedder.submit(picture(), features=True).result()
    answer = client.post("/embed", files=files(picture()), params={"output": "features", "format": "npy"})
    assert answer.headers["content-disposition"] == 'attachment; filename="embedding.npy"'
    features = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert features.shape[:2] == (4, 4) and features.dtype == np.float32
    assert_relative(torch.from_numpy(features).flatten(0, 1), wanted.features)
    answer = client.post("/embed", files=files(picture()), params={"format": "npy"})
    assert_relative(torch.from_numpy(np.load(io.BytesIO(answer.content))), wanted.summary)


@pytest.mark.parametrize(
    ("query", "count", "status", "says"),
    [
        ("output=all", 1, 400, "output: Input should be 'summary', 'features' or 'both'"),
        ("adaptor=sam", 1, 404, "backbone, clip, dino_v2, got 'sam'"),
        ("adaptor=" + "x" * 5000, 1, 404, "x'"),
        ("&".join(["adaptor=clip"] * 17), 1, 400, "adaptor"),
        ("output=features&format=json", 1, 400, "not as json"),
        ("format=npy", 2, 400, "one image"),
        ("format=npy&output=both", 1, 400, "one image"),
        ("format=npy&adaptor=clip&adaptor=backbone", 1, 400, "one image"),
        ("resolution=native", 1, 400, "resolution"),
        ("resolution=64x64x64", 1, 400, "resolution"),
        ("resolution=-16", 1, 400, "resolution"),
        ("resolution=٦٤", 1, 400, "resolution"),
        ("resolution=50", 1, 400, "48"),
        ("resolution=512", 1, 400, "resolution 512 has 1024 patches, at most 256"),
        ("resolution=99999", 1, 400, "at most 256"),
        ("deadline=nan", 1, 400, "deadline"),
        ("deadline=0", 1, 400, "greater than 0"),
        ("deadline=inf", 1, 400, "at most 30 seconds"),
        ("ouput=both", 1, 400, "ouput: Extra inputs are not permitted"),
        ("deadline=1e-9", 1, 504, "deadline"),
    ],
)
def test_embed_parameters(client, query, count, status, says):
    answer = client.post(f"/embed?{query}", files=files(*[picture()] * count))
    assert answer.status_code == status, answer.text
    message = error_of(answer)["message"]
    assert says in message and len(message) < 300


def test_what_can_not_be_is_refused_before_it_is_computed():
    embedder = Scripted()
    with serving(embedder) as running, httpx.Client(base_url=running.url) as client:
        head = "Host: x\nContent-Type: multipart/form-data; boundary=X\nContent-Length: 999"  # and no body
        for query in (
            "format=npy&output=both",
            "resolution=9999",
            "adaptor=x",
            "deadline=99",
            "output=features&format=json",
        ):
            assert raw(running.port, f"POST /embed?{query} HTTP/1.1\n{head}")[0] in (400, 404)
        assert client.post("/embed?format=npy", files=files(b"1", b"2")).status_code == 400
        answer = client.post("/v1/embeddings", json={"input": "AA==", "model": "tiny", "dimensions": 3})
        assert answer.status_code == 400 and error_of(answer)["message"] == "dimensions must be 4"
    assert not embedder.futures


def bomb(side: int) -> bytes:
    """A PNG of side² pixels in one bit each."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes((side // 8 + 1) * 200), 9)  # the first rows; the size is refused by its header
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        (b"", 415, "not_an_image"),
        (b"GIF89a" + b"\xff" * 100, 415, "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", 415, "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n", 415, "not_an_image"),
        (picture()[:-40], 415, "not_an_image"),
        (picture(height=1001, width=1001), 413, "image_too_large"),
        (bomb(50_000), 413, "image_too_large"),
        (
            b"GIF89a"
            + struct.pack("<HHBBB6sBHHHHBBBB", *2 * [65535], 128, 0, 0, b"", 44, 0, 0, *2 * [65535], 0, 8, 0, 59),
            413,
            "image_too_large",
        ),
    ],
    ids=["empty", "gif", "svg", "eps", "truncated", "large", "png-bomb", "gif-bomb"],
)
def test_files_that_are_no_image(client, image, status, code):
    """One of several fails the request, and is named; nothing is told of memory and files."""
    answer = client.post("/embed", files=files(picture(), image))
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (status, code)
    assert "image 1 " in error["message"] and "0x" not in error["message"] and "/" not in error["message"]


def part(name: str, content: bytes, filename: str | None = "a.png", extra: bytes = b"") -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
    return b"--X\r\nContent-Disposition: " + disposition.encode() + b"\r\n" + extra + b"\r\n" + content + b"\r\n"


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("multipart/form-data; boundary=X", part("images", picture()) + b"--X--\r\n", 200),
        ("Multipart/Form-Data; Boundary=X", part("images", picture(), "../../a\r\nX: y") + b"--X--\r\n", 200),
        ("multipart/form-data; boundary=X", part("images", picture(), "../../\0etc/ü.png") + b"--X--\r\n", 200),
        ("multipart/form-data; boundary=X", part("images", picture(), "") + b"--X--\r\n", 200),
        ("multipart/form-data; boundary=X", part("file", picture()) + b"--X--\r\n", 400),
        ("multipart/form-data; boundary=X", part("images", b"text", None) + b"--X--\r\n", 400),
        ("multipart/form-data; boundary=X", part("images", picture()) + part("output", b"both", None) + b"--X--", 400),
        ("multipart/form-data; boundary=X", part("images", picture()) + part("more", b"") + b"--X--", 400),
        ("multipart/form-data; boundary=X", part("images", b"") * 257 + b"--X--\r\n", 400),
        ("multipart/form-data; boundary=X", part("images", picture()) + b"--X--", 200),
        ("multipart/form-data; boundary=X", part("images", picture()), 400),
        ("multipart/form-data; boundary=X", part("images", picture()) + part("images", picture())[:-20], 400),
        ("multipart/form-data; boundary=X", b"--X--\r\n", 400),
        ("multipart/form-data; boundary=X", b"", 400),
        ("multipart/form-data; boundary=X", b"no parts", 400),
        ("multipart/form-data; boundary=X", part("images", picture(), extra=b"A: " + b"b" * 99_999 + b"\r\n"), 400),
        ("multipart/form-data", part("images", picture()) + b"--X--\r\n", 400),
        ("multipart/form-data; boundary=" + "X" * 4000, b"--X", 400),
        ("image/png", picture(), 415),
        ("application/x-www-form-urlencoded", b"images=x", 415),
        ("", picture(), 415),
    ],
)
def test_multipart_bodies(client, kind, body, status):
    answer = client.post("/embed", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert status == 200 or error_of(answer)


def test_paths_and_methods(server, client):
    for path in ("/nothing", "/embed/", "//embed", "/page/page.js", "/page.js/../../server.py", "/health/live/%2e%2e",
                 "/page.js%00", "/%2fpage.js", "/..%2fserver.py", "http://elsewhere/nothing"):  # fmt: skip
        status, _, body = raw(server.port, f"GET {path} HTTP/1.1\nHost: x")
        assert status == 404 and json.loads(body)["error"]["code"] == "not_found", path
    answer = client.get("/embed")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and error_of(answer)


# -- limits -----------------------------------------------------------------------------------------------------------


def raw(port: int, head: str, body: bytes = b"") -> tuple[int, dict, bytes]:
    """Send that and read one answer, whatever of the body is still missing."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, dict(answer.getheaders()), answer.read()


def test_a_body_too_large_is_refused_before_it_is_there(server):
    status, _, body = raw(server.port, "POST /embed HTTP/1.1\nHost: x\nContent-Length: 1048577")
    assert status == 413 and json.loads(body)["error"]["code"] == "body_too_large"
    status, _, body = raw(server.port, f"POST /v1/embeddings HTTP/1.1\nHost: x\nContent-Length: {'9' * 19}")
    assert status == 413
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    head = "POST /v1/embeddings HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\nContent-Type: application/json"
    status, _, body = raw(server.port, head, chunk * 17)
    assert status == 413 and "larger than 1048576 bytes" in json.loads(body)["error"]["message"]


def test_a_body_of_the_limit_is_taken(client):
    image = picture()
    content = b'--X\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + image
    content += bytes(2**20 - len(content) - len(b"\r\n--X--\r\n")) + b"\r\n--X--\r\n"
    assert len(content) == 2**20
    headers = {"Content-Type": "multipart/form-data; boundary=X"}
    assert client.post("/embed", content=content, headers=headers).status_code == 200
    assert client.post("/embed", content=content + b"x", headers=headers).status_code == 413


def test_a_body_that_does_not_arrive(server, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    head = "POST /embed HTTP/1.1\nHost: x\nContent-Type: multipart/form-data; boundary=X\nContent-Length: 9"
    status, _, body = raw(server.port, head, b"--X")
    assert status == 408 and json.loads(body)["error"]["code"] == "body_timeout"
    assert server.app.state.service.requests == 0


def test_a_body_that_arrives_byte_by_byte(server, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=X\r\nContent-Length: 9999"
    over = threading.Event()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + part("images", b""))

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not over.wait(0.02):
                    connection.sendall(b"-")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert connection.recv(12) == b"HTTP/1.1 408"
        finally:
            over.set()
            thread.join()


CHUNKED = (
    b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=X\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.mark.parametrize(
    "start",
    [b"GET /", b"GET / HTTP/1.1\r\nHost: x\r\nX: ", CHUNKED + b"1\r\n-\r\n0\r\nX: "],
    ids=["address", "header", "trailer"],
)
@pytest.mark.parametrize("endless", [b"a" * 1000, b"a\r\nX: " * 200], ids=["one", "many"])
def test_headers_without_an_end(start, endless):
    """Refused, and no longer kept, after some 100 kB."""
    with serving(Scripted()) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
            connection.sendall(start)
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 2**24:
                    connection.sendall(endless)
                    sent += len(endless)
            assert sent < 2**24, "16 MB were taken"
        until(lambda: not running.server.server_state.connections)
        assert httpx.get(f"{running.url}/health/live").status_code == 200


WISH = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n"


@pytest.mark.parametrize("parts", [1, 60], ids=["at once", "in parts"])
@pytest.mark.parametrize(
    "close, version", [(b"", b"1.1"), (b"Connection: close, Upgrade\r\n", b"1.1"), (b"", b"1.0")], ids=str
)
def test_a_wish_for_another_protocol_is_passed_over(close, version, parts):
    """The body is the request's, and what follows it another one."""
    with serving(Scripted(lambda number: result())) as running:
        body = part("images", b"x" * 1000) + b"--X--\r\n"
        head = b"POST /embed HTTP/%s\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=X\r\n" % version
        post = head + WISH + close + b"Content-Length: %d\r\n\r\n" % len(body) + body
        get = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade\r\nUpgrade: websocket\r\n\r\n"
        stays = not close and version == b"1.1"
        sent = post * 2 + get if stays else post
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
            step = -(-len(sent) // parts)
            for first in range(0, len(sent), step):
                connection.sendall(sent[first : first + step])
                time.sleep(0.001)
            answers = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answers.count(b"HTTP/1.1 200") == (3 if stays else 1) and b"HTTP/1.1 4" not in answers


def test_long_headers_and_many_small_chunks_are_taken():
    with serving(Scripted(lambda number: result())) as running:
        assert httpx.get(f"{running.url}/health/live", headers={"X": "a" * 60_000}).status_code == 200
        body = part("images", b"x" * 50_000) + b"--X--\r\n"
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
            connection.sendall(CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"


def test_all_bodies_together_are_limited():
    embedder = Scripted()
    with serving(embedder, max_body_bytes=1000) as running:
        head = (
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        )
        open_ones = [socket.create_connection(("127.0.0.1", running.port), timeout=30) for _ in range(8)]
        for connection in open_ones:
            connection.sendall(head + b" " * 999)
        until(lambda: running.app.state.service.requests == 8)
        small = {"url": f"{running.url}/v1/embeddings", "content": b" " * 100}
        headers = {"Content-Type": "application/json"}
        answers = []

        def refused() -> bool:
            answers.append(httpx.post(**small, headers=headers))
            return answers[-1].status_code == 429

        until(refused)
        assert error_of(answers[-1])["code"] == "queue_full" and answers[-1].headers["retry-after"] == "1"
        for connection in open_ones:
            connection.close()
        until(lambda: running.app.state.service.requests == 0)
        assert httpx.post(**small, headers=headers).status_code == 400


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
@pytest.mark.parametrize(
    "refusal, status, code",
    [(QueueFull("full", 2.3), 429, "queue_full"), (EmbedderClosed("closed"), 503, "shutting_down")],
)
def test_without_room_a_body_is_not_waited_for(path, refusal, status, code):
    """And the connection serves the next request, once the refused one's body has gone by."""
    embedder = Scripted(lambda number: result())
    with (
        serving(embedder) as running,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, 30)) as one,
    ):
        embedder.refusal = refusal
        body = part("images", b"x") + b"--X--\r\n"
        for _ in range(2):
            one.putrequest("POST", path)
            one.putheader("Content-Type", "multipart/form-data; boundary=X")
            one.putheader("Content-Length", str(len(body)))
            one.endheaders()
            answer = one.getresponse()
            assert answer.status == status and json.loads(answer.read())["error"]["code"] == code
            assert answer.headers["Retry-After"] == ("3" if status == 429 else "1")
            one.send(body)
        assert httpx.get(f"{running.url}{path}").status_code == 405
        embedder.refusal = None
        one.request("POST", "/embed", body, {"Content-Type": "multipart/form-data; boundary=X"})
        assert one.getresponse().status == 200
        assert len(embedder.futures) == 1 and httpx.get(f"{running.url}/v1/models").status_code == 200


def test_json_of_many_items_is_refused_before_it_is_parsed(client, monkeypatch):
    monkeypatch.setattr(server_module, "read_request", lambda *args: pytest.fail("parsed"))
    content = b'{"input":[' + b"1," * 4097 + b"1]}"
    for kind in ("application/json", "application/JSON; charset=utf-8", "application/vnd.x+json"):
        answer = client.post("/v1/embeddings", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400 and b"too many items" in answer.content


def test_features_of_many_images():
    embedder = Scripted()
    embedder.max_queue = 1000
    with serving(embedder) as running, ThreadPoolExecutor(4) as pool:
        url = f"{running.url}/embed?output=features"
        answer = httpx.post(url, files=files(*[b"x"] * 17))
        assert answer.status_code == 413 and "at most 16 images" in error_of(answer)["message"]
        asked = [pool.submit(httpx.post, url, files=files(*[b"x"] * 16), timeout=60) for _ in range(4)]
        until(lambda: len(embedder.futures) == 64)
        answer = httpx.post(url, files=files(b"x"))
        assert answer.status_code == 429 and error_of(answer)["code"] == "queue_full"
        for future in embedder.futures:
            future.set_result(result())
        assert [one.result().status_code for one in asked] == [200] * 4
        embedder.script = lambda number: result()
        assert httpx.post(url, files=files(b"x")).status_code == 200


LARGE = result(grid=(512, 512), width=16)  # an answer of 16 MB


@contextlib.contextmanager
def unread(running, query: str = "output=features&format=npy"):
    """Someone who asks for an answer, and has read nothing of it yet."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", running.port))
        body = part("images", b"x") + b"--X--\r\n"
        head = f"POST /embed?{query} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=X\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(12) == b"HTTP/1.1 200"
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(2**20), b""))


def test_an_answer_that_is_not_read_is_dropped(monkeypatch):
    """By the server, and what the system already has of it by the system."""
    monkeypatch.setattr(listen, "UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(gate, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(gate, "ANSWER_RATE", 2**40)
    with serving(Scripted(lambda number: LARGE)) as running, unread(running) as connection:
        until(lambda: 'path="/embed",status="499"' in httpx.get(f"{running.url}/metrics").text)
        assert running.app.state.service.requests == 0
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            until(lambda: not running.server.server_state.connections)
        with contextlib.suppress(ConnectionError):
            assert len(rest_of(connection)) < 2**24


def test_an_answer_that_is_not_read_holds_its_place(monkeypatch):
    monkeypatch.setattr(service, "DENSE_IMAGES_TOGETHER", 1)
    with serving(Scripted(lambda number: LARGE)) as running:
        url = f"{running.url}/embed?output=features"
        with unread(running) as connection:
            assert httpx.post(url, files=files(b"x")).status_code == 429
            assert running.app.state.service.requests == 1
            while running.app.state.service.requests:
                assert connection.recv(2**20)
        assert httpx.post(url, files=files(b"x")).status_code == 200


def test_a_drain_waits_for_an_answer_that_is_read_slowly(monkeypatch):
    monkeypatch.setattr(listen, "GRACE_SECONDS", 0)
    with serving(Scripted(lambda number: LARGE), drain_seconds=60) as running, unread(running) as connection:
        running.signal()
        assert not running.ended(0.5)
        content = rest_of(connection).partition(b"\r\n\r\n")[2]
        assert np.load(io.BytesIO(content)).shape == (512, 512, 16)
        assert running.ended()


def test_what_is_arriving_or_leaving_when_a_drain_ends(caplog, monkeypatch):
    monkeypatch.setattr(listen, "GRACE_SECONDS", 1)
    with (
        serving(Scripted(lambda number: LARGE), drain_seconds=600) as running, unread(running),
        socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection,
    ):  # fmt: skip
        head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=X\r\n"
        connection.sendall(f"{head}Content-Length: 999\r\n\r\n".encode() + part("images", b"1"))
        until(lambda: running.app.state.service.requests == 2)
        running.signal()
        running.signal()
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 503 and json.loads(answer.read())["error"]["code"] == "shutting_down"
        assert running.ended()
    assert not any(record.exc_info for record in caplog.records)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (QueueFull("full", 2.3), 429, "queue_full", "3"),
        (QueueFull("full", 0.0), 429, "queue_full", "1"),
        (DeadlineExceeded("late"), 504, "deadline_exceeded", None),
        (EmbedderClosed("closed"), 503, "shutting_down", "1"),
        (ImageError("/secret: broken"), 415, "not_an_image", None),
        (RuntimeError("CUDA error at /secret"), 500, "model_failed", None),
        (ValueError("secret"), 500, "model_failed", None),
    ],
)
@pytest.mark.parametrize("raised", [False, True], ids=["later", "at once"])
def test_failures_of_the_embedder(error, status, code, retry_after, raised):
    """The second image's; the first one is taken back."""

    def script(number):
        if number == 0:
            return None
        if raised:
            raise error
        return error

    if raised and isinstance(error, ValueError) and not isinstance(error, ImageError):
        status, code = 400, "invalid_value"  # submit's own, of its arguments
    embedder = Scripted(script)
    two = {
        "/embed": {"files": files(b"1", b"2")},
        "/v1/embeddings": {"json": {"input": ["AA==", "AA=="], "model": "tiny"}},
    }
    with serving(embedder) as running:
        for path, body in two.items():
            answer = httpx.post(running.url + path, **body)
            assert (answer.status_code, error_of(answer)["code"]) == (status, code)
            assert answer.headers.get("retry-after") == retry_after
            assert "secret" not in answer.text or (raised and code == "invalid_value")
            until(embedder.futures[0].cancelled)
            embedder.futures.clear()


def test_more_images_than_can_ever_be_held():
    with serving(Scripted()) as running:
        answer = httpx.post(f"{running.url}/embed", files=files(*[b"x"] * 5))
        assert answer.status_code == 413 and "4 images" in error_of(answer)["message"]


def test_a_result_that_is_not_finite():
    with serving(Scripted(lambda number: result(float("nan")))) as running:
        answer = httpx.post(f"{running.url}/v1/embeddings", json={"input": "AA==", "model": "tiny"})
        assert answer.status_code == 500 and error_of(answer)["code"] == "internal_error"
        answer = httpx.post(f"{running.url}/embed", files=files(b"x"), params={"output": "both"})
        assert answer.status_code == 200 and np.isnan(load_safetensors(answer.content)["0.summary"]).all()


def test_a_model_that_hangs():
    embedder = Scripted()
    with serving(embedder, deadline=0.2) as running:
        answer = httpx.post(f"{running.url}/embed", files=files(b"x"))
        assert answer.status_code == 504 and error_of(answer)["code"] == "deadline_exceeded"
        until(embedder.futures[0].cancelled)
        assert embedder.options[0]["deadline"] == 0.2
        answer = httpx.post(f"{running.url}/embed?deadline=0.05", files=files(b"x"))
        assert answer.status_code == 504 and embedder.options[1]["deadline"] == 0.05


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
def test_a_client_that_goes_takes_its_images_back(path):
    embedder = Scripted()
    body = b'{"input": ["AA==", "AA=="], "model": "tiny"}'
    kind = "application/json"
    if path == "/embed":
        body, kind = part("images", b"1") + part("images", b"2") + b"--X--\r\n", "multipart/form-data; boundary=X"
    with serving(embedder, deadline=600) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            until(lambda: len(embedder.futures) == 2)
            assert not any(future.done() for future in embedder.futures)
        until(lambda: all(future.cancelled() for future in embedder.futures))
        until(lambda: running.app.state.service.requests == 0)
        assert f'requests_total{{path="{path}",status="499"}} 1.0' in httpx.get(f"{running.url}/metrics").text


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
def test_a_client_that_goes_while_it_sends(path, caplog):
    with serving(Scripted()) as running:
        kind = "multipart/form-data; boundary=X" if path == "/embed" else "application/json"
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 999\r\n\r\n"
            connection.sendall(head.encode() + part("images", b"1"))
            until(lambda: running.app.state.service.requests == 1)
        until(lambda: running.app.state.service.requests == 0)
        assert f'requests_total{{path="{path}",status="499"}} 1.0' in httpx.get(f"{running.url}/metrics").text
    assert not caplog.records


def test_many_clients_at_once_each_get_their_own(server, embedder):
    """64 at a time, a third of whom hang up; the others' results are theirs."""
    images = [picture(seed) for seed in range(16)]
    wanted = [embedder.submit(image).result().summary for image in images]

    def ask(number: int) -> None:
        image = images[number % 16]
        body = part("images", image) + b"--X--\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=X\r\n"
            connection.sendall(
                f"{head}Content-Length: {len(body)}\r\n\r\n".encode()
                + body[: len(body) // 2 if number % 6 == 0 else None]
            )
            if number % 3 == 0:
                return
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            content = json.loads(answer.read())
            assert answer.status == 200, content
            got = torch.tensor(content["images"][0]["summary"]["backbone"])
            assert_relative(got, wanted[number % 16])

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(ask, range(192)))
    until(lambda: server.app.state.service.requests == 0)
    until(lambda: embedder.metrics.snapshot().queue_depth == 0)


# -- a server's life --------------------------------------------------------------------------------------------------


def test_ready_when_warm():
    made, go = threading.Event(), threading.Event()

    def make():
        made.set()
        go.wait(30)
        return Scripted(lambda number: result())

    with serving(make, wait=False) as running, httpx.Client(base_url=running.url) as client:
        made.wait(30)
        assert client.get("/health/live").json() == {"status": "ok"}
        answers = [client.get("/health/ready"), client.get("/v1/models"), client.post("/embed", files=files(b"x"))]
        answers.append(client.post("/v1/embeddings", json={"input": "AA==", "model": "tiny"}))
        for answer in answers:
            assert answer.status_code == 503 and error_of(answer)["message"] == "the model is being loaded"
            assert answer.headers["retry-after"] == "1"
        assert "radio_fast_ready 0.0" in client.get("/metrics").text
        go.set()
        until(lambda: client.get("/health/ready").status_code == 200)
        assert client.post("/embed", files=files(b"x")).status_code == 200
        assert "radio_fast_ready 1.0" in client.get("/metrics").text


def test_a_model_that_can_not_be_loaded_ends_the_server():
    def make():
        raise ValueError("no such model")

    with serving(make, wait=False) as running:
        assert running.ended()
        assert str(running.app.state.service.failure) == "no such model"


def test_a_signal_lets_requests_finish():
    embedder = Scripted()
    with serving(embedder, drain_seconds=60) as running, ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(httpx.post, f"{running.url}/embed", files=files(b"x"), timeout=60) for _ in range(2)]
        until(lambda: len(embedder.futures) == 2)
        with httpx.Client(base_url=running.url) as client:
            assert client.get("/health/ready").status_code == 200
            running.signal()
            answer = client.get("/health/ready")
            assert answer.status_code == 503 and error_of(answer)["message"] == "the server is shutting down"
            assert answer.headers["connection"] == "close"
            assert client.get("/health/live").status_code == 200
            assert "radio_fast_http_requests_in_flight 2.0" in client.get("/metrics").text
            answer = client.post("/embed", files=files(b"y"))
            assert answer.status_code == 503 and error_of(answer)["code"] == "shutting_down"
            assert answer.headers["retry-after"] == "1" and len(embedder.futures) == 2
        assert not running.ended(0.3)
        for number, future in enumerate(embedder.futures):
            future.set_result(result(number))
        values = {answer.result().json()["images"][0]["summary"]["backbone"][0] for answer in accepted}
        assert values == {0.0, 1.0}
        assert running.ended()


@pytest.mark.parametrize(("drain_seconds", "signals"), [(0.2, 1), (600, 2)])
def test_a_drain_is_bounded(drain_seconds, signals):
    """By its time, and by a second signal: what is not done by then fails, with an answer."""
    embedder = Scripted()
    with serving(embedder, drain_seconds=drain_seconds) as running, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(httpx.post, f"{running.url}/embed", files=files(b"x"), timeout=60)
        until(lambda: embedder.futures)
        for _ in range(signals):
            running.signal()
        assert accepted.result(30).status_code == 503
        assert running.ended()


def test_only_an_embedder_made_here_is_closed_here():
    own, others = Scripted(), Scripted()
    for source in (lambda: own, others):
        with serving(source) as running:
            running.signal()
            assert running.ended()
    assert own.closed and not others.closed


# -- keys, headers, metrics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["secret", "s3cr:et "])
def test_a_key(key):
    embedder = Scripted(lambda number: result())
    with serving(embedder, api_key=key) as running, httpx.Client(base_url=running.url) as client:
        for path in OPEN:
            assert client.get(path).status_code == client.head(path).status_code == 200, path
        right = b"Bearer " + key.strip().encode()
        for header in (None, b"", b"Bearer", b"Bearer wrong", b"Basic " + key.strip().encode(), key.strip().encode(),
                       right + b"x", right[:-3], b"Bearer \xff"):  # fmt: skip
            headers = {} if header is None else {b"Authorization": header}
            for path in ("/v1/models", "/metrics", "/nothing", "/health/live/"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401, (header, path)
                assert error_of(answer)["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
            # The body is not waited for.
            assert client.post("/embed", headers=headers, files=files(b"x")).status_code == 401
        for header in (right, b"bearer  " + key.strip().encode()):
            assert client.get("/v1/models", headers={b"Authorization": header}).status_code == 200
            assert client.post("/embed", headers={b"Authorization": header}, files=files(b"x")).status_code == 200


def test_arguments():
    for options, says in (
        ({"model_name": ""}, "model_name"),
        ({"api_key": " "}, "api_key must be printable ASCII, and not empty"),
        ({"api_key": "gehé️im"}, "api_key must be printable ASCII"),
        ({"api_key": "a\nb"}, "api_key must be printable ASCII"),
        ({"max_body_bytes": 0}, "max_body_bytes must be a positive number"),
        ({"deadline": float("nan")}, "deadline must be a positive number"),
    ):
        with pytest.raises(ValueError, match=says):
            create_app(Scripted(), **({"model_name": "tiny"} | options))


def test_metrics(embedder):
    before = embedder.metrics.snapshot()
    with serving(embedder) as running, httpx.Client(base_url=running.url) as client:
        client.post("/embed", files=files(picture(), picture()))
        client.post("/embed", files=files(b"no image"))
        for number in range(30):
            client.get(f"/nothing/{number}")
        text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['radio_fast_http_requests_total{path="/embed",status="200"}'] == "1.0"
    assert values['radio_fast_http_requests_total{path="/embed",status="415"}'] == "1.0"
    assert values['radio_fast_http_requests_total{path="other",status="404"}'] == "30.0"
    assert not any("nothing" in name for name in values)
    assert float(values["radio_fast_images_completed_total"]) == before.completed + 2
    assert float(values['radio_fast_images_failed_total{kind="image"}']) == before.failed.get("image", 0) + 1
    assert values['radio_fast_image_total_seconds_bucket{le="+Inf"}'] == values["radio_fast_images_completed_total"]
    assert values["radio_fast_queue_depth"] == "0.0"


def test_below_a_prefix():
    """A proxy takes it off, and ASGI's path has it again."""
    with serving(Scripted(lambda number: result()), api_key="secret") as running:
        running.server.config.root_path = "/here"
        with httpx.Client(base_url=running.url) as client:
            for path in OPEN:
                assert client.get(path).status_code == 200, path
            assert client.get("/metrics").status_code == client.get("/v1/models").status_code == 401
            client.headers["Authorization"] = "Bearer secret"
            assert client.post("/embed", files=files(b"x")).status_code == 200
            assert 'requests_total{path="/embed",status="200"} 1.0' in client.get("/metrics").text


def test_headers_of_the_page(client):
    for path, kind in (("/", "html"), ("/docs", "html"), ("/page.js", "javascript"), ("/docs.js", "javascript"),
                       ("/page.css", "css")):  # fmt: skip
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(f"text/{kind}")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "access-control-allow-origin" not in client.get("/", headers={"Origin": "http://evil"}).headers

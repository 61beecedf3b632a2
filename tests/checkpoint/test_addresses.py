"""MODEL.WEIGHTS as an address: the file, or one line that says what to do."""

import http.server
import socket
import threading

import pytest

from virtex_d2.checkpoint.source import local_path
from virtex_d2.engine.errors import InputError

ADVICE = "Download it where that works, and give the file's path."


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # the base class's name
        code = {"/there.pth": 200, "/forbidden.pth": 403}.get(self.path, 404)
        if self.path == "/cut.pth":  # ends before what it announces
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"short")
            return
        self.send_response(code)
        self.end_headers()
        self.wfile.write(b"weights" if code == 200 else b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of this machine; downloads go into a cache of the test."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def refused(address):
    with pytest.raises(InputError) as caught:
        local_path(address)
    message = str(caught.value)
    assert message.startswith(f"{address}: ")
    assert message.endswith(ADVICE)
    assert "\n" not in message
    return message


def test_a_file_is_fetched(server):
    for address in (f"{server}/there.pth", f"HTTP{server[4:]}/there.pth"):
        with open(local_path(address), "rb") as file:
            assert file.read() == b"weights"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("forbidden.pth", "HTTP Error 403"),
        ("absent.pth", "HTTP Error 404"),
        ("cut.pth", "retrieval incomplete"),
    ],
)
def test_what_a_server_does_not_give_is_one_line(path, reason, server):
    assert reason in refused(f"{server}/{path}")


def test_a_port_that_nobody_listens_on_is_one_line(server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, so that no other process listens there
        assert "refused" in refused(f"http://127.0.0.1:{unused.getsockname()[1]}/R-50.pkl")


def test_a_name_that_detectron2_does_not_have_is_one_line(server, monkeypatch):
    from detectron2.utils.file_io import Detectron2Handler

    monkeypatch.setattr(Detectron2Handler, "S3_DETECTRON2_PREFIX", f"{server}/zoo/")
    assert "HTTP Error 404" in refused("detectron2://ImageNetPretrained/R-51.pkl")
    refused("catalog://ImageNetPretrained/None")


@pytest.mark.parametrize(
    "address",
    ["s3://bucket/R-50.pkl", "gs://bucket/a.pth", "torchvision://resnet50", "hf://me/model"],
)
def test_a_scheme_that_is_not_known_is_one_line_with_those_that_are(address):
    message = refused(address)
    assert "https://" in message
    assert "detectron2://" in message


def test_paths_stay_as_they_are():
    for path in ("", "output/backbone.safetensors", "/a:/b.pth", "C:/x.pth"):
        assert local_path(path) == path
    assert local_path("file:///a%20b/c.pth") == "/a b/c.pth"

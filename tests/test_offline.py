"""The server of the page fetches nothing, whatever address it is sent."""

import contextlib
import http.client
import json
import socket
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs the extra [app]")

from api import call

import genssm
from genssm.interface import bodies, uploads
from genssm.interface.house import House
from genssm.interface.page import build_page, launch

ADDRESSES = (
    "http://example.com/photo.png",
    "https://example.com/photo.png",
    "http://169.254.169.254/latest/meta-data",
)


@pytest.fixture(scope="module")
def asked() -> Iterator[list[Any]]:
    """The hosts that anything in this process has asked for, but for this machine."""
    hosts: list[Any] = []
    find, connect = socket.getaddrinfo, socket.socket.connect

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", None):
            hosts.append(host)
            raise socket.gaierror("there is no network in this test")
        return find(host, *args, **kwargs)

    def connecting(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            hosts.append(address)
            raise OSError("there is no network in this test")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        patch.setattr(socket.socket, "connect", connecting)
        yield hosts


@pytest.fixture(scope="module")
def site(asked: list[Any]) -> Iterator[str]:
    """The address of the page, which asked for nothing when it started."""
    page = build_page(House())
    launch(page, prevent_thread_lock=True, quiet=True)
    assert asked == []
    yield page.local_url
    page.close()


def file_at(place: str, **others: Any) -> dict[str, Any]:
    return {"path": place, "meta": {"_type": "gradio.FileData"}, **others}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_in_the_place_of_a_file_is_refused(
    site: str, asked: list[Any], address: str
) -> None:
    for endpoint, data in (
        ("draw", ["any", 1, 0.9, 1, file_at(address), 16, 1]),
        ("speak", ["7", "any", 1, 0, 0.9, "× 1", file_at(address), 1]),
        ("write", [file_at(address), 10, 0.8, 0.95, 1, 1]),  # where no file belongs
    ):
        answer = call(site, endpoint, data)
        assert "event: error" in answer
        assert "An address is not fetched; send the file itself." in answer
    assert asked == []


def test_the_address_of_a_file_beside_its_path_is_not_followed(site: str, asked: list[Any]) -> None:
    upload = file_at(f"{tempfile.gettempdir()}/gradio/nowhere.png", url=ADDRESSES[0])
    assert "event: error" in call(site, "draw", ["any", 1, 0.9, 1, upload, 16, 1])
    assert asked == []


@pytest.mark.parametrize("way", ["file=", "file/", "proxy="])
def test_the_server_hands_on_nothing_from_elsewhere(site: str, asked: list[Any], way: str) -> None:
    for address in ADDRESSES:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{site}gradio_api/{way}{address}")
        assert 400 <= refused.value.code < 500
    assert asked == []


def test_files_of_the_server_are_no_uploads(site: str) -> None:
    for secret in ("/etc/passwd", __file__):
        answer = call(site, "draw", ["any", 1, 0.9, 1, file_at(secret), 16, 1])
        assert "event: error" in answer
        assert secret not in answer
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{site}gradio_api/file={secret}")
        assert refused.value.code in (403, 404)


def test_nothing_is_written_but_temporary_files(site: str) -> None:
    """And compiled code, once, in the cache folders of Python."""
    root = Path(genssm.__file__).parent.parent

    def files() -> dict[Path, float]:
        found = (p for p in root.rglob("*") if p.is_file())
        kept = (p for p in found if not {"__pycache__", ".git"} & set(p.parts))
        return {p: p.stat().st_mtime for p in kept if "cache" not in str(p.relative_to(root))}

    before = files()
    for endpoint, data, suffix in (
        ("draw", ["any", 1, 0.9, 1, None, 31, 1], "png"),
        ("speak", ["7", "any", 0.3, 0, 0.9, "× 1", None, 1], "wav"),
    ):
        made = json.loads(call(site, endpoint, data).rsplit("data: ", 1)[1])[0]
        assert made["path"].endswith(suffix)
        assert Path(made["path"]).is_relative_to(tempfile.gettempdir())
    assert files() == before


@pytest.mark.parametrize("told", [True, False])
def test_requests_have_a_largest_size(site: str, told: bool) -> None:
    """Whether it is told in advance, as a length, or not."""
    body = json.dumps({"data": ["frog" * bodies.MOST, 1, 0.9, 1, None, 16, 1]}).encode()
    host, port = urllib.parse.urlsplit(site).netloc.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    pieces: Any = body if told else iter([body[: bodies.MOST], body[bodies.MOST :]])
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", "/gradio_api/call/draw", pieces, encode_chunked=not told)
    answer = connection.getresponse()
    assert answer.status == 413
    assert b"a request may have 3 MiB" in answer.read()
    connection.close()


def test_many_files_at_once_are_refused(site: str) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = (head + b"\0" * uploads.BYTES + b"\r\n") * 2 + b"--x--\r\n"
    request = urllib.request.Request(
        f"{site}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as refused:
        urllib.request.urlopen(request)
    assert getattr(refused.value, "code", 413) == 413
    assert urllib.request.urlopen(site).status == 200  # it was no server that had died


@pytest.mark.parametrize(
    ("endpoint", "data", "message"),
    [
        ("write", ["The river", "twenty", 0.8, 0.95, 1, 1], "Tokens cannot be 'twenty'."),
        ("write", ["The river", None, 0.8, 0.95, 1, 1], "Tokens cannot be None."),
        ("write", ["The river", 10, 0.8, 0.95, 1, "x"], "Seed (−1: a new one) cannot be 'x'."),
        ("write", ["The river", 10, 0.8, 0.95, 1, 1.5], "A seed is a whole number"),
        ("draw", ["frog", [1], 0.9, 1, None, 16, 1], "Pictures cannot be [1]."),
    ],
)
def test_wrong_types_are_one_sentence(
    site: str, endpoint: str, data: list[Any], message: str
) -> None:
    answer = call(site, endpoint, data)
    assert "event: error" in answer
    assert message in json.loads(answer.rsplit("data: ", 1)[1])["error"]


def test_what_is_refused_is_neither_sent_back_nor_logged(
    site: str, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = call(site, "draw", ["x" * 100_000, 4, 0.9, 1, None, 16, 1])
    assert "Value: 'xxx" in json.loads(answer.rsplit("data: ", 1)[1])["error"]
    assert len(answer) < 1000
    assert "xxx" not in "".join(capfd.readouterr())


def test_an_upload_over_the_limit_is_refused_as_it_arrives(site: str) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + b"\0" * (uploads.BYTES + 1) + b"\r\n--x--\r\n"
    request = urllib.request.Request(
        f"{site}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413

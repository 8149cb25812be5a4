"""What a site holds, what is refused, and that the server gives out nothing else."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.web.conftest import WASM, write_export
from vlmexport.api import make_site, make_site_server, write_site
from vlmexport.cli.main import run
from vlmexport.errors import ArtifactError, BadInputError
from vlmexport.web.server import SiteServer

MODEL = (
    "README.md", "config.json", "onnx/decoder_model_merged.onnx", "onnx/decoder_model_merged.onnx_data",
    "onnx/decoder_model_merged_q4.onnx",
)  # fmt: skip
FILES = {
    "site.json", "index.html", "page.css", "web.css", "page.js", "worker.js", "transformers.js",
    *(f"wasm/{name}" for name in WASM), *(f"model/{name}" for name in MODEL),
}  # fmt: skip


@pytest.fixture
def server(export: Path, library: Path) -> Iterator[SiteServer]:
    made = make_site_server(make_site(export, transformersjs=library), port=0)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def get(server: SiteServer, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_a_site_is_the_page_the_library_and_the_model(export: Path, library: Path) -> None:
    site = make_site(export, transformersjs=library)
    assert set(site.files) == FILES
    about = json.loads(bytes(site.files["site.json"]))  # type: ignore[arg-type]
    assert about["dtypes"] == [{"name": "q4", "bytes": 100}, {"name": "fp32", "bytes": 1200}]
    assert (about["name"], about["images_first"], about["library"]) == ("tiny-web", True, "transformers.js")
    assert "http" not in site.headers["Content-Security-Policy"]


def test_what_a_browser_cannot_load_is_refused(tmp_path: Path, export: Path) -> None:
    split = write_export(tmp_path / "split", layout="split")
    with pytest.raises(BadInputError, match=r"has layout split, .* --layout transformersjs"):
        make_site(split)
    with pytest.raises(ArtifactError, match="is not a vlmexport export"):
        make_site(tmp_path)
    assert run(["web", str(split)]) == 2
    assert run(["web", str(export)]) == 4
    assert run(["web", str(export), "--cdn", "https://x/npm", "--transformersjs", "y"]) == 2
    assert run(["web", str(export), "--force"]) == 2


def test_every_file_comes_with_its_type_and_isolated(server: SiteServer) -> None:
    types = {"index.html": "text/html", "worker.js": "text/javascript", f"wasm/{WASM[1]}": "application/wasm"}
    for name, kind in types.items():
        response, body = get(server, f"/{name}")
        assert (response.status, len(body)) == (200, int(response.headers["Content-Length"]))
        assert response.headers.get_content_type() == kind
        assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert "'wasm-unsafe-eval'" in response.headers["Content-Security-Policy"]
    assert get(server, "/")[1] == get(server, "/index.html")[1]
    response, body = get(server, "/model/config.json", "HEAD")
    assert (response.status, body) == (200, b"")


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        ("bytes=0-0", 206, bytes([0])),
        ("bytes=10-12", 206, bytes([10, 11, 12])),
        ("bytes=98-", 206, bytes([98, 99])),
        ("bytes=98-500", 206, bytes([98, 99])),
        ("bytes=500-", 200, bytes(range(100))),
        ("bytes=5-2", 200, bytes(range(100))),
        ("bytes=-1", 200, bytes(range(100))),
    ],
)
def test_a_part_of_a_file(server: SiteServer, asked: str, status: int, expected: bytes) -> None:
    response, body = get(server, "/model/onnx/decoder_model_merged_q4.onnx", Range=asked)
    assert (response.status, body) == (status, expected)


@pytest.mark.parametrize(
    "path",
    [
        "/../npm/node_modules/@huggingface/transformers/package.json",
        "/model/../manifest.json",
        "/model/%2e%2e/%2e%2e/npm",
        "/model/manifest.json",
        "/model/folded.safetensors",
        "//etc/passwd",
        "/wasm/",
        "/model",
        "/%00",
    ],
)
def test_nothing_else_is_given_out(server: SiteServer, path: str) -> None:
    assert get(server, path)[0].status == 404


def test_only_names_of_this_machine_are_answered(server: SiteServer) -> None:
    assert get(server, "/", Host="evil.example")[0].status == 403
    assert get(server, "/", Host=f"localhost:{server.server_port}")[0].status == 200


def test_a_file_that_is_gone_is_not_found(server: SiteServer, export: Path) -> None:
    (export / "config.json").unlink()
    assert get(server, "/model/config.json")[0].status == 404


def test_a_taken_port_is_refused(server: SiteServer) -> None:
    with pytest.raises(BadInputError, match="something else listens there; choose another --port"):
        make_site_server(server.site, port=server.server_port)


def test_out_writes_a_folder_that_needs_nothing_else(tmp_path: Path, export: Path, library: Path) -> None:
    out = tmp_path / "site"
    assert run(["web", str(export), "--transformersjs", str(library), "--out", str(out)]) == 0
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {*FILES, "_headers"}
    assert not any(p.is_symlink() for p in out.rglob("*"))
    for name in MODEL:
        assert (out / "model" / name).read_bytes() == (export / name).read_bytes()
    headers = (out / "_headers").read_text()
    assert headers.startswith("/*\n  Cross-Origin-Opener-Policy: same-origin\n")
    site = make_site(export, transformersjs=library)
    with pytest.raises(BadInputError, match="--force"):
        write_site(site, out)
    (out / "left-over").touch()
    write_site(site, out, force=True)
    assert not (out / "left-over").exists()
    with pytest.raises(BadInputError, match="not empty"):
        write_site(site, export)


def test_a_mirror_is_named_in_the_policy_and_in_no_other_case(export: Path) -> None:
    policy = make_site(export, cdn="https://mirror.example/npm").headers["Content-Security-Policy"]
    assert "connect-src 'self' https://mirror.example blob:;" in policy
    assert "http" not in policy.replace("https://mirror.example", "")

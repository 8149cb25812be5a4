"""The page of ``vlmexport web`` under a headless Chromium: it answers, and asks nobody but its own server."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.clients.workplace import Clients
from vlmexport.api import answer_prompt, export_onnx, make_site, make_site_server, write_site
from vlmexport.demo import frozen_questions
from vlmexport.dtypes import WEB_LAYOUT
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import make_scheme
from vlmexport.runtime.sampling import Sampling
from vlmexport.web.library import PACKAGE, RUNTIME, RUNTIME_VERSION, VERSION

pytestmark = pytest.mark.slow

TIMINGS = {"load", "time to first token", "answer", "tokens"}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "demo"
    options = OnnxOptions(layout=WEB_LAYOUT, dtypes=("q4", "fp32"), scheme=make_scheme("rtn"), scheme_named=True)
    export_onnx("demo", out, options, verify=False)
    return out


def ask(clients: Clients, folder: Path, address: str, *asks: dict[str, Any], also: str = "") -> dict[str, Any]:
    """What the page at `address` showed; nothing but its origin and `also` was to be asked, and nothing complained."""
    folder.mkdir(exist_ok=True)
    job = folder / "job.json"
    origins = [re.sub(r"(//[^/]+/).*", r"\1", address), *([also] if also else [])]
    job.write_text(json.dumps({"address": address, "origins": origins, "asks": asks}))
    found = clients.web(job)
    assert found["foreign"] == [], found["foreign"]
    assert found["errors"] == []
    for shown in found["results"]:
        assert shown["error"] == ""
        assert shown["timings"].keys() == TIMINGS
    return found


def question(task: str, dtype: str = "q4", tokens: int = 32) -> dict[str, Any]:
    found = next(q for q in frozen_questions() if q.task == task)
    return {"dtype": dtype, "image": str(found.image), "text": found.question, "tokens": tokens}


def test_the_page_answers_as_python_does(export: Path, clients: Clients, tmp_path: Path) -> None:
    """The command itself; pictures of the model's own size, so that the browser's pixels are Python's."""
    command = [sys.executable, "-m", "vlmexport", "web", str(export), "--port", "0", "--json", "-", "--transformersjs"]
    with subprocess.Popen([*command, str(clients.transformersjs)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline() for _ in range(3)]
            address = json.loads("".join(lines))["address"]
            asks = [question("describe"), question("word"), question("describe", "fp32")]
            found = ask(clients, tmp_path, address, *asks)
        finally:
            process.terminate()
    assert found["isolated"]
    for asked, shown in zip(asks, found["results"], strict=True):
        sampling = Sampling(max_new_tokens=asked["tokens"])
        image = Path(asked["image"])
        expected = answer_prompt(export, [image], asked["text"], sampling, lambda text: None, dtype=asked["dtype"])
        assert shown["answer"].strip() == expected.text.strip() != ""
    assert len({shown["answer"] for shown in found["results"][:2]}) == 2
    assert any(url.endswith(".wasm") for url in found["requests"])


def test_without_a_picture_and_stopped(export: Path, clients: Clients, tmp_path: Path) -> None:
    server = make_site_server(make_site(export, transformersjs=clients.transformersjs), port=0)
    asks = [
        {"dtype": "q4", "image": None, "text": "What word is written?", "tokens": 3},
        {**question("describe"), "stop": True},
    ]
    with serving(server):
        alone, stopped = ask(clients, tmp_path, server.address, *asks)["results"]
    assert alone["answer"]
    assert stopped["timings"]["tokens"].endswith(" 1 answer (stopped)")


def test_static_files_below_another_page(export: Path, clients: Clients, tmp_path: Path) -> None:
    """A host that sets no headers, and a folder that is not its root: one thread, the same answer."""
    write_site(make_site(export, transformersjs=clients.transformersjs), tmp_path / "host" / "deep" / "site")
    with serving(plain_server(tmp_path / "host")) as address:
        found = ask(clients, tmp_path / "job", f"{address}deep/site/index.html", question("word"))
    assert not found["isolated"]
    assert found["results"][0]["answer"]


def test_a_mirror_that_was_named(export: Path, clients: Clients, tmp_path: Path) -> None:
    places = {f"{PACKAGE}@{VERSION}": PACKAGE, f"{RUNTIME}@{RUNTIME_VERSION}": RUNTIME}
    for name, package in places.items():
        link = tmp_path / "npm" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(clients.folder / "node_modules" / package)
    with serving(plain_server(tmp_path)) as address:
        server = make_site_server(make_site(export, cdn=f"{address}npm"), port=0)
        with serving(server):
            found = ask(clients, tmp_path / "job", server.address, question("word"), also=address)
            with pytest.raises(AssertionError, match="transformers"):
                ask(clients, tmp_path / "job", server.address, question("word"))
    assert found["results"][0]["answer"]
    assert any(url.startswith(address) and url.endswith(".wasm") for url in found["requests"])


def test_a_damaged_graph_is_told_on_the_page(export: Path, clients: Clients, tmp_path: Path) -> None:
    site = make_site(export, transformersjs=clients.transformersjs)
    site.files["model/onnx/decoder_model_merged_q4.onnx"] = b"no graph"
    server = make_site_server(site, port=0)
    with serving(server):
        job = tmp_path / "job.json"
        job.write_text(json.dumps({"address": server.address, "origins": [server.address], "asks": [question("word")]}))
        found = clients.web(job)
    assert found["results"][0]["error"].startswith("the model did not answer: ")
    assert found["results"][0]["answer"] == ""


class Plain(SimpleHTTPRequestHandler):
    """Any static host: no headers of isolation, files for every origin."""

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def plain_server(folder: Path) -> ThreadingHTTPServer:
    return ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Plain, directory=str(folder)))


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()

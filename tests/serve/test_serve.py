"""`vlmexport serve` on a real export: an OpenAI client streams an answer about a picture, beside the original's."""

from __future__ import annotations

import base64
import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.conftest import asked
from vlmexport import api
from vlmexport.cli.main import run
from vlmexport.demo import demo_questions
from vlmexport.errors import BadInputError
from vlmexport.manifest import open_artifact
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import make_scheme
from vlmexport.runtime.sampling import Sampling
from vlmexport.serve.production import production_lines
from vlmexport.serve.server import Server


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "demo-int4"
    api.export_onnx("demo", out, OnnxOptions(scheme=make_scheme("rtn", 4, 32)), verify=False)
    return out


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[Server]:
    made = api.make_server(export, port=0, threads=1)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def chat() -> list[dict[str, Any]]:
    question = demo_questions()[0]
    data = base64.b64encode(question.image.read_bytes()).decode()
    return asked(question.question, f"data:image/png;base64,{data}")


@pytest.mark.slow
def test_an_answer_about_a_picture_is_streamed(server: Server, export: Path) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="any", max_retries=0)
    stream = client.chat.completions.create(model="demo-int4", messages=chat(), stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    question = demo_questions()[0]
    wanted = api.answer_prompt(export, [question.image], question.question, Sampling(), lambda text: None)
    assert len(pieces) > 3
    assert "".join(pieces) == wanted.text
    assert wanted.text in question.answers
    cut = client.chat.completions.create(model="demo-int4", messages=chat(), max_tokens=3)  # type: ignore[arg-type]
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None
    assert cut.usage.completion_tokens == 3


@pytest.mark.slow
def test_the_original_answers_beside_it_and_parts_are_compared(server: Server) -> None:
    body = json.dumps({"messages": chat(), "max_tokens": 32}).encode()
    address = f"http://127.0.0.1:{server.server_port}/api/compare"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        events = [json.loads(line[6:]) for line in answer.read().decode().splitlines() if line]
    texts = {
        side: "".join(e["text"] for e in events if e.get("side") == side and "text" in e)
        for side in ("export", "original")
    }
    assert texts["export"] == texts["original"]
    assert all(e["timings"]["ttft_ms"] > 0 for e in events if "timings" in e)
    parts = {part["part"]: part["value"] for part in events[-1]["parts"]}
    assert parts["vision encoder and projector"] < 1e-4
    assert parts["token embedding"] < 1e-6
    assert 0 <= parts["decoder, next token"] < 1e-2


@pytest.mark.slow
def test_the_line_for_production_is_printed(export: Path) -> None:
    lines = production_lines(open_artifact(export))
    assert lines[-1] == "vlmexport quantize --model demo --out checkpoint && vllm serve checkpoint"
    artifact = open_artifact(export)
    artifact.manifest.source["lora"] = {"path": "my adapter"}
    assert "quantize --model demo --lora 'my adapter' --out checkpoint &&" in production_lines(artifact)[-1]


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(server: Server, export: Path) -> None:
    with pytest.raises(BadInputError, match=r"cannot listen on 127.0.0.1:\d+: something else listens there"):
        api.make_server(export, port=server.server_port)


def test_what_is_no_export_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(tmp_path)]) == 2
    assert "is not a vlmexport export" in capsys.readouterr().err

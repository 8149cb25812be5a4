"""An encoder-decoder behind the server: both sides keep what its generation_config asks of answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.conftest import asked
from tests.zoo.encoder_decoder import make_florence2_with_processor
from vlmexport import api
from vlmexport.manifest import open_artifact
from vlmexport.plan import OnnxOptions
from vlmexport.runtime.sampling import Sampling
from vlmexport.serve.compare import Original
from vlmexport.serve.engine import open_engine
from vlmexport.serve.limits import Limits
from vlmexport.verify.inputs import draw_picture

_ASKED = {"forced_bos_token_id": 0, "no_repeat_ngram_size": 3, "forced_eos_token_id": 1}


@pytest.mark.slow
@pytest.mark.family
def test_the_export_and_the_original_answer_by_the_same_rules(tmp_path: Path) -> None:
    model = make_florence2_with_processor(tmp_path / "florence2", **_ASKED)
    api.export_onnx(str(model), tmp_path / "out", OnnxOptions(scheme=None), verify=False)
    artifact = open_artifact(tmp_path / "out")
    original = Original(artifact)
    assert original.why_not() == ""
    found = []
    for side in (open_engine(artifact, Limits(), 1), original):
        chat = asked("<OD>", "a picture")
        chat[0]["content"][0] = {"type": "image"}
        spoken = side.speak(chat, [draw_picture(96, 64, 9)], Sampling(max_new_tokens=12), lambda text: None)
        found.append((spoken.text, spoken.finish, spoken.answer_tokens))
    assert found[0] == found[1]
    assert found[0][1:] == ("length", 11)

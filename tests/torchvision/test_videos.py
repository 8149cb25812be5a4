"""Videos by the families' own processors: `run --video` gives the decoder what the whole PyTorch model gives it.

Run by ``make test-torchvision``; see ``test_processors.py``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="torchvision is not installed; `make test-torchvision` has it")

from tests.families.tiny_gguf import make_checkpoint
from tests.families.tiny_qwen import make_tiny_qwen
from tests.families.tiny_text import picture
from tests.zoo.proof import relative
from vlmexport import api
from vlmexport.cli.main import run
from vlmexport.manifest import Artifact
from vlmexport.model.load import load_vlm
from vlmexport.model.videos import token_kinds
from vlmexport.plan import OnnxOptions
from vlmexport.runtime.decoder_inputs import encoded_pictures, with_features
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.torch import TorchRunner
from vlmexport.runtime.video import Video
from vlmexport.runtime.video_prompt import build_video_prompt, require_video_inputs
from vlmexport.split.capture import split_model

pytestmark = [pytest.mark.slow, pytest.mark.torchvision]
LIMIT, STEPS = 1e-4, 6
# Tokens below stand for pictures and marks, which an answer has none of.
_WORDS = 20
FLOATS = OnnxOptions(scheme=None, encoder_dtype="fp32", decoder_dtype="fp32")


def _smolvlm(folder: Path) -> Path:
    """A checkpoint of the GGUF tests with SmolVLM2's own processor, which takes a frame a second, 4 at most."""
    from transformers import AutoTokenizer, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    make_checkpoint("smolvlm", folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    tokenizer, config = AutoTokenizer.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    side, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
    sizes = {"size": settings["size"], "max_image_size": {"longest_edge": side}}
    sampling = {"max_frames": 4, "fps": 1, "video_size": {"longest_edge": 2 * side}}
    SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes),
        tokenizer,
        SmolVLMVideoProcessor(max_image_size={"longest_edge": side}, video_sampling=sampling),
        image_seq_len=(side // patch // config["scale_factor"]) ** 2,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": lambda folder: make_tiny_qwen("qwen2_vl", folder),
    "qwen2_5_vl": lambda folder: make_tiny_qwen("qwen2_5_vl", folder),
    "qwen3_vl": lambda folder: make_tiny_qwen("qwen3_vl", folder),
    "smolvlm": _smolvlm,
}


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    base = tmp_path_factory.mktemp(request.param)
    source = FAMILIES[request.param](base / "model")
    return source, api.export_onnx(str(source), base / "export", FLOATS, verify=False).artifact


def clip(frames: int, fps: float = 3.0) -> Video:
    return Video(tuple(picture(112, 84, seed=i) for i in range(frames)), fps)


def whole_inputs(model: Any, merge: Any, inputs: Any) -> dict[str, torch.Tensor]:
    """What the whole model gets: the processor's tensors, and the kinds of tokens where it asks for them."""
    given = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.pixel_inputs.items()}
    ids = torch.from_numpy(inputs.input_ids)
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        given["mm_token_type_ids"] = torch.from_numpy(token_kinds(merge, inputs.input_ids)).int()
    return given


def test_the_inputs_are_those_of_transformers(made: tuple[Path, Artifact]) -> None:
    """Its own way from a chat to tensors, which samples frames as the family does; ours are nine seconds of them."""
    builder, video = PromptBuilder(made[1].path), clip(9, fps=1.0)
    ours = build_video_prompt(builder, [], video, "What happens?")
    content = [{"type": "video", "video": video.pixels()}, {"type": "text", "text": "What happens?"}]
    theirs = builder.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [video.metadata()]},
    )
    assert ours.input_ids.tolist() == theirs["input_ids"].tolist()
    for name, array in ours.pixel_inputs.items():
        np.testing.assert_array_equal(array, np.asarray(theirs[name]), err_msg=name)
    assert "pixel_values" in ours.pixel_inputs or "pixel_values_videos" in ours.pixel_inputs


@pytest.mark.parametrize("frames", [4, 7])
def test_the_export_is_the_whole_model(made: tuple[Path, Artifact], frames: int) -> None:
    """Embeddings of words are PyTorch's: the export's table is FP16. Features of frames are the export's."""
    source, artifact = made
    inputs = build_video_prompt(PromptBuilder(artifact.path), [], clip(frames), "What happens?")
    require_video_inputs(artifact, inputs)
    vlm = load_vlm(str(source))
    ours, theirs = OnnxRunner(artifact, threads=1, exact=True), TorchRunner(vlm, split_model(vlm))
    merged, mask = with_features(theirs, [inputs], encoded_pictures(ours, [inputs]))
    logits, cache = merged.prefill(ours, mask, 0)
    given = whole_inputs(vlm.model, ours.merge_spec, inputs)
    wanted = whole_model(vlm.model, given, [])
    assert relative(logits, wanted) <= LIMIT
    answer: list[int] = []
    found = []
    for _ in range(STEPS):
        answer.append(_WORDS + int(logits[0, -1, _WORDS:].argmax()))
        logits = ours.decode(theirs.embed(np.array([[answer[-1]]])), cache)
        found.append(logits)
    assert relative(np.concatenate(found, axis=1), whole_model(vlm.model, given, answer)[:, -STEPS:]) <= LIMIT
    backwards = build_video_prompt(
        PromptBuilder(artifact.path), [], Video(clip(frames).frames[::-1], 3.0), "What happens?"
    )
    other = whole_model(vlm.model, whole_inputs(vlm.model, ours.merge_spec, backwards), [])
    assert relative(other, wanted) > 10 * LIMIT


def whole_model(model: Any, given: dict[str, torch.Tensor], answer: list[int]) -> np.ndarray:
    """Logits of the whole model for the prompt with `answer` behind it."""
    more = torch.tensor([answer], dtype=torch.int64)
    longer = {**given, "input_ids": torch.cat([given["input_ids"], more], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in given:
        kinds = torch.zeros_like(more).int()
        longer["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], kinds], dim=1)
    with torch.no_grad():
        return np.asarray(model(**longer, use_cache=False).logits)


def test_the_command_answers_about_an_animation(
    made: tuple[Path, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *rest = clip(5).frames
    first.save(tmp_path / "clip.gif", save_all=True, append_images=rest, duration=250, loop=0)
    arguments = ["run", str(made[1].path), "--prompt", "?", "--max-new-tokens", "3", "--json", "-"]
    assert run([*arguments, "--video", str(tmp_path / "clip.gif")]) == 0
    with_video = json.loads(capsys.readouterr().out)
    assert run(arguments) == 0
    assert with_video["prompt_tokens"] > json.loads(capsys.readouterr().out)["prompt_tokens"]

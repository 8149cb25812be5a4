"""What ``vlmexport families`` says: every family of the zoo, measured on every target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.families.tiny_gguf import FAMILIES as GGUF_FAMILIES
from tests.zoo import registry
from tests.zoo.entry import Example
from tests.zoo.proof import FLOATS, STEPS, Zooed, export, relative
from vlmexport.errors import UnsupportedModelError, VlmExportError
from vlmexport.gguf_options import GgufOptions
from vlmexport.gguf_plan import plan_gguf
from vlmexport.lower.onnx import decoder
from vlmexport.lower.onnx.trace import TracedDecoder, trace_decoder
from vlmexport.manifest import Artifact
from vlmexport.model.cross import STATES
from vlmexport.model.load import VLM
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import make_scheme
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.runtime.decoder_inputs import merged_inputs, token_inputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.capture import split_model
from vlmexport.split.encoder_decoder import is_encoder_decoder, start_token
from vlmexport.split.expert_forms import find_expert_forms, transposed_parameters
from vlmexport.split.names import weight_names
from vlmexport.split.parts import Role
from vlmexport.trt_options import TrtOptions, trt_onnx_options
from vlmexport.trt_plan import plan_trt

Verdict = dict[str, str]
ONNX_LIMIT = 1e-4
TENSORRT_LIMIT = 1e-2
# Families that tests/families runs in llama.cpp itself, beside those of tests/families/tiny_gguf.py.
_IN_LLAMA_CPP = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "lfm2_vl")
# Where the zoo's checkpoint is one that llama.cpp does not take and that of tests/families is: how its refusal begins,
# and what the table says of it.
_NOT_THE_ZOOS = {
    "idefics3": ("idefics3: tiles are 364 pixels wide", ""),
    "smolvlm": ("smolvlm: tiles are 364 pixels wide", ""),
    "mistral3": ("mistral3: the tokenizer has no [IMG_BREAK] token", ""),
    "pixtral": ("llava: the tokenizer has no [IMG_BREAK] token", ""),
    "llava": (
        "llava: llama.cpp (b11549) puts CLIP's class token",
        "with a SigLIP encoder; CLIP is refused (ggml-org/llama.cpp#25814)",
    ),
}
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
FAMILIES = tuple(registry.entries())


@dataclass(frozen=True)
class Proof:
    """What is measured of one family: the `verdicts` by target, and what stands behind that of ONNX (None: refused).

    `replay`: by how much its parts differ from the model. `int4`: see `int4_difference`. `image`: by how much the
    logits change with the picture, relative to the largest.
    """

    verdicts: dict[str, Verdict]
    replay: float | None = None
    int4: tuple[float, float] | None = None
    image: float | None = None


def prove(family: str, folder: Path) -> Proof:
    """Everything that is asked of one family, on one tiny checkpoint and one trace of each form of its decoder."""
    vlm, examples = registry.make(family, folder / "model")
    with _one_trace():
        verdicts = _verdicts(family, vlm, examples, folder)
        if verdicts["onnx"]["state"] == "refused":
            return Proof(verdicts)
        zooed = Zooed(vlm, split_model(vlm, examples), examples)
        int4 = int4_difference(zooed, folder / "int4")
    return Proof(verdicts, zooed.split.replay_difference, int4, image_effect(vlm, examples[-1]))


def measure(family: str, folder: Path) -> dict[str, Verdict]:
    """The verdict of every target on a tiny checkpoint of `family`."""
    vlm, examples = registry.make(family, folder / "model")
    return _verdicts(family, vlm, examples, folder)


def image_effect(vlm: VLM, example: Example) -> float:
    """Largest change of the logits, relative to the largest of them, when the picture is another one."""
    name = next(n for n, tensor in example.items() if n not in _TEXT and tensor.is_floating_point())
    other = torch.randn(example[name].shape, generator=torch.Generator().manual_seed(7))
    if is_encoder_decoder(vlm.model):
        example = {**example, "decoder_input_ids": torch.full((1, 1), start_token(vlm.model))}
    given = {**example, name: torch.where(example[name] == 0, example[name], other)}
    with torch.no_grad():
        wanted, changed = (vlm.model(**inputs).logits.numpy() for inputs in (example, given))
    return relative(changed, wanted)


@contextmanager
def _one_trace() -> Iterator[None]:
    """Trace each form of a decoder once: exports that differ in their weights alone share it."""
    traced: dict[tuple[int, bool, bool], TracedDecoder] = {}

    def once(model: Any, part: Any, *, fuse_rotary: bool, repeat: bool = True) -> TracedDecoder:
        key = (id(part.decoder), fuse_rotary, repeat)
        if key not in traced:
            traced[key] = trace_decoder(model, part, fuse_rotary=fuse_rotary, repeat=repeat)
        return traced[key]

    with mock.patch.object(decoder, "trace_decoder", once):
        yield


def _verdicts(family: str, vlm: VLM, examples: tuple[Example, ...], folder: Path) -> dict[str, Verdict]:
    found = {"gguf": gguf_verdict(family, vlm)}
    try:
        zooed = Zooed(vlm, split_model(vlm, examples), examples)
    except UnsupportedModelError as error:
        refused = _refused(error)
        return {"onnx": refused, "tensorrt": refused, **found}
    found["onnx"] = _compared(zooed, lambda: with_its_form(zooed, FLOATS, folder / "onnx"), ONNX_LIMIT)
    found["tensorrt"] = _compared(zooed, lambda: _tensorrt(zooed, folder / "trt"), TENSORRT_LIMIT)
    return found


def gguf_verdict(family: str, vlm: VLM) -> Verdict:
    """Proven by tests/families in llama.cpp itself, on checkpoints of their own; else what the plan says."""
    refusal = None
    try:
        plan_gguf(vlm, GgufOptions(imatrix="none"))
    except VlmExportError as error:
        refusal = _refused(error)
    if family in (*GGUF_FAMILIES, *_IN_LLAMA_CPP):
        expected, reason = _NOT_THE_ZOOS.get(family, ("", ""))
        refused = refusal["reason"] if refusal else ""
        if refused.startswith(expected) and bool(refused) == bool(expected):
            return {"state": "verified", "reason": reason}
    return refusal or {"state": "unproven", "reason": ""}


def with_its_form(zooed: Zooed, options: OnnxOptions, folder: Path) -> Artifact:
    """The fast form of attention, or the standard one where the family has no other."""
    try:
        return export(zooed, options, folder / "gqa")
    except UnsupportedModelError as error:
        if "--attention standard" not in str(error):
            raise
    return export(zooed, dataclasses.replace(options, attention="standard"), folder / "standard")


def _tensorrt(zooed: Zooed, folder: Path) -> Artifact:
    """FP16 graphs as `vlmexport trt` plans them; ONNX Runtime runs them, no engine does."""
    options = TrtOptions(trt_onnx_options(None), "a100", max_seq=512)
    return export(zooed, plan_trt(zooed.vlm, zooed.split, options, None).options.onnx, folder)


def _compared(zooed: Zooed, make: Callable[[], Artifact], limit: float) -> Verdict:
    try:
        artifact = make()
    except UnsupportedModelError as error:
        return _refused(error)
    worst = largest(zooed, artifact)
    if not worst <= limit:
        return {"state": "differs", "reason": f"more than {limit:.0e} of the largest value"}
    form = OnnxOptions(attention=artifact.manifest.model["attention"]).attention
    return {"state": "verified", "reason": "with --attention standard" if form == "standard" else ""}


def largest(zooed: Zooed, artifact: Artifact) -> float:
    """The largest relative difference of features, and of logits through `STEPS` steps behind every example."""
    return compared(zooed, OnnxRunner(artifact, threads=1, exact=True), TorchRunner(zooed.vlm, zooed.split))


def compared(zooed: Zooed, ours: OnnxRunner, theirs: TorchRunner) -> float:
    """`largest`, for runners that are made already."""
    worst = 0.0
    for example in zooed.examples:
        pixels = {n: t.numpy() for n, t in example.items() if n not in _TEXT}
        item = ModelInputs(example["input_ids"].numpy(), pixels)
        (found, _), (wanted, mask) = (merged_inputs(runner, [item]) for runner in (ours, theirs))
        images = item.input_ids == zooed.split.merge.image_token_id
        pairs = [(found.embeds[images], wanted.embeds[images])]
        if zooed.split.merge.place == "cross_attention":  # image tokens are text; the pictures are beside it
            pairs = [(found.extras[STATES], wanted.extras[STATES])]
        worst = max(worst, *(relative(one, other) for one, other in pairs))
        (reference, cache), (logits, past) = (wanted.prefill(runner, mask, 0) for runner in (theirs, ours))
        worst = max(worst, relative(logits, reference))
        for _ in range(STEPS):
            token = token_inputs(theirs, reference[:, -1:].argmax(-1).astype(np.int64))
            reference, logits = token.decode(theirs, cache), token.decode(ours, past)
            worst = max(worst, relative(logits, reference))
    return worst


def int4_difference(zooed: Zooed, folder: Path) -> tuple[float, float]:
    """Of an INT4 export, relative to PyTorch with the dequantized codes and to PyTorch with the original weights.

    The second says that weights were quantized at all.
    """
    artifact = with_its_form(zooed, dataclasses.replace(FLOATS, scheme=make_scheme("rtn", group_size=32)), folder)
    names = [member.name for record in artifact.manifest.quantized for member in record.members]
    decoder = zooed.split.parts[Role.DECODER].module
    packed = [name.rpartition(".")[0] for name in names]  # of experts, which are named by parameter and number
    schemes = dict.fromkeys([*names, *packed], make_scheme("rtn", group_size=32))
    turned = transposed_parameters(zooed.vlm.model, find_expert_forms(decoder))
    weights = DecoderWeights(weight_names(zooed.vlm.model, decoder), schemes, transposed=turned)
    ours, theirs = OnnxRunner(artifact, threads=1, exact=True), TorchRunner(zooed.vlm, zooed.split)
    example = zooed.examples[-1]
    pixels = {n: t.numpy() for n, t in example.items() if n not in _TEXT}
    wanted, mask = merged_inputs(theirs, [ModelInputs(example["input_ids"].numpy(), pixels)])
    whole, _ = wanted.prefill(theirs, mask, 0)
    with theirs.substituted({name: weights.quantized(name).dequantize() for name in names}):
        rounded, _ = wanted.prefill(theirs, mask, 0)
    logits, _ = wanted.prefill(ours, mask, 0)
    assert np.isfinite(logits).all()
    return relative(logits, rounded), relative(logits, whole)


def _refused(error: Any) -> Verdict:
    return {"state": "refused", "reason": str(error).split("; known: ")[0]}

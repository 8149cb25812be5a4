"""Lower the decoder of a tiny checkpoint and run its graph beside PyTorch."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import torch

from vlmexport.lower.onnx import decoder
from vlmexport.lower.onnx.decoder import DecoderGraph
from vlmexport.lower.onnx.trace import TracedDecoder, trace_decoder
from vlmexport.lower.onnx.weights import stream_weights
from vlmexport.model.load import VLM, load_vlm
from vlmexport.plan import OnnxOptions, plan_export
from vlmexport.progress import SilentProgress
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.capture import split_model
from vlmexport.split.names import weight_names
from vlmexport.split.parts import Role, Split
from vlmexport.target import load_target


@dataclass(frozen=True)
class Model:
    """A tiny model taken apart."""

    vlm: VLM
    split: Split

    @property
    def part(self) -> Any:
        return self.split.parts[Role.DECODER]

    def logits(self, embeds: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """PyTorch's logits of all positions."""
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64) if mask is None else mask
        with torch.no_grad():
            out: torch.Tensor = self.part.module(embeds, mask)
        return out


def load(folder: Path, dtype: torch.dtype | None = None) -> Model:
    """The model in `folder`, its parameters in the checkpoint's type or in `dtype`."""
    vlm = load_vlm(str(folder))
    if dtype is not None:
        vlm.model.to(dtype)
    return Model(vlm, split_model(vlm))


def lower(model: Model, options: OnnxOptions, **changes: Any) -> DecoderGraph:
    """The decoder graph; `changes` replace fields of the target's ONNX settings, `repeat` goes to the trace."""
    repeat = changes.pop("repeat", True)
    target = load_target(options.target)
    target = dataclasses.replace(target, onnx_settings=dataclasses.replace(target.onnx, **changes))
    plan = plan_export(model.vlm, model.split, target, options)
    weights = DecoderWeights(weight_names(model.vlm.model, model.part.module), plan.schemes)
    with mock.patch.object(decoder, "trace_decoder", _trace_once):
        return decoder.lower_decoder(model.vlm, model.part, plan, target, weights, repeat=repeat)


@functools.cache
def _trace_once(model: Any, part: Any, *, fuse_rotary: bool, repeat: bool) -> TracedDecoder:
    """A trace costs seconds and depends on neither the weights nor the plan."""
    return trace_decoder(model, part, fuse_rotary=fuse_rotary, repeat=repeat)


def write(graph: DecoderGraph, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stream_weights(graph.model, graph.linears.groups, folder / "decoder.onnx", SilentProgress(), "write")
    return folder / "decoder.onnx"


def dequantize_linears(model: Model, graph: DecoderGraph) -> dict[str, torch.Tensor]:
    """Replace PyTorch's decoder weights by what their codes stand for; the originals, to put back."""
    before = {}
    for name, tensor in weight_names(model.vlm.model, model.part.module).items():
        scheme = graph.linears.plan.weight(name).scheme
        if scheme is not None:
            before[name] = tensor.clone()
            tensor.copy_(quantize_rtn(tensor, scheme).dequantize())
    return before


def restore(model: Model, before: dict[str, torch.Tensor]) -> None:
    tensors = weight_names(model.vlm.model, model.part.module)
    for name, tensor in before.items():
        tensors[name].copy_(tensor)


class Session:
    """One decoder graph in ONNX Runtime, with its cache as plain arrays."""

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.dtype = np.float16 if "float16" in self.inputs["inputs_embeds"].type else np.float32

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        names = [n for n in self.inputs if n.startswith("past_key_values.")]
        shapes = {n: self.inputs[n].shape for n in names}
        return {n: np.zeros((batch, shapes[n][1], 0, shapes[n][3]), self.dtype) for n in names}

    def run(
        self,
        embeds: torch.Tensor,
        mask: torch.Tensor,
        past: dict[str, np.ndarray],
        keep: int = 0,
        **extra: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        feed: dict[str, np.ndarray] = {
            "inputs_embeds": embeds.float().numpy().astype(self.dtype),
            "attention_mask": mask.numpy(),
            "num_logits_to_keep": np.array(keep, dtype=np.int64),
            **past,
            **{name: tensor.numpy() for name, tensor in extra.items()},
        }
        out = dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
        present = {n.replace("present", "past_key_values"): v for n, v in out.items() if n.startswith("present.")}
        return torch.from_numpy(out["logits"]), present


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())

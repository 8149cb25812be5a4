"""A small export of the ``tensorrt`` layout with "engines" of the stand-in: four graphs, nothing but their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.lower.tensorrt.graphs import TINY, part_of, write_decoder
from tests.runtime.mock_export import VISION_WIDTH, embedding, projector, vision
from tests.runtime.tensorrt.fakes import VERSION, engine_bytes
from vlmexport.engines import EngineSpec, Sidecar, TrtLimits, engine_path, engine_specs, graph_digests
from vlmexport.manifest import Artifact, Manifest, file_sha256, write_manifest
from vlmexport.model.merge import MergeSpec

LIMITS = TrtLimits(max_batch=3, max_seq=TINY.cache, max_images=4)
# 48 pixel values make a row of vision features, 16 rows an image token.
_AXES = {
    "batch": (1, 1, 1),
    "images": (1, 1, LIMITS.max_images),
    "height": (32, 32, 64),
    "width": (32, 32, 64),
    "rows": (16, 64, 1024),
}
PLACE = "sm80"


def static_export(out: Path, *, split_decoder: bool = False, built: bool = True, **decoder: Any) -> Artifact:
    """The export in `out`, with engines for an A100 if `built`; `decoder`: what `write_decoder` takes."""
    decoder_path = write_decoder(out, **decoder)
    table = torch.randn(TINY.vocab, TINY.hidden, generator=torch.Generator().manual_seed(3))
    parts = {
        "vision_encoder": vision(out / "vision_encoder.onnx"),
        "projector": projector(out / "projector.onnx", TINY.hidden),
        "embed_tokens": embedding(out / "embed_tokens.onnx", table),
        "decoder": part_of(decoder_path),
    }
    specs = engine_specs(parts, LIMITS, _AXES, split_decoder=split_decoder)
    said = {"flavour": "rtx", "version": VERSION, "places": [PLACE], "reason": ""}
    nothing = {"flavour": "", "version": "", "places": [], "reason": "TensorRT for RTX builds nothing for h100"}
    model = {
        "hidden_size": TINY.hidden,
        "vocab_size": TINY.vocab,
        "kv": {"layers": TINY.layers, "heads": TINY.kv_heads, "head_dim": TINY.head_dim, "dtype": "float16"},
        "merge": MergeSpec(7).to_dict(),
        "attention": "static",
        "padding": "right",
        "eos_token_ids": [2],
        "decoder_dtype": "fp16",
        "tensorrt": {
            "gpu": "a100-80",
            "limits": {"max_batch": 3, "max_seq": TINY.cache, "max_images": 4},
            "engines": [spec.to_dict() for spec in specs],
            "built": said if built else nothing,
        },
    }
    artifact = Artifact(out, Manifest("tensorrt", "tensorrt", {}, {}, model, {}, parts, (), ()))
    for spec in specs if built else ():
        write_engine(artifact, spec)
    return write_manifest(out, artifact.manifest)


def write_engine(
    artifact: Artifact,
    spec: EngineSpec,
    place: str = PLACE,
    *,
    version: str = VERSION,
    compute_capability: str = "8.0",
    **more: Any,
) -> Path:
    """An engine of the stand-in with its sidecar; `more`: see `engine_bytes`."""
    path = engine_path(artifact.path, place, spec.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = artifact.part_path(spec.part)
    reshapes = spec.part in ("vision_encoder", "projector")
    path.write_bytes(engine_bytes(graph, spec, shapes_by_running=reshapes, **more))
    digests, digest = graph_digests(graph), file_sha256(path)
    sidecar = Sidecar("rtx", version, (compute_capability,), "a100-80", spec, digests, digest, path.stat().st_size)
    sidecar.write(path)
    return path


__all__ = ["LIMITS", "PLACE", "VISION_WIDTH", "static_export", "write_engine"]

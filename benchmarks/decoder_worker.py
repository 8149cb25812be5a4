"""One decoder in its own process, measured on random tokens: prefill, then single steps.

Speaks the lines of `vlmexport.bench.worker`: SPEC is JSON with ``kind`` (vlmexport, genai, pytorch), ``path``,
``dtype``, ``threads``, ``prompt`` and ``tokens``. Both ONNX graphs run in the same harness, `DecoderSession`, with KV
buffers bound in place.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Decoder(Protocol):
    """A decoder that starts from token ids and goes on by one token; both return logits ``[1, 1, vocab]``."""

    def start(self, ids: Ids, room: int) -> NDArray[Any]:
        """Prefill with `ids` ``[1, tokens]``; `room` steps will follow."""
        ...

    def step(self, token: Ids) -> NDArray[Any]:
        """Continue by `token` ``[1, 1]``."""
        ...


class VlmexportDecoder:
    """Our export: embedding graph and decoder graph."""

    def __init__(self, path: Path, threads: int) -> None:
        from vlmexport.manifest import open_artifact
        from vlmexport.runtime.ort import OnnxRunner

        self.runner = OnnxRunner(open_artifact(path, check_hashes=False), threads=threads)
        self.runner.embed(np.array([[5]]))

    def start(self, ids: Ids, room: int) -> NDArray[Any]:
        """See `Decoder`."""
        logits, self.cache = self.runner.prefill(self.runner.embed(ids), np.ones_like(ids), reserve=room)
        return logits

    def step(self, token: Ids) -> NDArray[Any]:
        """See `Decoder`."""
        return self.runner.decode(self.runner.embed(token), self.cache)


class GenaiDecoder:
    """The builder's graph: its embedding is inside, its LM head computes every position of the prompt."""

    def __init__(self, path: Path, threads: int) -> None:
        from vlmexport.model.kv import KVGeometry
        from vlmexport.runtime.decoder import DecoderSession
        from vlmexport.runtime.sessions import SessionSettings, open_session

        model = json.loads((path.parent / "genai_config.json").read_text())["model"]["decoder"]
        kv = KVGeometry(model["num_hidden_layers"], model["num_key_value_heads"], model["head_size"])
        self.session = DecoderSession(open_session(path, "decoder", SessionSettings(threads)), kv, "gqa")

    def start(self, ids: Ids, room: int) -> NDArray[Any]:
        """See `Decoder`."""
        logits, self.cache = self.session.prefill(ids, np.ones_like(ids), 1, room)
        return logits

    def step(self, token: Ids) -> NDArray[Any]:
        """See `Decoder`."""
        return self.session.decode(token, self.cache, 1)


class PytorchDecoder:
    """The Llama in eager PyTorch, LM head on the last position only."""

    def __init__(self, path: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        self.torch: Any = torch
        self.model: Any = LlamaForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def start(self, ids: Ids, room: int) -> NDArray[Any]:
        """See `Decoder`."""
        self.past = None
        return self.step(ids)

    def step(self, token: Ids) -> NDArray[Any]:
        """See `Decoder`."""
        with self.torch.inference_mode():
            ids = self.torch.from_numpy(token)
            out = self.model(ids, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        logits: NDArray[Any] = out.logits.float().numpy()
        return logits


def measure(decoder: Decoder, prompt: int, tokens: int) -> dict[str, Any]:
    """One round in milliseconds."""
    ids = np.random.default_rng(0).integers(300, 400, (1, prompt))
    start = time.perf_counter()
    logits = decoder.start(ids, tokens)
    prefill = 1000 * (time.perf_counter() - start)
    steps = []
    for _ in range(tokens):
        token = logits[:, -1].argmax(axis=-1)[:, None]
        start = time.perf_counter()
        logits = decoder.step(token)
        steps.append(1000 * (time.perf_counter() - start))
    return {"prefill_ms": prefill, "decode_ms": steps}


def main() -> None:
    """Load, say how long it took, then measure a round per line until ``end``."""
    from vlmexport.bench.memory import read_memory

    spec = json.loads(sys.argv[1])
    start = time.perf_counter()
    path, threads = Path(spec["path"]), spec["threads"]
    decoder: Decoder
    if spec["kind"] == "vlmexport":
        decoder = VlmexportDecoder(path, threads)
    elif spec["kind"] == "genai":
        decoder = GenaiDecoder(path, threads)
    else:
        decoder = PytorchDecoder(path, spec["dtype"], threads)
    print(json.dumps({"load_s": time.perf_counter() - start}), flush=True)
    for command in sys.stdin:
        if command.strip() == "end":
            break
        print(json.dumps(measure(decoder, spec["prompt"], spec["tokens"])), flush=True)
    print(json.dumps(asdict(read_memory())), flush=True)


if __name__ == "__main__":
    main()

"""What ggml's rounding does to matrices of several kinds: the numbers behind `parity.weights` of targets/llamacpp.toml.

    python tools/measure_gguf_rounding.py [TYPE ...]

Prints for every type the relative RMS error of the worst matrix and of its worst block, without and with importances,
and how many neighbours in order of size changed places (0 for every type that has levels of its own in each block).
The tables of the IQ1 and IQ2 types take ggml up to half a minute each.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.quantize.ggml.blocks import quantize_rows
from vlmexport.quantize.ggml.types import GGML_TYPES, NEEDS_IMPORTANCE
from vlmexport.verify.gguf.files import EXACT_TYPES, StoredTensor
from vlmexport.verify.gguf.values import rounding_of

ROWS, COLUMNS = 256, 2048
# An LM head or an embedding may be IQ3_XXS without importances; ggml rounds it so.
PLAIN_TOO = ("IQ3_XXS",)


def matrices(seed: int = 0) -> Mapping[str, NDArray[np.float32]]:
    """Weights of several kinds, float32 ``[ROWS, COLUMNS]``."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, COLUMNS)
    outlier = rng.normal(size=shape)
    outlier[:, rng.integers(0, COLUMNS, 6)] *= 20
    scaled = rng.normal(size=shape) * np.exp(rng.normal(size=(ROWS, COLUMNS // 16)).repeat(16, 1))
    made = {
        "normal": rng.normal(size=shape),
        "uniform": rng.uniform(-1, 1, shape),
        "heavy tails (t4)": rng.standard_t(4, shape),
        "heavy tails (t3)": rng.standard_t(3, shape),
        "planted outliers": outlier,
        "scaled in runs of 16": scaled,
    }
    return {name: values.astype(np.float32) for name, values in made.items()}


def main(names: list[str]) -> None:
    """Print one line per type."""
    weights = matrices()
    importance = np.exp(2 * np.random.default_rng(1).normal(size=COLUMNS)).astype(np.float32)
    for kind in names or [name for name in GGML_TYPES if name not in EXACT_TYPES]:
        for label, columns in (("plain", None), ("importance", importance)):
            if columns is None and kind in NEEDS_IMPORTANCE and kind not in PLAIN_TOO:
                continue
            found = [
                rounding_of(
                    StoredTensor(name, weight.shape, kind, quantize_rows(weight, kind, columns)),
                    torch.from_numpy(weight),
                )
                for name, weight in weights.items()
            ]
            tensor, block = max(f.relative for f in found), max(f.worst for f in found)
            moved = sum(f.disordered for f in found)
            print(f"{kind:8} {label:11} tensor {tensor:.3g}  block {block:.3g}  out of order {moved}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Output error of every quantization method on the synthetic outlier layers (facts/quantization.md §3a).

    python -m benchmarks.synthetic_layers                  # the whole table
    python -m benchmarks.synthetic_layers --tokens 24 48 96 192 384 768 1536   # GPTQ and RTN with so few tokens

Prints relative output error on fresh tokens, in thousandths, mean of two seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tests.quantize import synthetic_layers
from tests.quantize.synthetic_layers import FEATURES, mean_error
from vlmexport.quantize import gptq
from vlmexport.quantize.scheme import QuantScheme

DECAYS = (0.5, 1.0)
GRIDS = ((False, 32), (False, 64), (False, 128), (True, 32), (True, 128))
METHODS = ("rtn", "hqq", "awq", "gptq", "awq+gptq")


def table() -> None:
    """Print every method on every grid."""
    print("| method | " + " | ".join(f"{'sym' if sym else 'asym'} g{size}" for sym, size in GRIDS) + " |")
    print("|---|" + "---|" * len(GRIDS))
    for method in METHODS:
        for clip in (False, True) if method not in ("rtn", "hqq") else (False,):
            cells = [_cell(method, clip, symmetric, size) for symmetric, size in GRIDS]
            print(f"| {method}{' + clip' * clip} | " + " | ".join(cells) + " |", flush=True)
    print(f"| nf4 g64 | {_errors(QuantScheme(algorithm='nf4', group_size=64))} |")


def _cell(method: str, clip: bool, symmetric: bool, size: int) -> str:
    if method == "hqq" and symmetric:
        return "-"
    return _errors(QuantScheme(algorithm=method, clip=clip, symmetric=symmetric, group_size=size))


def _errors(scheme: QuantScheme) -> str:
    return " / ".join(f"{1000 * mean_error(decay, scheme):.1f}" for decay in DECAYS)


def few_tokens(counts: Sequence[int]) -> None:
    """Print what GPTQ would do with so few calibration tokens, its refusal of too few switched off."""
    gptq.FEATURES_PER_TOKEN = 1 << 30
    print(f"{FEATURES} features, asym g32, decays {DECAYS}")
    for tokens in counts:
        rows = {
            method: " / ".join(
                f"{1000 * mean_error(decay, QuantScheme(algorithm=method, symmetric=False), tokens):.1f}"
                for decay in DECAYS
            )
            for method in ("rtn", "gptq", "awq", "awq+gptq")
        }
        print(f"{tokens:5d} tokens: " + ", ".join(f"{method} {row}" for method, row in rows.items()), flush=True)
        synthetic_layers.synthetic_layer.cache_clear()


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="calibration token counts to try instead of the table")
    counts = parser.parse_args().tokens
    if counts:
        few_tokens(counts)
    else:
        table()


if __name__ == "__main__":
    main()

"""What ``--quant auto`` is worth at the size of a uniform scheme, and whether it keeps a limit, on fresh samples.

    python -m benchmarks.auto_bits

The bundled model and its outlier variant, rounded to nearest and by AWQ+GPTQ. ``auto`` gets the size of uniform INT4 in
groups of 32 (for round-to-nearest also of 16, 64 and 128) and chooses bits and groups; then it is given limits of
divergence. The samples that judge are drawn from another seed than those that calibrate and choose.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.calibrate.auto_comparison import Comparison, Contender
from vlmexport.demo import model_dir
from vlmexport.demo.variants import make_outlier_variant
from vlmexport.plan_file import AutoLimit
from vlmexport.quantize.scheme import make_scheme

# Groups whose uniform size is given to auto, and limits as shares of uniform g32's divergence, by algorithm.
GROUPS = {"rtn": (16, 32, 64, 128), "awq+gptq": (32,)}
SHARES = {"rtn": (0.5, 0.1, 0.01), "awq+gptq": (0.5, 0.1)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        outliers = make_outlier_variant(model_dir(), Path(folder) / "outliers")
        for name, model in (("bundled model", "demo"), ("outlier variant", str(outliers))):
            comparison = Comparison(model)
            for algorithm in GROUPS:
                print(f"\n## {name}, {algorithm}\n")
                equal_sizes(comparison, algorithm)
                limits(comparison, algorithm)


def equal_sizes(comparison: Comparison, algorithm: str) -> None:
    """`auto`, starting from groups of 32, against uniform INT4 of each size."""
    print("| weights | MB | KL, nats per text token (95 % limit) | on answers | of uniform |\n|---|---|---|---|---|")
    for group in GROUPS[algorithm]:
        even = comparison.uniform(make_scheme(algorithm, 4, group))
        print(f"| uniform INT4 g{group} | {_row(even)} | 1 |")
        plan, best = comparison.auto(make_scheme(algorithm, 4), AutoLimit(max_size=even.size))
        choices = ", ".join(f"{n} x {label}" for label, n in plan.measured["weights_by_choice"].items())
        print(f"| auto: {choices} | {_row(best)} | {best.found.kl / even.found.kl:.2f} |", flush=True)


def limits(comparison: Comparison, algorithm: str) -> None:
    """Limits of divergence, judged on samples that had no say."""
    base = make_scheme(algorithm, 4)
    even = comparison.uniform(base)
    print(
        "\n| --max-kl | MB | when chosen (95 % limit) | on fresh samples (95 % limit) | kept |\n|---|---|---|---|---|"
    )
    for share in SHARES[algorithm]:
        limit = float(f"{share * even.found.kl:.1e}")
        plan, made = comparison.auto(base, AutoLimit(max_kl=limit))
        chosen = f"{plan.measured['kl']:.2e} ({plan.measured['upper']:.2e})"
        fresh = f"{made.found.kl:.2e} ({made.found.upper:.2e})"
        print(f"| {limit:g} | {made.size / 1e6:.3f} | {chosen} | {fresh} | {made.found.kl <= limit} |", flush=True)


def _row(contender: Contender) -> str:
    found = contender.found
    return f"{contender.size / 1e6:.3f} | {found.kl:.2e} ({found.upper:.2e}) | {found.answer_kl:.2e}"


if __name__ == "__main__":
    main()

"""What a user should know of a choice before it is made: few bits hurt some tasks and small models first.

Sources: ChartQA 78.96 to 71.96 after GPTQ (llm-compressor #1629), OCR worse with INT4 (torchao #3040); what the bundled
model loses is in README.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.scheme import QuantScheme

# Parameters. Smaller models lose more from few bits and from large groups.
SMALL_MODEL = 3_000_000_000
_FEW_BITS = 4


def quantization_advice(parameters: int, schemes: Iterable[QuantScheme]) -> tuple[str, ...]:
    """Sentences for a model of `parameters` values whose weights get `schemes`; none when every weight keeps 8 bits."""
    few = [scheme for scheme in schemes if scheme.bits <= _FEW_BITS and not algorithm(scheme.algorithm).imported]
    if not few:
        return ()
    bits = min(scheme.bits for scheme in few)
    said = [
        f"reading text (OCR), fine print and counting are what {bits} bits hurt first: judge them with questions of "
        "your own (verify --samples); where they matter take --bits 8, or --quant auto --max-kl 0.01"
    ]
    if parameters < SMALL_MODEL:
        said.append(
            f"a model below {SMALL_MODEL / 1e9:.0f} B parameters loses more than a large one: compare with --bits 8"
        )
    without_data = sorted({s.algorithm for s in few if not algorithm(s.algorithm).calibrated})
    if without_data:
        said.append(f"{', '.join(without_data)} looks at no data: good for a first try, the default keeps more quality")
    return tuple(said)

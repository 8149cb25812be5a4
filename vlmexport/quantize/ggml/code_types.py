"""Which ggml block types hold which of our schemes without loss, and what the scheme's scales must be for that.

ggml-common.h: a block of 32 codes has a float16 scale ``d``. Q4_0 means ``(code - 8) * d``, Q4_1 ``code * d + m`` with
a float16 ``m``, Q8_0 ``code * d`` of int8 codes.
"""

from __future__ import annotations

import dataclasses

from vlmexport.errors import BadInputError
from vlmexport.quantize.registry import IMPORTED, algorithm
from vlmexport.quantize.scheme import PER_CHANNEL, SCALE_BITS, QuantScheme

BLOCK = 32
# A zero point of 4 bits times a scale of 7 significant bits is a float16's 11: Q4_1's ``m`` is exact.
_EXACT_SCALE_BITS = {"Q4_0": SCALE_BITS, "Q4_1": 7, "Q8_0": SCALE_BITS}
_HELD = (
    "GGUF holds 4-bit symmetric codes (Q4_0), 4-bit asymmetric ones (Q4_1) and 8-bit symmetric ones (Q8_0), in groups "
    "of 32 or a multiple"
)


def codes_type(scheme: QuantScheme) -> str:
    """The ggml type that holds codes of `scheme` (without its overrides): ``Q4_0``, ``Q4_1`` or ``Q8_0``.

    Raises `BadInputError` for other bits, for codebooks, and for groups that blocks of 32 do not divide.
    """
    method = algorithm(scheme.algorithm)
    if method.codebook:
        raise BadInputError(f"{scheme.algorithm} has levels of its own; {_HELD}; or choose a file type such as Q4_K_M")
    forms = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}
    found = forms.get((scheme.bits, scheme.symmetric))
    if found is None:
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        raise BadInputError(f"{scheme.bits}-bit {kind} codes have no GGUF type; {_HELD}")
    if scheme.group_size != PER_CHANNEL and scheme.group_size % BLOCK:
        raise BadInputError(f"groups of {scheme.group_size} have no GGUF type; {_HELD}")
    return found


def exact_scheme(scheme: QuantScheme) -> QuantScheme:
    """`scheme`, its overrides included, with scales that the GGUF type of its codes holds without loss.

    Codes that came with a checkpoint have the scales they have. Raises `BadInputError` as `codes_type` does, and for
    algorithms that keep float32 scales of their own.
    """
    kind = codes_type(scheme)
    overrides = {pattern: exact_scheme(own) for pattern, own in scheme.overrides.items()}
    if scheme.algorithm == IMPORTED:
        return dataclasses.replace(scheme, overrides=overrides)
    if algorithm(scheme.algorithm).wide_scales:
        raise BadInputError(
            f"{scheme.algorithm} keeps float32 scales, which GGUF's blocks do not hold; choose awq+gptq, gptq, awq, "
            "hqq or rtn"
        )
    return dataclasses.replace(scheme, scale_bits=_EXACT_SCALE_BITS[kind], overrides=overrides)

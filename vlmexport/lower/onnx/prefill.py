"""The prompt's own decoder graph (``--prefill int8``): the decode graph with INT8 products from the original weights.

Both graphs come from one trace and share everything but the matrices: the prompt graph reads norms, rotary tables, LM
head and unquantized weights from the decode graph's data file. Decoding is untouched: its graph is the plain export's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from vlmexport.lower.onnx.assemble import assemble_decoder
from vlmexport.lower.onnx.decoder import choose_dialect, lm_head
from vlmexport.lower.onnx.int8 import LEVELS, TINY, Int8Emitter
from vlmexport.lower.onnx.logit_mask import hide_tokens, scale_logits
from vlmexport.lower.onnx.trace import TracedDecoder
from vlmexport.manifest import PREFILL_PART
from vlmexport.model.load import VLM
from vlmexport.plan import ExportPlan
from vlmexport.prefill import prompt_schemes
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.names import module_path
from vlmexport.split.parts import Part
from vlmexport.target import Target

# Blocks of 32 for the linears that one scale per row serves badly: MatMulNBits rounds activations by block too.
BLOCKED = QuantScheme(bits=8, group_size=32, algorithm="rtn")
# Relative error of a product, root mean square over the part's examples. Symmetric INT4 in groups of 32 makes 0.09 to
# 0.1 on these; a linear above a third of that is not worth its speed.
ERROR_LIMIT = 0.03
# Tokens, evenly spaced, that errors are measured on: scales are by row, so a few hundred rows say it.
_ROWS = 256


@dataclass(frozen=True)
class PrefillGraph:
    """The prompt graph without its matrices, the emitter that makes them, and the measured errors.

    `errors` are those of every INT8 candidate by weight name (see `product_errors`), `blocked` the weights above
    `ERROR_LIMIT`, which are stored in blocks of 32 for MatMulNBits instead.
    """

    model: ir.Model
    linears: Int8Emitter
    errors: dict[str, float]
    blocked: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """What the manifest says of the prompt graph."""
        worst = max(self.errors, key=lambda name: self.errors[name]) if self.errors else ""
        return {
            "weights": "int8 per output channel",
            "activations": "uint8 per row",
            "error_limit": ERROR_LIMIT,
            "largest_error": {"weight": worst, "error": self.errors.get(worst, 0.0)},
            "blocked": {name: self.errors[name] for name in self.blocked},
        }


def lower_prefill(
    vlm: VLM, part: Part, plan: ExportPlan, target: Target, weights: DecoderWeights, traced: TracedDecoder
) -> PrefillGraph:
    """The prompt graph in the decode graph's dialect, from the decode graph's trace.

    Linears that the plan quantizes are INT8, from ``weights.tensor`` and not from the decode graph's codes; the LM head
    and unquantized weights are the decode graph's own. Raises `BadInputError` for weights that cannot be rounded.
    """
    module = part.module
    if not isinstance(module, DecoderPart):
        raise TypeError(f"the decoder part holds a {type(module).__name__}")
    head = lm_head(vlm, module)
    schemes = prompt_schemes(plan.weights, head.weight)
    prompt = dataclasses.replace(weights, schemes=schemes, given={})
    errors = product_errors(vlm, part, prompt)
    blocked = tuple(sorted(name for name, error in errors.items() if not error <= ERROR_LIMIT))
    schemes = {name: BLOCKED if name in blocked else scheme for name, scheme in schemes.items()}
    linears = Int8Emitter(
        weights=dataclasses.replace(prompt, schemes=schemes),
        plan=_with_schemes(plan, schemes),
        float_type=ir.DataType.FLOAT,
        accuracy_level=target.onnx.accuracy_level,
        part=PREFILL_PART,
        int8=frozenset(name for name, scheme in schemes.items() if scheme.group_size == PER_CHANNEL),
        shared=frozenset(w.name for w in plan.weights if w.name not in schemes),
    )
    dialect = choose_dialect(traced, linears, target, module.blocks)
    cap = module.logit_cap
    model = assemble_decoder(traced, module.kv or vlm.facts.kv, vlm.facts.hidden_size, head, dialect, linears, cap)
    scale_logits(model, module.logit_scale)
    hide_tokens(model, module.hidden_tokens)
    return PrefillGraph(model, linears, errors, blocked)


def _with_schemes(plan: ExportPlan, schemes: dict[str, QuantScheme]) -> ExportPlan:
    changed = tuple(
        dataclasses.replace(w, scheme=schemes[w.name], dtype="int8") if w.name in schemes else w for w in plan.weights
    )
    return dataclasses.replace(plan, weights=changed)


def product_errors(vlm: VLM, part: Part, weights: DecoderWeights) -> dict[str, float]:
    """Relative error of the INT8 product of every weight that `weights` has a scheme for, on the longest example.

    ``|y8 - y| / |y|`` over up to `_ROWS` of its tokens, with the inputs that the original model gives the linear, both
    rounded as the prompt graph rounds. A linear that the example does not reach is unproven and counts as 1.
    """
    sums: dict[str, tuple[float, float]] = dict.fromkeys(weights.schemes, (0.0, 0.0))

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def see(_module: nn.Module, args: Any) -> None:
            rows = args[0].detach().float().flatten(0, -2)
            x = _folded_input(rows[:: -(-len(rows) // _ROWS)], weights, name)
            wanted = x @ weights.tensor(name).float().t()
            off = int8_product(x, weights.quantized(name)) - wanted
            error, size = sums[name]
            sums[name] = (error + float(off.square().sum()), size + float(wanted.square().sum()))

        return see

    linears = {f"{module_path(vlm.model, m)}.weight": m for m in part.module.modules() if isinstance(m, nn.Linear)}
    handles = [linears[name].register_forward_pre_hook(watch(name)) for name in sums if name in linears]
    try:
        with torch.no_grad():
            part.module(**max(part.examples, key=lambda example: example["inputs_embeds"].shape[1]))
    finally:
        for handle in handles:
            handle.remove()
    return {name: (error / size) ** 0.5 if size else 1.0 for name, (error, size) in sums.items()}


def _folded_input(x: torch.Tensor, weights: DecoderWeights, name: str) -> torch.Tensor:
    """The input ``[tokens, K]`` of the folded model: divided by what the fold multiplies the columns by."""
    columns = weights.folds[name].columns if name in weights.folds else None
    return x if columns is None else x / columns


def int8_product(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """``x [tokens, K]`` (float32) times an 8-bit weight ``[N, K]``, as `Int8Emitter`'s nodes compute it."""
    peak = x.abs().amax(dim=-1, keepdim=True).clamp_min(TINY)
    codes = torch.round(x * (LEVELS / peak))
    return codes @ weight.dequantize().t() * (peak / LEVELS)

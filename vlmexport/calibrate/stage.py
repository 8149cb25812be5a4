"""The quantize stage: every decoder weight's codes, calibrated where its scheme needs activations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.kept_codes import kept_codes
from vlmexport.progress import Progress
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.names import weight_names
from vlmexport.split.parts import Role

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split


def decoder_weights(
    vlm: VLM,
    split: Split,
    schemes: Mapping[str, QuantScheme],
    options: CalibrationOptions,
    work: Path,
    progress: Progress,
    requantized: Collection[str] = (),
) -> tuple[DecoderWeights, dict[str, Any] | None]:
    """The decoder's weights as they are to be stored, and what the manifest says of the calibration (None: none).

    `work` is a folder for finished layers; it may hold those of an interrupted run with the same inputs, and belongs to
    the weights until they have been written. `requantized` are weights whose codes of a quantized checkpoint are not
    kept.
    """
    tensors = weight_names(vlm.model, split.parts[Role.DECODER].module)
    if vlm.quantized is not None:
        return DecoderWeights(tensors, schemes, kept_codes(vlm.quantized, requantized)), None
    if not any(scheme.calibrated for scheme in schemes.values()):
        return DecoderWeights(tensors, schemes), None
    from vlmexport.calibrate.loop import calibrate_decoder

    calibrated = calibrate_decoder(vlm, split, schemes, options, work, progress)
    return DecoderWeights(tensors, schemes, calibrated.quantized, calibrated.folds), calibrated.report

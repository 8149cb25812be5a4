"""Against the compressed-tensors library: its decompression gives exactly what the codes mean."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lower.checkpoint.conftest import Write, quantization_config, tensors
from vlmexport.model.load import load_vlm
from vlmexport.quantize.scheme import make_scheme
from vlmexport.quantize.weights import quantize_data_free

pytest.importorskip("compressed_tensors")
MODULE, WEIGHT = "language_model.model.layers.1.mlp.down_proj", "model.language_model.layers.1.mlp.down_proj.weight"

CASES: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {}),
    ("rtn", {"symmetric": False}),
    ("rtn", {"bits": 8, "group_size": 64}),
    ("rtn", {"bits": 3, "symmetric": False, "group_size": -1}),
    ("rtn", {"bits": 2, "group_size": 16}),
    ("fp8", {}),
]


@pytest.mark.parametrize(("quant", "scheme"), CASES)
def test_the_library_decompresses_to_the_dequantized_codes(
    write: Write, source: Path, quant: str, scheme: dict[str, Any]
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder = write("compressed-tensors", quant, **scheme)
    group = QuantizationConfig.model_validate(quantization_config(folder)).config_groups["group_0"]
    stored = {k.removeprefix(MODULE + "."): t for k, t in tensors(folder).items() if k.startswith(MODULE + ".")}
    stored["weight_scale"] = stored["weight_scale"].float()  # as transformers does when it loads in float32
    found = BaseCompressor.get_value_from_registry(group.format).decompress(stored, group)["weight"]
    weight = dict(load_vlm(str(source)).model.named_parameters())[WEIGHT]
    assert torch.equal(found.float(), quantize_data_free(weight, make_scheme(quant, **scheme)).dequantize())


def test_layers_of_other_bits_are_a_group_of_their_own(source: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from vlmexport import api
    from vlmexport.checkpoint_plan import CheckpointOptions
    from vlmexport.verify.checkpoint import LOSS_CHECK

    scheme = replace(make_scheme("rtn"), overrides={"*.down_proj": make_scheme("rtn", bits=8)})
    options = CheckpointOptions("compressed-tensors", scheme)
    result = api.quantize_checkpoint(str(source), tmp_path / "mixed", options)
    assert result.report is not None
    assert [c.name for c in result.report.checks if c.status != "passed"] == [LOSS_CHECK]
    groups = quantization_config(result.path)["config_groups"]
    assert {g["weights"]["num_bits"] for g in groups.values()} == {4, 8}
    eight = next(g for g in groups.values() if g["weights"]["num_bits"] == 8)
    assert MODULE in eight["targets"]
    assert WEIGHT.removesuffix(".weight") in eight["targets"]
    assert not any("up_proj" in target for target in eight["targets"])

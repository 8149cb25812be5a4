"""Norms are told apart by what they compute."""

import pytest
import torch
from torch import nn
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vlmexport.split.norms import layer_norm_of, rms_norm_of


class Shifted(Cohere2LayerNorm):
    """Looks like a LayerNorm and is none."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 0.1


@pytest.mark.parametrize(
    ("module", "layer", "rms"),
    [
        (nn.LayerNorm(8), (1e-5, True), None),
        (nn.LayerNorm(8, bias=False), (1e-5, False), None),
        (Cohere2LayerNorm(8, eps=1e-3), (1e-3, False), None),
        (LlamaRMSNorm(8, eps=1e-6), None, (1e-6, 0.0)),
        (Shifted(8), None, None),
        (nn.Linear(8, 8), None, None),
    ],
)
def test_norms(module: nn.Module, layer: object, rms: object) -> None:
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    assert layer_norm_of(module) == layer
    assert rms_norm_of(module) == rms

"""Layers that look alike and are not must not stand for each other."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vlmexport.split.kinds import proven_kinds
from vlmexport.split.layers import layer_kinds

WIDTH = 8


class Layer(nn.Module):
    """`index` is hidden in a list, where no signature looks."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.layer_idx = index
        self.settings = [index]
        self.register_buffer("gain", torch.ones(1), persistent=False)

    def forward(self, hidden_states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.linear(hidden_states) * self.gain + table


class Twice(Layer):
    """Computes something else from its second layer on."""

    def forward(self, hidden_states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        out = super().forward(hidden_states, table)
        return out if self.settings[0] == 0 else torch.tanh(out)


class Attending(Layer):
    """Calls attention with a window that is written where no signature looks."""

    window = (None, None, 4)

    def forward(self, hidden_states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        from transformers import AttentionInterface

        attend = AttentionInterface()["vlmexport_kinds"]
        heads = hidden_states[:, None]
        window = type(self).window[self.settings[0]]
        attend(self, heads, heads, heads, None, scaling=1.0, sliding_window=window, is_causal=True)
        return super().forward(hidden_states, table)


class Decoder(nn.Module):
    """Three layers of one class; `tables` are what each gets beside the hidden state."""

    dtype = torch.float32

    def __init__(self, kind: type[Layer], tables: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        text = SimpleNamespace(hidden_size=WIDTH, num_hidden_layers=3)
        self.config = SimpleNamespace(get_text_config=lambda: text, _attn_implementation="sdpa")
        self.layers = nn.ModuleList(kind(i) for i in range(3))
        self.tables = [torch.full((1, 1, WIDTH), value) for value in tables]

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> Any:
        hidden = inputs_embeds
        for layer, table in zip(self.layers, self.tables, strict=True):
            hidden = layer(hidden, table)
        return hidden


@pytest.mark.parametrize(
    ("decoder", "kinds"),
    [
        (Decoder(Layer), (0, 0, 0)),
        (Decoder(Twice), (0, 1, 2)),
        (Decoder(Attending), (0, 0, 2)),
        (Decoder(Layer, (1.0, 1.0, 2.0)), (0, 0, 2)),
    ],
)
def test_only_what_computes_the_same_is_one_kind(decoder: Decoder, kinds: tuple[int, ...]) -> None:
    assert layer_kinds(decoder.layers) == (0, 0, 0)
    assert proven_kinds(decoder, decoder.layers) == kinds


def test_buffers_of_a_layer_are_part_of_it() -> None:
    decoder = Decoder(Layer)
    decoder.layers[1].gain += 1
    assert proven_kinds(decoder, decoder.layers) == (0, 1, 0)

"""One layer at a time inside the real decoder is the decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.calibrate.decoders import VARIANTS, make_batches, make_decoder
from vlmexport.calibrate.capture import Batch
from vlmexport.calibrate.replay import LayerReplay, float32_parameters, relative_difference
from vlmexport.errors import UnsupportedModelError
from vlmexport.split.experts import eager_experts


def chained(decoder: Any, batch: Batch) -> torch.Tensor:
    """The decoder's output, every layer run alone on the output of the one before."""
    replay = LayerReplay(decoder, "tiny")
    hidden = None
    with torch.no_grad(), float32_parameters(decoder.modules()):
        for index in range(len(replay.layers)):
            hidden = replay.run(index, batch, hidden)
        assert hidden is not None
        return replay.final(batch, hidden)


def whole(decoder: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad(), float32_parameters(decoder.modules()):
        out: torch.Tensor = decoder(**batch.kwargs, use_cache=False).last_hidden_state
    return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_run_alone_give_the_decoders_output(variant: str, dtype: torch.dtype) -> None:
    decoder = make_decoder(variant, dtype).get_decoder()
    batch = make_batches(1)[0]
    with eager_experts(decoder):
        LayerReplay(decoder, "tiny").check(batch)
        assert torch.equal(chained(decoder, batch), whole(decoder, batch))


def test_deepstack_and_3d_positions_come_from_the_decoder_itself() -> None:
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    config = Qwen3VLTextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=160,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    )
    decoder = Qwen3VLTextModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    batch = make_batches(1)[0]
    image = torch.zeros_like(batch.valid)
    image[:, 3:9] = True
    extra = [torch.randn(int(image.sum()), 64, generator=generator) for _ in range(2)]
    positions = torch.randint(0, 20, (3, *batch.valid.shape), generator=generator)
    kwargs = {**batch.kwargs, "position_ids": positions, "visual_pos_masks": image, "deepstack_visual_embeds": extra}
    full = Batch(kwargs, batch.valid, image, batch.input_ids, batch.answer)
    LayerReplay(decoder, "tiny").check(full)
    assert torch.equal(chained(decoder, full), whole(decoder, full))
    without = Batch({**kwargs, "deepstack_visual_embeds": None}, batch.valid, image, batch.input_ids, batch.answer)
    assert not torch.allclose(whole(decoder, without), whole(decoder, full))


def test_a_layer_that_needs_another_layers_state_is_refused() -> None:
    decoder = make_decoder("grouped").get_decoder()
    first, second = decoder.layers
    left: list[torch.Tensor] = []
    run_first, run_second = first.forward, second.forward

    def leave(*args: Any, **kwargs: Any) -> Any:
        left[:] = [run_first(*args, **kwargs)]
        return left[0]

    def take(*args: Any, **kwargs: Any) -> Any:
        return run_second(*args, **kwargs) + left.pop()

    first.forward, second.forward = leave, take
    with pytest.raises(UnsupportedModelError, match=r"layer 1 needs more than its input.*--quant rtn"):
        LayerReplay(decoder, "tiny").check(make_batches(1)[0])


def test_a_layer_that_returns_more_than_a_hidden_state_is_refused() -> None:
    decoder = make_decoder("grouped").get_decoder()
    forward = decoder.layers[0].forward
    decoder.layers[0].forward = lambda *a, **k: (forward(*a, **k), torch.ones(1))
    with pytest.raises(UnsupportedModelError, match="layer 0 returns more than a hidden state"):
        LayerReplay(decoder, "tiny").check(make_batches(1)[0])


def test_parameters_come_back_as_the_same_objects() -> None:
    decoder = make_decoder("grouped", torch.bfloat16).get_decoder()
    before = {name: id(p) for name, p in decoder.named_parameters()}
    with float32_parameters(decoder.layers[0].modules()):
        assert {p.dtype for p in decoder.layers[0].parameters()} == {torch.float32}
        assert {p.dtype for p in decoder.layers[1].parameters()} == {torch.bfloat16}
    assert {name: id(p) for name, p in decoder.named_parameters()} == before


def test_the_difference_leaves_padding_out() -> None:
    valid = torch.tensor([[True, False]])
    one, other = torch.tensor([[[1.0], [5.0]]]), torch.tensor([[[2.0], [9.0]]])
    assert relative_difference(one, other, valid) == 0.5

"""What matrices read: the same sums as hooks give, without padding, shared where the input is shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.calibrate.decoders import make_batches, make_decoder
from vlmexport.calibrate.capture import Batch
from vlmexport.calibrate.replay import LayerReplay
from vlmexport.calibrate.sites import SiteStatistics
from vlmexport.split.experts import eager_experts
from vlmexport.split.matrices import Matrix, matrices_of


def observed(model: Any, batches: list[Batch]) -> tuple[Any, SiteStatistics]:
    """Layer 0 and its statistics."""
    decoder = model.get_decoder()
    replay = LayerReplay(decoder, "tiny")
    statistics = SiteStatistics(dict(replay.layers[0].named_parameters()))
    with eager_experts(decoder), torch.no_grad():
        for batch in batches:
            with statistics.watching(replay.layers[0], batch.valid):
                replay.run(0, batch, None)
    return replay.layers[0], statistics


@pytest.mark.parametrize("variant", ["grouped", "fused", "many_norms"])
def test_statistics_are_those_of_plain_hooks_without_padding(variant: str) -> None:
    model, batches = make_decoder(variant), make_batches()
    layer, statistics = observed(model, batches)
    rows: dict[str, list[torch.Tensor]] = {}
    for path, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, path=path: rows.setdefault(path, []).append(args[0]))
    for batch in batches:
        with torch.no_grad():
            model.get_decoder()(**batch.kwargs, use_cache=False)
    tokens = sum(int(b.valid.sum()) for b in batches)
    assert rows
    for path, inputs in rows.items():
        x = torch.cat([i[b.valid] for i, b in zip(inputs, batches, strict=True)])
        got = statistics.of(Matrix(f"{path}.weight", f"{path}.weight"))
        assert got is not None
        assert got.tokens == tokens
        torch.testing.assert_close(got.moment, x.t() @ x, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got.absolute, x.abs().sum(0))
        torch.testing.assert_close(got.maximum, x.abs().amax(0))


def test_linears_that_read_one_tensor_share_statistics() -> None:
    _, statistics = observed(make_decoder("grouped"), make_batches())
    together = [{m.name.split(".")[-2] for m in members} for _, members in statistics.sites()]
    assert together == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]


def test_every_packed_expert_has_its_own_tokens_and_no_padding() -> None:
    model, batches = make_decoder("experts"), make_batches()
    layer, statistics = observed(model, batches)
    routed: list[torch.Tensor] = []
    layer.mlp.experts.register_forward_pre_hook(lambda _m, args: routed.append(torch.cat(args[:2], dim=1)))
    with eager_experts(model.get_decoder()), torch.no_grad():
        for batch in batches:
            model.get_decoder()(**batch.kwargs, use_cache=False)
    valid = torch.cat([row[b.valid.flatten()] for row, b in zip(routed, batches, strict=True)])
    hidden, chosen = valid[:, :64], valid[:, 64:]
    for expert in range(4):
        x = hidden[(chosen == expert).any(1)]
        got = statistics.of(Matrix(f"mlp.experts.gate_up_proj.{expert}", "mlp.experts.gate_up_proj", expert))
        assert got is not None
        assert got.tokens == len(x)
        torch.testing.assert_close(got.moment, x.t() @ x, rtol=1e-5, atol=1e-4)
    router = statistics.of(Matrix("mlp.gate.weight", "mlp.gate.weight"))
    assert router is not None
    assert router.tokens == sum(int(b.valid.sum()) for b in batches)


def test_an_expert_that_never_ran_has_no_statistics() -> None:
    model = make_decoder("experts")
    router = model.get_decoder().layers[0].mlp.gate
    forward = router.forward

    def never_the_last(hidden: torch.Tensor) -> Any:
        logits, weights, chosen = forward(hidden)
        return logits, weights, chosen.clamp_max(2)

    router.forward = never_the_last
    _, statistics = observed(model, make_batches())
    assert statistics.of(Matrix("mlp.experts.down_proj.3", "mlp.experts.down_proj", 3)) is None
    assert statistics.of(Matrix("mlp.experts.down_proj.2", "mlp.experts.down_proj", 2)) is not None


def test_matrices_of_packed_and_plain_parameters() -> None:
    made = matrices_of([("w", torch.ones(2, 3)), ("b", torch.ones(2)), ("e", torch.ones(2, 3, 4))])
    assert made == [Matrix("w", "w"), Matrix("e.0", "e", 0), Matrix("e.1", "e", 1)]
    assert made[2].of(torch.arange(24.0).view(2, 3, 4)).shape == (3, 4)

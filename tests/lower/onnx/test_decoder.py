"""The decoder graph in both dialects against PyTorch, on shapes that were not traced."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from tests.lower.onnx import decoding
from tests.lower.onnx.decoding import Model, Session, relative
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import QuantScheme

LIMIT = 1e-5
PLAIN = OnnxOptions(scheme=None)


@pytest.fixture(scope="module")
def model(tiny_idefics3: Path) -> Model:
    return decoding.load(tiny_idefics3)


@pytest.fixture(scope="module")
def gqa(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(decoding.write(decoding.lower(model, PLAIN), tmp_path_factory.mktemp("gqa")))


@pytest.fixture(scope="module")
def standard(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Session:
    graph = decoding.lower(model, dataclasses.replace(PLAIN, attention="standard"))
    return Session(decoding.write(graph, tmp_path_factory.mktemp("standard")))


def embeds(model: Model, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, model.vlm.facts.hidden_size, generator=torch.Generator().manual_seed(seed))


def ones(batch: int, length: int) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.int64)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def test_prefill_and_decode_steps(model: Model, gqa: Session) -> None:
    x = embeds(model, 1, 13)
    want = model.logits(x)
    got, past = gqa.run(x[:, :9], ones(1, 9), gqa.empty(1))
    assert relative(got, want[:, :9]) <= LIMIT
    for step in range(9, 13):
        got, past = gqa.run(x[:, step : step + 1], ones(1, step + 1), past, keep=1)
        assert relative(got[:, 0], want[:, step]) <= LIMIT


def test_one_token_prompt_and_a_chunk_behind_a_past(model: Model, gqa: Session) -> None:
    x = embeds(model, 1, 6)
    want = model.logits(x)
    got, past = gqa.run(x[:, :1], ones(1, 1), gqa.empty(1))
    assert relative(got, want[:, :1]) <= LIMIT
    got, _ = gqa.run(x[:, 1:], ones(1, 6), past)
    assert relative(got, want[:, 1:]) <= LIMIT


def test_right_padded_batch_and_ragged_decode(model: Model, gqa: Session) -> None:
    lengths, x = [7, 4], embeds(model, 2, 9)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    whole, past = gqa.run(x[:, :7], mask, gqa.empty(2))
    last, _ = gqa.run(x[:, :7], mask, gqa.empty(2), keep=1)
    for row, length in enumerate(lengths):
        want = model.logits(x[row : row + 1, :length])
        assert relative(whole[row, :length], want[0]) <= LIMIT
        assert relative(last[row, 0], want[0, -1]) <= LIMIT
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    got, _ = gqa.run(x[:, 7:8], mask, past, keep=1)
    for row, length in enumerate(lengths):
        alone = torch.cat([x[row : row + 1, :length], x[row : row + 1, 7:8]], dim=1)
        assert relative(got[row, 0], model.logits(alone)[0, -1]) <= LIMIT


@pytest.mark.parametrize("keep", [1, 3, 6, 50])
def test_num_logits_to_keep_takes_the_last_rows(model: Model, gqa: Session, keep: int) -> None:
    x = embeds(model, 1, 6)
    whole, _ = gqa.run(x, ones(1, 6), gqa.empty(1))
    kept, _ = gqa.run(x, ones(1, 6), gqa.empty(1), keep=keep)
    assert torch.equal(kept, whole[:, -min(keep, 6) :])


def test_standard_attention_takes_left_padding(model: Model, standard: Session) -> None:
    x = embeds(model, 2, 8)
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    got, past = standard.run(x[:, :7], mask, standard.empty(2), position_ids=positions(mask))
    assert relative(got[0], model.logits(x[:1, :7])[0]) <= LIMIT
    assert relative(got[1, 3:], model.logits(x[1:, 3:7])[0]) <= LIMIT
    longer = torch.cat([mask, ones(2, 1)], dim=1)
    got, _ = standard.run(x[:, 7:], longer, past, keep=1, position_ids=positions(longer)[:, -1:])
    assert relative(got[0, 0], model.logits(x[:1])[0, -1]) <= LIMIT
    assert relative(got[1, 0], model.logits(x[1:, 3:])[0, -1]) <= LIMIT


def test_repeated_layers_are_the_full_trace(model: Model, gqa: Session, tmp_path: Path) -> None:
    full = Session(decoding.write(decoding.lower(model, PLAIN, repeat=False), tmp_path))
    x = embeds(model, 2, 5)
    got, _ = gqa.run(x, ones(2, 5), gqa.empty(2))
    want, _ = full.run(x, ones(2, 5), full.empty(2))
    assert torch.equal(got, want)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (2, False)])
def test_quantized_decoder_is_pytorch_on_the_dequantized_codes(
    model: Model, tmp_path: Path, bits: int, symmetric: bool
) -> None:
    options = OnnxOptions(scheme=QuantScheme(bits=bits, symmetric=symmetric))
    graph = decoding.lower(model, options, accuracy_level=0)
    session = Session(decoding.write(graph, tmp_path))
    x = embeds(model, 1, 7)
    before = decoding.dequantize_linears(model, graph)
    try:
        want = model.logits(x)
    finally:
        decoding.restore(model, before)
    got, _ = session.run(x, ones(1, 7), session.empty(1))
    assert relative(got, want) <= LIMIT
    names = {m.name for r in graph.linears.records for m in r.members}
    assert names == {w.name for w in graph.linears.plan.weights if w.action == "quantize"}


def test_the_graph_is_in_the_runtime_s_own_words(model: Model) -> None:
    graph = decoding.lower(model, OnnxOptions(scheme=QuantScheme()))
    layers = model.vlm.facts.kv.layers
    count = {op: sum(n.op_type == op for n in graph.model.graph) for op in ("GroupQueryAttention", "MatMulNBits")}
    # q, k and v in one matrix, o, gate, up, down; and the LM head.
    assert count == {"GroupQueryAttention": layers, "MatMulNBits": 5 * layers + 1}
    skips = sum(n.op_type == "SkipSimplifiedLayerNormalization" for n in graph.model.graph)
    assert skips == 2 * layers
    attention = next(n for n in graph.model.graph if n.op_type == "GroupQueryAttention")
    assert attention.attributes["do_rotary"].as_int() == 1
    assert attention.inputs[1] is None and attention.inputs[2] is None


def test_float16_decoder_survives_products_beyond_its_range(tiny_idefics3: Path, tmp_path: Path) -> None:
    model = decoding.load(tiny_idefics3)
    weights = dict(model.vlm.model.named_parameters())
    for name, weight in weights.items():  # the range variant: the same function, other intermediate values
        if name.endswith("up_proj.weight") and "text_model" in name:
            weight.data.mul_(2.0**16)
            weights[name.replace("up_proj", "down_proj")].data.mul_(2.0**-16)
    x = embeds(model, 1, 6)
    model = dataclasses.replace(model, split=decoding.split_model(model.vlm))
    options = dataclasses.replace(PLAIN, decoder_dtype="fp16")
    graph = decoding.lower(model, options)
    assert {n.rpartition(".mlp.")[2] for n in graph.linears.wide} == {"up_proj.weight"}
    session = Session(decoding.write(graph, tmp_path / "guarded"))
    got, _ = session.run(x, ones(1, 6), session.empty(1))
    assert relative(got, model.logits(x)) <= 2e-2
    assert graph.model.graph.outputs[0].dtype == ir.DataType.FLOAT

"""Signatures and accounting, judged on a graph and a manifest made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from vlmexport.manifest import (
    Artifact,
    KeptTensor,
    Manifest,
    PartFile,
    QuantizedMember,
    QuantizedRecord,
    TensorSpec,
    write_manifest,
)
from vlmexport.model.kv import KVGeometry
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.split.parts import Role
from vlmexport.verify.codes import account, read_codes, unrecorded_matrices
from vlmexport.verify.gates import Gate
from vlmexport.verify.structure import check_structure

KV = KVGeometry(layers=1, heads=2, head_dim=4)
PAST = ("batch_size", 2, "past_sequence_length", 4)
SIGNATURES = {
    Role.VISION_ENCODER: ({"pixel_values": ("n", 3, 8, 8)}, {"vision_features": ("n", 4, 16)}),
    Role.PROJECTOR: ({"vision_features": ("n", 4, 16)}, {"image_features": ("t", 8)}),
    Role.EMBEDDING: ({"input_ids": ("batch_size", "s")}, {"inputs_embeds": ("batch_size", "s", 8)}),
    Role.DECODER: (
        {
            "inputs_embeds": ("batch_size", "s", 8),
            "attention_mask": ("batch_size", "total"),
            "num_logits_to_keep": (),
            "past_key_values.0.key": PAST,
            "past_key_values.0.value": PAST,
        },
        {"logits": ("batch_size", "k", 32), "present.0.key": PAST, "present.0.value": PAST},
    ),
}
RANGES = ((0, 5), (5, 8))


def quantized(scheme):
    torch.manual_seed(0)
    return quantize_rtn(torch.randn(8, 48), scheme)


def write_graph(path, inputs, outputs, nodes=(), weights=()):
    def values(dims):
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in dims.items()]

    graph = helper.make_graph(list(nodes), "g", values(inputs), values(outputs), list(weights))
    onnx.save(helper.make_model(graph), path)


def specs(dims):
    return tuple(TensorSpec(n, "float32", d) for n, d in dims.items())


def pack(values, bits):
    rows = [sum(int(v) << (bits * i) for i, v in enumerate(row)) for row in values]
    width = -(-values.shape[1] * bits // 8)
    return np.stack([np.frombuffer(n.to_bytes(width, "little"), np.uint8) for n in rows])


@pytest.fixture(params=[(4, True), (4, False), (2, False), (8, True)], ids=str)
def artifact(request, tmp_path):
    """An export whose decoder is one MatMulNBits of two stacked weights (three groups: an odd number)."""
    bits, symmetric = request.param
    tensor = quantized(QuantScheme(bits=bits, symmetric=symmetric, group_size=16))
    weights = {
        "w.codes": pack(tensor.codes.numpy(), bits).reshape(8, 3, -1),
        "w.scale": tensor.scale.float().numpy(),
    }
    if tensor.zero_point is not None:
        weights["w.zero_point"] = pack(tensor.zero_point.numpy(), bits)
    attributes = {"K": 48, "N": 8, "bits": bits, "block_size": 16}
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", **attributes)
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    parts = {}
    for role, (inputs, outputs) in SIGNATURES.items():
        is_decoder = role is Role.DECODER
        write_graph(
            tmp_path / f"{role}.onnx", inputs, outputs, [node] if is_decoder else [], initializers if is_decoder else []
        )
        parts[role] = PartFile(f"{role}.onnx", specs(inputs), specs(outputs))
    members = tuple(
        QuantizedMember(name, rows, part_of(tensor, rows).digest()) for name, rows in zip("ab", RANGES, strict=True)
    )
    record = QuantizedRecord("decoder", "w", bits, 16, symmetric, 48, members)
    kept = (KeptTensor("norm", "decoder", "float32", "1-D"),)
    model = {"attention": "gqa", "kv": {"dtype": "float32"}}
    manifest = Manifest("split", "cpu", {}, {}, model, {}, parts, (record,), kept)
    return write_manifest(tmp_path, manifest)


def part_of(tensor, rows):
    pick = slice(*rows)
    zero = None if tensor.zero_point is None else tensor.zero_point[pick]
    return replace(tensor, codes=tensor.codes[pick], scale=tensor.scale[pick], zero_point=zero)


def with_manifest(artifact, **changes):
    return Artifact(artifact.path, replace(artifact.manifest, **changes))


def structure(artifact, kv=KV):
    gate = Gate()
    check_structure(gate, artifact, kv)
    return {c.part: c for c in gate.checks}


def test_codes_of_stacked_weights_come_back(artifact):
    tensors, faults = read_codes(artifact)
    assert faults == []
    assert {name: t.shape for name, t in tensors.items()} == {"a": (5, 48), "b": (3, 48)}
    assert unrecorded_matrices(artifact) == []


def test_a_digest_that_differs_names_its_weight(artifact):
    (record,) = artifact.manifest.quantized
    members = (record.members[0], replace(record.members[1], digest="0" * 64))
    _, faults = read_codes(with_manifest(artifact, quantized=(replace(record, members=members),)))
    assert [(f.weight, f.part) for f in faults] == [("b", "decoder")]


@pytest.mark.parametrize("change", [{"initializer": "v"}, {"in_features": 32}, {"group_size": 32}])
def test_a_node_that_disagrees_with_the_manifest_is_a_fault_of_every_member(artifact, change):
    (record,) = artifact.manifest.quantized
    tensors, faults = read_codes(with_manifest(artifact, quantized=(replace(record, **change),)))
    assert tensors == {}
    assert [f.weight for f in faults] == ["a", "b"]


def test_a_matrix_that_the_manifest_hides_is_found(artifact):
    (record,) = artifact.manifest.quantized
    hidden = with_manifest(artifact, quantized=(replace(record, initializer="other"),))
    assert [f.weight for f in unrecorded_matrices(hidden)] == ["w"]


def test_every_parameter_is_accounted_for_once(artifact):
    names = [frozenset({n}) for n in ("a", "b", "norm")]
    assert account(artifact, names) == []
    assert account(artifact, [frozenset({"a", "tied"})]) == []
    assert account(artifact, [*names, frozenset({"lost"})]) == ["lost is in neither quantized nor unquantized"]
    twice = with_manifest(artifact, unquantized=(KeptTensor("a", "decoder", "float32", "why"),))
    assert account(twice, []) == ["a is listed 2 times"]


def test_a_right_export_has_the_right_signatures(artifact):
    checks = structure(artifact)
    assert set(checks) == {str(role) for role in SIGNATURES}
    assert {c.status for c in checks.values()} == {"passed"}


def test_a_decoder_that_crosses_needs_the_part_that_makes_what_it_attends_to(artifact):
    model = artifact.manifest.model
    checks = structure(with_manifest(artifact, model={**model, "merge": {"image_token_id": 1, "cross_layers": [0]}}))
    assert "no such part" in checks["encoder"].reason
    assert checks["decoder"].status == "failed"


def test_a_decoder_must_take_what_the_merge_needs(artifact):
    model = artifact.manifest.model
    needy = with_manifest(artifact, model={**model, "merge": {"image_token_id": 1, "extras": ["deepstack_embeds"]}})
    checks = structure(needy)
    assert [part for part, c in checks.items() if c.status == "failed"] == ["decoder"]
    assert "input deepstack_embeds is missing" in checks["decoder"].reason


def test_another_number_of_layers_or_heads_is_the_decoders_fault(artifact):
    for kv in (KVGeometry(2, 2, 4), KVGeometry(1, 3, 4)):
        checks = structure(artifact, kv)
        assert [part for part, c in checks.items() if c.status == "failed"] == ["decoder"]
    assert "past_key_values.1.key is missing" in structure(artifact, KVGeometry(2, 2, 4))["decoder"].reason


def test_a_missing_part_and_a_missing_file_are_named(artifact):
    lost = {role: part for role, part in artifact.manifest.parts.items() if role != "projector"}
    assert "no such part" in structure(with_manifest(artifact, parts=lost))["projector"].reason
    (artifact.path / "projector.onnx").write_bytes(b"not a graph")
    assert structure(artifact)["projector"].status == "failed"


def test_an_output_of_another_width_is_seen(artifact):
    inputs, outputs = SIGNATURES[Role.PROJECTOR]
    write_graph(artifact.path / "projector.onnx", inputs, {"image_features": ("t", 9)})
    assert "image_features is float32 ['t', 9]" in structure(artifact)["projector"].reason
    assert outputs != {}


def test_a_cache_of_another_type_than_the_manifest_says_is_a_fault(artifact):
    checks = structure(with_manifest(artifact, model={"attention": "gqa", "kv": {"dtype": "int8"}}))
    assert checks["decoder"].status == "failed"
    assert "past_key_values.0.key is float32, the manifest's cache int8" in checks["decoder"].reason

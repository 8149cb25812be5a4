"""The type mix where no reference file reaches: refusals, overrides, vision files, the converter's types."""

from __future__ import annotations

import pytest

from vlmexport.errors import BadInputError
from vlmexport.quantize.ggml.mix import (
    FILE_TYPES,
    MixFacts,
    MixTensor,
    TypeChoice,
    choose_types,
    file_type,
    tensor_order,
)

FACTS = MixFacts("llama", 16, 8, 2)


def text(width: int = 256, layers: int = 16) -> list[MixTensor]:
    blocks = [
        MixTensor(f"blk.{i}.{part}.weight", (64, width))
        for i in range(layers)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ]
    return [MixTensor("token_embd.weight", (40, width)), MixTensor("output_norm.weight", (width,)), *blocks]


def vision(blocks: int = 12) -> list[MixTensor]:
    parts = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
    matrices = [MixTensor(f"v.blk.{i}.{part}.weight", (64, 256)) for i in range(blocks) for part in parts]
    others = {
        "v.patch_embd.weight": (64, 3, 4, 4),
        "v.patch_embd.bias": (64,),
        "v.position_embd.weight": (16, 256),
        "v.class_embd": (256,),
        "mm.input_projection.weight": (256, 64),
        "mm.0.weight": (64, 250),
    }
    return [*matrices, *(MixTensor(name, shape) for name, shape in others.items())]


def blocks_with(chosen: dict[str, TypeChoice], part: str, kind: str) -> list[int]:
    return [int(n.split(".")[2]) for n, choice in chosen.items() if f".{part}." in n and choice.type == kind]


def test_every_file_type_is_found_in_any_case_and_by_llama_quantizes_short_names() -> None:
    assert len(FILE_TYPES) == 30
    assert len({kind.id for kind in FILE_TYPES.values()}) == 30
    assert file_type("q4_k_m") is FILE_TYPES["Q4_K_M"]
    assert file_type("Q3_K").name == "Q3_K_M"


def test_an_unknown_file_type_lists_the_choices() -> None:
    with pytest.raises(BadInputError, match=r"'Q9_K' is no GGUF file type; choose one of F32, .*Q4_K_M.*IQ3_XS"):
        choose_types(text(), "Q9_K", FACTS)


@pytest.mark.parametrize("name", FILE_TYPES)
def test_exactly_the_types_that_say_so_are_refused_without_an_importance_matrix(name: str) -> None:
    if not FILE_TYPES[name].needs_imatrix:
        assert len(choose_types(text(), name, FACTS)) == len(text())
        return
    with pytest.raises(BadInputError, match=rf"^{name} makes blk\.0\.\w+\.weight \w+, which without an importance"):
        choose_types(text(), name, FACTS)
    assert len(choose_types(text(), name, FACTS, with_imatrix=True)) == len(text())


def test_rows_that_fall_back_to_other_blocks_need_no_importance_matrix() -> None:
    chosen = choose_types(text(width=96), "IQ2_XS", FACTS)

    assert {choice.type for choice in chosen.values()} == {"IQ4_NL", "Q8_0", "Q4_0", "Q5_0", "F32"}


def test_a_fall_back_says_what_was_wanted_and_why() -> None:
    chosen = choose_types(text(width=576), "Q4_K_M", FACTS)

    assert chosen["blk.0.attn_q.weight"].wanted == "Q4_K"
    assert chosen["blk.0.attn_q.weight"].type == "Q5_0"
    assert "rows of 576 are no multiple of 256" in chosen["blk.0.attn_q.weight"].reason
    assert chosen["token_embd.weight"] == TypeChoice(
        "Q8_0",
        "Q4_K_M gives embedding Q6_K, being the output too; rows of 576 are no multiple of 256",
        "Q6_K",
    )
    assert choose_types(text(), "Q4_K_M", FACTS)["blk.0.attn_q.weight"].wanted == ""


def test_an_override_wins_falls_back_and_the_first_match_counts() -> None:
    overrides = [(r"blk\.[01]\.attn_v", "Q8_0"), ("attn_v", "q3_k"), ("ffn_down", "F32")]
    chosen = choose_types(
        [*text(), MixTensor("blk.9.odd_attn_v.weight", (4, 96))], "Q4_K_M", FACTS, overrides=overrides
    )

    assert [chosen[f"blk.{i}.attn_v.weight"].type for i in range(3)] == ["Q8_0", "Q8_0", "Q3_K"]
    assert chosen["blk.9.odd_attn_v.weight"] == TypeChoice(
        "Q4_0", "--tensor-type attn_v; rows of 96 are no multiple of 256", "Q3_K"
    )
    assert chosen["blk.3.ffn_down.weight"] == TypeChoice("F32", "--tensor-type ffn_down")


def test_overrides_hold_for_float_files_too() -> None:
    chosen = choose_types(text(), "F16", FACTS, overrides=[("ffn_down", "Q8_0")])

    assert chosen["blk.0.ffn_down.weight"].type == "Q8_0"
    assert chosen["blk.0.ffn_up.weight"].type == "F16"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("attn_(v", "Q8_0"), r"'attn_\(v' is no regular expression: missing \)"),
        (("attn_w", "Q8_0"), "'attn_w' matches no tensor; names are such as token_embd.weight, blk"),
        (("output_norm", "Q8_0"), "matches only output_norm.weight and the like, which stay as they are"),
        (("attn_v", "Q7_K"), "'Q7_K' is no ggml type; choose one of F32"),
    ],
)
def test_a_bad_override_is_refused(override: tuple[str, str], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        choose_types(text(), "Q4_K_M", FACTS, overrides=[override])


def test_vision_blocks_are_counted_unless_llama_quantizes_way_is_asked() -> None:
    right = choose_types(vision(), "Q4_K_M", FACTS, half="mmproj")
    quirk = choose_types(vision(), "Q4_K_M", FACTS, half="mmproj", compatible=True)

    assert blocks_with(right, "ffn_down", "Q6_K") == [0, 3, 6, 9, 10, 11]
    assert blocks_with(right, "attn_v", "Q6_K") == [0, 3, 6, 9, 10, 11]
    assert blocks_with(quirk, "ffn_down", "Q6_K") == list(range(12))
    assert blocks_with(quirk, "attn_v", "Q6_K") == [0, 4, 7, 8, 9, 11]


def test_a_vision_file_has_no_importance_matrix_whatever_the_text_has() -> None:
    with pytest.raises(
        BadInputError, match=r"IQ2_XS makes v\.blk\.0\.attn_k\.weight IQ2_XS.*which vision files do not have"
    ):
        choose_types(vision(), "IQ2_XS", FACTS, half="mmproj", with_imatrix=True)
    assert choose_types(vision(16), "Q4_0", FACTS, half="mmproj", with_imatrix=True)[
        "v.blk.0.ffn_down.weight"
    ].type == ("Q4_0")


def test_what_llama_quantize_cannot_do_with_a_vision_file_is_refused_when_asked_to_do_the_same() -> None:
    with pytest.raises(BadInputError, match="llama-quantize itself stops on a vision file with Q2_K"):
        choose_types(vision(), "Q2_K", FACTS, half="mmproj", compatible=True)
    assert choose_types(vision(), "Q2_K", FACTS, half="mmproj")["v.blk.0.attn_v.weight"].type == "Q3_K"


@pytest.mark.parametrize(
    ("quant", "matrix", "patch", "odd", "transposed"),
    [
        ("F32", "F32", "F32", "F32", "F32"),
        ("F16", "F16", "F16", "F16", "F16"),
        ("BF16", "BF16", "F32", "BF16", "F16"),
        ("Q8_0", "Q8_0", "F32", "F16", "F16"),
        ("Q6_K", "Q6_K", "F16", "F16", "F16"),
    ],
)
def test_a_vision_file_has_the_converters_types(quant: str, matrix: str, patch: str, odd: str, transposed: str) -> None:
    chosen = {name: choice.type for name, choice in choose_types(vision(), quant, FACTS, half="mmproj").items()}

    assert chosen["v.blk.0.attn_q.weight"] == matrix
    assert chosen["v.patch_embd.weight"] == patch
    assert chosen["mm.0.weight"] == odd
    assert chosen["mm.input_projection.weight"] == transposed
    assert {chosen[n] for n in ("v.patch_embd.bias", "v.position_embd.weight", "v.class_embd")} == {"F32"}


def test_the_order_is_by_block_number_then_by_name() -> None:
    names = ["blk.10.a", "output.weight", "blk.2.b", "blk.2.a", "v.blk.10.a", "v.blk.2.a"]

    assert tensor_order(names) == ["output.weight", "v.blk.10.a", "v.blk.2.a", "blk.2.a", "blk.2.b", "blk.10.a"]


def test_the_answer_does_not_depend_on_the_order_of_the_tensors() -> None:
    forward, backward = text(), text()[::-1]

    assert choose_types(forward, "Q4_K_M", FACTS) == choose_types(backward, "Q4_K_M", FACTS)


def test_an_expert_tensor_outside_the_blocks_is_refused() -> None:
    facts = MixFacts("llama", 16, 8, 2, experts=8)
    with pytest.raises(BadInputError, match=r"blk\.16\.ffn_down_exps\.weight is in none of the 16 blocks"):
        choose_types([*text(), MixTensor("blk.16.ffn_down_exps.weight", (8, 4, 256))], "Q4_K_M", facts)

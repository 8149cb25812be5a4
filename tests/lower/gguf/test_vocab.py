"""Vocabularies: token ids of llama.cpp's own tokenizer against Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.lower.gguf import tokenizers_for_tests as make
from tests.lower.gguf.llama_vocabulary import LlamaVocabulary
from tests.tiny import make_tokenizer
from vlmexport.demo import model_dir
from vlmexport.errors import BadInputError, NotPossibleHereError, UnsupportedModelError
from vlmexport.lower.gguf import tokenizer_files
from vlmexport.lower.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from vlmexport.lower.gguf.vocab import Vocabulary, read_vocabulary

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
GEMMA = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def metaspace(scheme: str, *, split: bool = False) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def read(tokenizer: dict[str, Any], folder: Path, extra_rows: int = 0, **config: Any) -> Vocabulary:
    return read_vocabulary(folder, "llama", make.save(tokenizer, folder, **config) + extra_rows)


def differing(vocabulary: Vocabulary, tokenizer: dict[str, Any], folder: Path, start: str = "") -> list[str]:
    """Random texts whose ids are not Hugging Face's."""
    reference = Tokenizer.from_str(json.dumps(tokenizer))
    texts = [f"{start}{make.text(i, 2)}{('', '<image>', '<s>')[i % 3]}{make.text(-i, 1)}" for i in range(100)]
    with LlamaVocabulary(vocabulary.metadata, folder) as llama:
        return [t for t in texts if llama.tokenize(t) != reference.encode(t, add_special_tokens=False).ids]


def probe_agrees(vocabulary: Vocabulary, folder: Path) -> bool:
    with LlamaVocabulary(vocabulary.metadata, folder) as llama:
        return llama.tokenize(vocabulary.probe_text) == list(vocabulary.probe_ids)


def test_the_bundled_model(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(model_dir(), "llama", 512)
    assert vocabulary.metadata["tokenizer.ggml.pre"] == "smollm"
    assert vocabulary.metadata["tokenizer.ggml.add_bos_token"] is False
    assert vocabulary.notes == ()
    assert all(f"<row_{r}_col_{c}>" in vocabulary.probe_text for r in range(1, 7) for c in range(1, 7))
    assert probe_agrees(vocabulary, tmp_path)


def test_the_tiny_checkpoints_with_rows_to_spare(tmp_path: Path) -> None:
    make_tokenizer(448).save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, "llama", 460)
    tokens, types = vocabulary.metadata["tokenizer.ggml.tokens"], vocabulary.metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert tokens[-1] == "[PAD459]"
    assert types[-1] == 5
    assert probe_agrees(vocabulary, tmp_path)


COMMON = ("gpt-2", "smollm", "qwen2", "llama-bpe", "tekken")
LINES = [pytest.param(p, id=p.name, marks=[] if p.name in COMMON else [pytest.mark.slow]) for p in PRE_TOKENIZERS]


@pytest.mark.parametrize("line", LINES)
def test_every_pre_tokenizer_of_the_table(line: PreTokenizer, tmp_path: Path) -> None:
    tokenizer = make.byte_level(make.as_json(line), ignore_merges=line.ignore_merges)
    vocabulary = read(tokenizer, tmp_path)
    assert vocabulary.metadata["tokenizer.ggml.pre"] == line.name
    assert probe_agrees(vocabulary, tmp_path)
    assert bool(vocabulary.notes) == bool(line.caveat)
    wrong = differing(vocabulary, tokenizer, tmp_path)
    assert not wrong or line.caveat, wrong[:3]


def test_a_wrong_pre_tokenizer_gives_other_ids(tmp_path: Path) -> None:
    for line in PRE_TOKENIZERS[:4]:
        vocabulary = read(make.byte_level(make.as_json(line)), tmp_path)
        for other in ("default", "gpt-2", "smollm", "qwen2", "bloom"):
            vocabulary.metadata["tokenizer.ggml.pre"] = other
            assert probe_agrees(vocabulary, tmp_path) == (other == line.name), (line.name, other)


def test_other_spellings_of_a_regular_expression(tmp_path: Path) -> None:
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
    steps = [split, {**BYTES, "use_regex": False}]
    tokenizer = make.byte_level({"type": "Sequence", "pretokenizers": steps})
    vocabulary = read(tokenizer, tmp_path)
    assert vocabulary.metadata["tokenizer.ggml.pre"] == "smaug-bpe"
    assert differing(vocabulary, tokenizer, tmp_path) == []


def test_a_split_at_every_digit_is_a_step_for_digits(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
    tokenizer = make.byte_level({"type": "Sequence", "pretokenizers": [split, BYTES]})
    vocabulary = read(tokenizer, tmp_path)
    assert vocabulary.metadata["tokenizer.ggml.pre"] == "smollm"
    assert differing(vocabulary, tokenizer, tmp_path) == []


def test_what_llama_cpp_has_no_tokenizer_for_is_refused_with_its_structure(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    unknown = {"type": "Sequence", "pretokenizers": [split, {**BYTES, "use_regex": False}]}
    with pytest.raises(UnsupportedModelError, match=r"Split\(\\w\+, Isolated\) > ByteLevel"):
        read(make.byte_level(unknown), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"ByteLevel\(regex,prefix\)"):
        read(make.byte_level({**BYTES, "add_prefix_space": True}), tmp_path)
    with pytest.raises(UnsupportedModelError, match="normalizer Lowercase"):
        read(make.byte_level(BYTES, normalizer={"type": "Lowercase"}), tmp_path)
    with pytest.raises(UnsupportedModelError, match="Unigram"):
        read({**make.byte_level(BYTES), "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}}, tmp_path)


def test_whole_words_that_only_one_side_takes_are_told(tmp_path: Path) -> None:
    line = next(line for line in PRE_TOKENIZERS if line.name == "qwen2")
    tokenizer = make.byte_level(make.as_json(line), ignore_merges=True)
    tokenizer["model"]["vocab"]["zebra"] = len(tokenizer["model"]["vocab"])
    assert "'zebra'" in read(tokenizer, tmp_path).notes[0]
    tokenizer["model"]["ignore_merges"] = False
    assert read(tokenizer, tmp_path).notes == ()


SPACED: dict[str, tuple[Any, Any, bool, str]] = {
    "legacy Llama": (PREPEND, None, True, "default"),
    "spaces replaced": (REPLACE, None, True, "default"),
    "Gemma": (REPLACE, GEMMA, True, "default"),
    "Gemma trained by Hugging Face": (REPLACE, GEMMA, False, "sarvam-moe"),
    "no space in front": (None, metaspace("never"), True, "default"),
    "a space first": (None, metaspace("first"), True, "default"),
    "a space first, trained": (None, metaspace("first"), False, "sarvam-moe"),
}


RARE = ("spaces replaced", "no space in front", "a space first, trained")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in RARE else []) for n in SPACED])
def test_sentencepiece_like_vocabularies(name: str, tmp_path: Path) -> None:
    normalizer, pre_tokenizer, complete, pre = SPACED[name]
    tokenizer = make.spaced(normalizer, pre_tokenizer, complete=complete)
    vocabulary = read(tokenizer, tmp_path, extra_rows=3)
    assert vocabulary.metadata["tokenizer.ggml.pre"] == pre
    assert bool(vocabulary.notes) == ("first" in name)
    assert probe_agrees(vocabulary, tmp_path)
    assert differing(vocabulary, tokenizer, tmp_path, "<s>" if "first" in name else "") == []


def test_scores_that_do_not_come_from_the_merges_give_other_ids(tmp_path: Path) -> None:
    vocabulary = read(make.spaced(PREPEND, None, complete=True), tmp_path)
    scores = vocabulary.metadata["tokenizer.ggml.scores"]
    assert isinstance(scores, list)
    vocabulary.metadata["tokenizer.ggml.scores"] = [-1000.0] * len(scores)  # what llama.cpp's converter writes
    assert not probe_agrees(vocabulary, tmp_path)


def test_a_space_that_llama_cpp_doubles_is_told(tmp_path: Path) -> None:
    tokenizer = make.spaced(None, metaspace("always"), complete=True)
    vocabulary = read(tokenizer, tmp_path)
    assert "after a special token that a space follows" in vocabulary.notes[0]
    assert probe_agrees(vocabulary, tmp_path)
    wrong = differing(vocabulary, tokenizer, tmp_path)
    assert wrong
    assert all("<image> " in text or "<s> " in text or text.startswith(" ") for text in wrong)


def test_sentencepiece_like_vocabularies_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="merges do not follow from scores"):
        read(make.spaced(PREPEND, None, complete=False), tmp_path)
    with pytest.raises(UnsupportedModelError, match="words are split"):
        read(make.spaced(None, metaspace("never", split=True), complete=True), tmp_path)
    holes = make.spaced(PREPEND, None, complete=True)
    holes["model"]["vocab"]["<0x0a>"] = holes["model"]["vocab"].pop("<0x0A>")
    with pytest.raises(UnsupportedModelError, match="1 of 256"):
        read(holes, tmp_path)


def test_added_tokens_keep_what_hugging_face_makes_of_them(tmp_path: Path) -> None:
    tokenizer = make.byte_level(BYTES)
    for text, special in (("<|point|>", False), ("<|im_end|>", True), ("naïve token", False)):
        entry = {"id": len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"]) - 4, "content": text}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        tokenizer["added_tokens"].append({**entry, **flags})
    vocabulary = read(tokenizer, tmp_path)
    types = vocabulary.metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    assert types[-3:] == [4, 3, 4]
    assert probe_agrees(vocabulary, tmp_path)
    with LlamaVocabulary(vocabulary.metadata, tmp_path) as llama:
        assert llama.piece(len(types) - 1) == "naïve token"
        assert llama.is_end(len(types) - 2)


def test_tokens_that_swallow_spaces_are_told(tmp_path: Path) -> None:
    tokenizer = make.byte_level(BYTES)
    tokenizer["added_tokens"][3]["lstrip"] = True
    assert "<image>: Hugging Face swallows" in read(tokenizer, tmp_path).notes[0]


def test_begin_and_end(tmp_path: Path) -> None:
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    specials = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    processor = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": specials}
    tokenizer = {**make.byte_level(BYTES), "post_processor": processor}
    vocabulary = read(tokenizer, tmp_path)
    assert vocabulary.metadata["tokenizer.ggml.add_bos_token"] is True
    assert vocabulary.metadata["tokenizer.ggml.add_eos_token"] is False
    with LlamaVocabulary(vocabulary.metadata, tmp_path) as llama:
        assert llama.tokenize("a", automatic=True)[0] == 1


def test_more_end_tokens_of_the_generation_config(tmp_path: Path) -> None:
    tokenizer = make.byte_level(BYTES)
    size = make.save(tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300, 301, 302]}))
    vocabulary = read_vocabulary(tmp_path, "llama", size)
    assert "generation also ends at" in vocabulary.notes[0]
    with LlamaVocabulary(vocabulary.metadata, tmp_path) as llama:
        assert [i for i in range(size) if llama.is_end(i)] == [2, 300, 301]


def test_the_tokenizer_is_the_one_that_transformers_makes_of_the_file(tmp_path: Path) -> None:
    size = make.save(make.spaced(PREPEND, None, complete=True), tmp_path, tokenizer_class="LlamaTokenizer")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    vocabulary = read_vocabulary(tmp_path, "llama", size)
    assert vocabulary.metadata["tokenizer.ggml.add_space_prefix"] is False  # LlamaTokenizer's own, not the file's
    assert "very first word" in vocabulary.notes[0]
    assert probe_agrees(vocabulary, tmp_path)


def test_vocabulary_and_merges_without_a_tokenizer_json(tmp_path: Path) -> None:
    model = make.byte_level(BYTES)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    vocabulary = read_vocabulary(tmp_path, "qwen2", 1600)
    assert vocabulary.metadata["tokenizer.ggml.pre"] == "qwen2"
    assert "NFC" in vocabulary.notes[0]
    assert probe_agrees(vocabulary, tmp_path)


def test_a_slow_tokenizer_that_cannot_be_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no SentencePiece model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setattr(tokenizer_files, "_reads_slow", lambda: False)
    with pytest.raises(NotPossibleHereError, match="cannot read the slow tokenizer here"):
        read_vocabulary(tmp_path, "llama", 10)
    monkeypatch.setattr(tokenizer_files, "_reads_slow", lambda: True)
    with pytest.raises(BadInputError, match=r"tokenizer\.model: transformers cannot read this tokenizer"):
        read_vocabulary(tmp_path, "llama", 10)


@pytest.mark.parametrize("model", [None, {"model_type": "idefics3"}, {"model_type": "llama"}])
@pytest.mark.parametrize("content", ["{}", '{"model": 3}', '{"added_tokens": [], "model": {"type": "Foo"}}'])
def test_a_broken_fast_tokenizer_is_refused_by_its_file(
    content: str, model: dict[str, str] | None, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    if model is not None:
        (tmp_path / "config.json").write_text(json.dumps(model))
    with pytest.raises(BadInputError, match=r"tokenizer\.json is no tokenizer \(.*restore the file"):
        read_vocabulary(tmp_path, "llama", 10)


def test_a_broken_vocab_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(BadInputError, match=r"vocab\.json: transformers cannot read this tokenizer"):
        read_vocabulary(tmp_path, "qwen2", 10)


def test_two_ids_of_one_text_are_refused(tmp_path: Path) -> None:
    tokenizer = make.byte_level(BYTES)
    tokenizer["model"]["vocab"]["[PAD1600]"] = len(tokenizer["model"]["vocab"])
    make.save(tokenizer, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"are both '\[PAD1600\]'"):
        read_vocabulary(tmp_path, "llama", 1601)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path, "llama", 10)
    with pytest.raises(BadInputError, match="embedding table 100 rows"):
        read_vocabulary(model_dir(), "llama", 100)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInputError, match="not valid JSON"):
        read_vocabulary(tmp_path, "llama", 10)

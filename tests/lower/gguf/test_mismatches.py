"""Tokens that llama.cpp writes around pictures and that a vocabulary lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lower.gguf.llama_vocabulary import LlamaVocabulary
from vlmexport.demo import model_dir
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.gguf.mismatches import missing_tokens, pieces, require_tokens
from vlmexport.lower.gguf.vocab import Vocabulary, read_vocabulary
from vlmexport.runtime.llamacpp.image_tokens import PROJECTOR_TOKENS


@pytest.fixture(scope="module")
def bundled() -> Vocabulary:
    return read_vocabulary(model_dir(), "llama", 512)


def test_the_bundled_model_has_all_that_its_projector_looks_up(bundled: Vocabulary) -> None:
    assert missing_tokens("idefics3", bundled.metadata) == ()
    assert require_tokens("idefics3", bundled.metadata) == ()


def test_pieces_are_llama_cpps_own(bundled: Vocabulary, tmp_path: Path) -> None:
    with LlamaVocabulary(bundled.metadata, tmp_path) as llama:
        assert {llama.piece(i) for i in range(512)} == pieces(bundled.metadata)


def test_a_token_that_llama_cpp_looks_up_and_the_model_lacks(tiny_idefics3: Path) -> None:
    metadata = read_vocabulary(tiny_idefics3, "llama", 448).metadata
    assert missing_tokens("idefics3", metadata) == ()
    tokens = [str(token) for token in metadata["tokenizer.ggml.tokens"]]  # type: ignore[union-attr]
    without = {**metadata, "tokenizer.ggml.tokens": ["other" if t in ("\n\n", "ĊĊ") else t for t in tokens]}
    assert missing_tokens("idefics3", without) == ("\n\n",)
    with pytest.raises(UnsupportedModelError, match=r"no token '\\n\\n'.*\(idefics3\); it would stop at the first"):
        require_tokens("idefics3", without)


def test_a_token_that_is_written_in_pieces_is_told(bundled: Vocabulary) -> None:
    notes = require_tokens("qwen2vl_merger", bundled.metadata)
    assert notes == tuple(
        f"llama.cpp writes {text!r} around pictures, which is no single token of this model"
        for text in PROJECTOR_TOKENS["qwen2vl_merger"].written
    )
    assert require_tokens("a projector of llama.cpp's that writes nothing", bundled.metadata) == ()

"""Which ids begin, end and pad a text, and which of them a tokenizer adds by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmexport.lower.gguf.kinds import Kind
from vlmexport.lower.gguf.tokenizer_files import TokenizerFiles
from vlmexport.model.family import MetaValue

# transformers' name of a special token -> llama.cpp's key (the misspelling is llama.cpp's).
_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
# llama.cpp ends an answer at a token with one of these texts, whatever the metadata say (llama_vocab::impl::load).
END_TEXTS = frozenset(
    (  # noqa: SIM905
        "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
        "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
        "<｜end▁of▁sentence｜> [e~[ <|ifm|im_end|>"  # noqa: RUF001
    ).split()
)
# Keys of further end tokens, in the order in which they are filled.
_EXTRA_ENDS = ("eot_token_id", "eom_token_id")


def special_metadata(
    files: TokenizerFiles, kind: Kind, tokens: Sequence[str]
) -> tuple[dict[str, MetaValue], tuple[str, ...]]:
    """The ``*_token_id`` and ``add_*`` keys with what cannot be said by them; `tokens` are the texts by id."""
    index = {text: i for i, text in enumerate(tokens)}
    ids = {name: _find(files, name, index) for name in _KEYS}
    extra, notes = _further_ends(files, ids["eos"], tokens)
    metadata: dict[str, MetaValue] = {f"tokenizer.ggml.{_KEYS[name]}": i for name, i in ids.items() if i is not None}
    metadata |= extra
    before, after = _automatic(files)
    metadata["tokenizer.ggml.add_bos_token"] = before == [ids["bos"]]
    metadata["tokenizer.ggml.add_eos_token"] = after == [ids["eos"]]
    if kind.space_prefix is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = kind.space_prefix
    return metadata, (*notes, *_unusual_automatic(ids, before, after))


def _find(files: TokenizerFiles, name: str, index: dict[str, int]) -> int | None:
    """The tokenizer's own word first, then the model's config: an id may be named in either (Qwen2 has no BOS)."""
    text = files.special_token(name)
    if text in index:
        return index[text]
    for config in (files.model, files.model.get("text_config") or {}, files.generation):
        found = config.get(f"{name}_token_id")
        if isinstance(found, list) and found:
            found = found[0]
        if isinstance(found, int) and 0 <= found < len(index):
            return found
    return None


def _further_ends(
    files: TokenizerFiles, eos: int | None, tokens: Sequence[str]
) -> tuple[dict[str, MetaValue], tuple[str, ...]]:
    """End tokens of ``generation_config.json`` that llama.cpp does not know by their text."""
    wanted = files.generation.get("eos_token_id")
    ends = wanted if isinstance(wanted, list) else [wanted]
    unknown = [i for i in ends if isinstance(i, int) and i != eos and i < len(tokens) and tokens[i] not in END_TEXTS]
    keys: dict[str, MetaValue] = {f"tokenizer.ggml.{key}": i for key, i in zip(_EXTRA_ENDS, unknown, strict=False)}
    left = unknown[len(_EXTRA_ENDS) :]
    if not left:
        return keys, ()
    shown = ", ".join(repr(tokens[i]) for i in left)
    return keys, (
        f"generation also ends at {shown}; llama.cpp has no key left for them and goes on: pass them as stop words",
    )


def _automatic(files: TokenizerFiles) -> tuple[list[int], list[int]]:
    """Ids that Hugging Face puts before and after every text by itself."""
    plain = files.fast.encode("a", add_special_tokens=False).ids
    full = files.fast.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return full[:start], full[start + len(plain) :]


def _unusual_automatic(ids: dict[str, int | None], before: list[int], after: list[int]) -> tuple[str, ...]:
    notes = []
    for where, added, expected in (("before", before, ids["bos"]), ("after", after, ids["eos"])):
        if added and added != [expected]:
            notes.append(f"Hugging Face puts the ids {added} {where} every text; llama.cpp cannot and adds none")
    return tuple(notes)


def special_texts(metadata: Mapping[str, MetaValue]) -> dict[str, str]:
    """``bos_token`` and ``eos_token`` as llama.cpp hands them to a chat template, its defaults included."""
    tokens = metadata["tokenizer.ggml.tokens"]
    defaults = (1, 2) if metadata["tokenizer.ggml.model"] == "llama" else (11, 11)
    texts = {}
    for name, default in zip(("bos_token", "eos_token"), defaults, strict=True):
        index = metadata.get(f"tokenizer.ggml.{name}_id", default)
        if isinstance(tokens, list) and isinstance(index, int) and index < len(tokens):
            texts[name] = str(tokens[index])
    return texts

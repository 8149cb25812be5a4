"""The original model as a whole in PyTorch FP32: its words, its image features, its logits, its answers.

Nothing is split, so families that the generic split does not take are judged as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.runtime.llamacpp.prompt import TextBuilder
from vlmexport.runtime.prompt import PromptBuilder, special_tokens
from vlmexport.runtime.protocol import Array

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmexport.model.load import VLM

# Inputs that have one value per token, and what they have for an answer's tokens.
_PER_TOKEN = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}


@dataclass(frozen=True)
class FullPrompt:
    """One prompt after the model's own processor: every input by name, as tensors with a batch of one."""

    inputs: Mapping[str, torch.Tensor]

    @property
    def ids(self) -> NDArray[np.int64]:
        """Token ids, int64 ``[tokens]``; image tokens as the processor wrote them."""
        ids: NDArray[np.int64] = self.inputs["input_ids"][0].numpy().astype(np.int64)
        return ids


class FullReference:
    """The model, in float32, with its processor.

    `why_no_images` is empty, or says why the image processor cannot load here; prompts are then text only.
    """

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self.model: Any = cast(Any, vlm.model)
        self.model.float()
        self.why_no_images = ""
        trust = vlm.trust_remote_code
        try:
            self.builder = PromptBuilder(vlm.path, trust_remote_code=trust)
        except (BadInputError, ImportError) as error:
            self.why_no_images = _install_line(error)
            self.builder = TextBuilder(vlm.path, trust_remote_code=trust)

    @property
    def image_token_id(self) -> int:
        """The id that stands for one row of image features."""
        return self.vlm.facts.image_token_id

    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter and saved buffer by each of its names."""
        return dict(self.model.state_dict(keep_vars=True))

    def render(self, images: int, text: str) -> str:
        """The chat of one user turn, pictures first, ready for the answer; raises as `PromptBuilder.render`."""
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
        return self.builder.render([{"role": "user", "content": content}])

    def encode(self, rendered: str, images: Sequence[Image]) -> FullPrompt:
        """A rendered prompt through the model's own processor."""
        given = {"images": [list(images)]} if images else {}
        extra = special_tokens(self.builder.tokenizer, rendered)
        out = self.builder.processor(text=[rendered], return_tensors="pt", **extra, **given)
        return FullPrompt({name: value for name, value in out.items() if isinstance(value, torch.Tensor)})

    def features(self, prompt: FullPrompt) -> Array:
        """Image features float32 ``[image tokens, hidden]`` of all pictures, by the model's ``get_image_features``."""
        function = self.model.get_image_features
        accepted = inspect.signature(function).parameters
        given = {n: v for n, v in prompt.inputs.items() if n in accepted and n not in ("input_ids", *_PER_TOKEN)}
        with torch.no_grad():
            out = function(**given)
        features = getattr(out, "pooler_output", out)
        rows = list(features) if isinstance(features, list | tuple) else [features]
        return torch.cat([r.reshape(-1, r.shape[-1]) for r in rows]).float().numpy()

    def logits(self, prompt: FullPrompt, answer: Sequence[int], keep: int) -> Array:
        """Logits float32 ``[keep, vocab]`` behind the last `keep` tokens of the prompt with `answer` after it."""
        with torch.no_grad():
            out = self.model(**_continued(prompt, answer), use_cache=False)
        return cast(Array, out.logits[0, -keep:].float().numpy())

    def answer(self, prompt: FullPrompt, max_new_tokens: int) -> list[int]:
        """The greedy answer's tokens, its end token included; settings of the checkpoint's own do not apply."""
        ends = list(self.vlm.facts.eos_token_ids)
        with torch.no_grad():
            out = self.model.generate(
                **prompt.inputs,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
            )
        return [int(token) for token in out[0, prompt.inputs["input_ids"].shape[1] :]]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of answer tokens, special tokens left out."""
        return str(self.builder.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @contextmanager
    def substituted(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """Within the ``with`` block the named weights have other values (float32, same shapes); tied ones with them."""
        known = self.weights()
        before: dict[str, torch.Tensor] = {}
        try:
            for name, value in weights:
                before.setdefault(name, known[name].data)
                known[name].data = value.to(torch.float32).reshape(known[name].shape)
            yield
        finally:
            for name, value in before.items():
                known[name].data = value


def load_full(model: str, *, lora: str | None = None, trust_remote_code: bool = False) -> FullReference:
    """Load `model` (with the adapter `lora` merged) in float32; raises `BadInputError` when it cannot be."""
    from vlmexport.model.load import load_vlm

    return FullReference(load_vlm(model, lora=lora, trust_remote_code=trust_remote_code))


def _continued(prompt: FullPrompt, answer: Sequence[int]) -> dict[str, torch.Tensor]:
    """The inputs with `answer` behind the prompt."""
    inputs = dict(prompt.inputs)
    if len(answer):
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(answer)])], dim=1)
        for name, value in _PER_TOKEN.items():
            if name in inputs:
                more = torch.full((1, len(answer)), value, dtype=inputs[name].dtype)
                inputs[name] = torch.cat([inputs[name], more], dim=1)
    return inputs


def _install_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    missing = next((name for name in ("torchvision", "timm", "decord", "av") if name in text.lower()), "")
    line = f": pip install {missing}" if missing else f": {text[:200]}"
    return f"the model's image processor does not load here{line}"

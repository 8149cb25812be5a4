"""What calibration samples are when they reach the decoder: its arguments, captured through the real forward."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.calibrate.conversation import Turn
from vlmexport.calibrate.dataset import CalibrationSample
from vlmexport.calibrate.recipe import Recipe
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.runtime.prompt import special_tokens
from vlmexport.split.decoder import text_decoder
from vlmexport.split.examples import load_processor

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmexport.model.load import VLM

# What a processor raises when it cannot take what it is given, or cannot pad it.
_PROCESSOR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Batch:
    """The decoder's keyword arguments for B right-padded samples of up to S tokens.

    `kwargs`: all that the model gives ``get_decoder()`` (positions, masks, deepstack features, cross-attention states),
    floats in float32, with ``inputs_embeds`` ``[B, S, H]``. The masks are bool ``[B, S]``: `valid` is False at padding,
    `image` True where a token stands for a part of an image, `answer` True at the tokens of the last assistant turn
    (all False where a sample has none). `input_ids`: int64 ``[B, S]``.
    """

    kwargs: dict[str, Any]
    valid: torch.Tensor
    image: torch.Tensor
    input_ids: torch.Tensor
    answer: torch.Tensor


@dataclass(frozen=True)
class TokenShares:
    """How many valid tokens a calibration has, and how many of them stand for images."""

    tokens: int
    image_tokens: int

    @property
    def image(self) -> float:
        """Share of image tokens, 0 to 1."""
        return self.image_tokens / max(self.tokens, 1)

    def to_dict(self) -> dict[str, Any]:
        """The numbers for the manifest."""
        return {"tokens": self.tokens, "image_share": self.image, "text_share": 1 - self.image}


def token_shares(batches: Iterable[Batch]) -> TokenShares:
    """Count the valid tokens of `batches`, and those of images."""
    tokens = image_tokens = 0
    for batch in batches:
        tokens += int(batch.valid.sum())
        image_tokens += int((batch.image & batch.valid).sum())
    return TokenShares(tokens, image_tokens)


def capture_batches(
    vlm: VLM, samples: Sequence[CalibrationSample], recipe: Recipe, notes: list[str] | None = None
) -> Iterator[Batch]:
    """Run `samples` through the whole model up to the decoder, ``recipe.batch_size`` at a time, in their order.

    The vision side runs once per sample and the decoder not at all. ``recipe.text_only`` leaves the images out. A
    processor that cannot pad gets one sample at a time, a sample longer than ``recipe.max_tokens`` loses its last
    turns, and one that is still too long is left out: each of these adds a line to `notes`.

    Raises `BadInputError` when a sample cannot be made into inputs or no token is valid, `UnsupportedModelError` when
    the model has no processor or calls its decoder in a way that cannot be captured.
    """
    encoder = _Encoder(vlm, recipe, [] if notes is None else notes)
    tokens = 0
    for group in _groups(samples, recipe):
        for inputs in encoder.encode(group):
            batch = _capture(vlm, inputs)
            tokens += int(batch.valid.sum())
            yield batch
    if not tokens:
        raise BadInputError(f"calibration {recipe.name}: none of {len(samples)} samples has a token to calibrate on")
    encoder.finish()


@dataclass(frozen=True)
class _Inputs:
    """Keyword inputs of the whole model, and which tokens are answers (bool ``[B, S]``)."""

    kwargs: dict[str, torch.Tensor]
    answer: torch.Tensor


@dataclass(frozen=True)
class _Rendered:
    """A sample as the processor takes it: text with image placeholders, the text before the last answer, pictures."""

    text: str
    prompt: str
    pictures: list[Image]
    source: str


def _groups(samples: Sequence[CalibrationSample], recipe: Recipe) -> Iterator[list[CalibrationSample]]:
    """Up to ``batch_size`` consecutive samples that agree in having images or not (processors refuse a mixture)."""
    group: list[CalibrationSample] = []
    for sample in samples:
        if group and (len(group) == recipe.batch_size or bool(group[0].images) != bool(sample.images)):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


class _Encoder:
    """Samples to model inputs by the model's own processor and chat template."""

    def __init__(self, vlm: VLM, recipe: Recipe, notes: list[str]) -> None:
        self._vlm, self._recipe, self._notes = vlm, recipe, notes
        self._processor = load_processor(vlm)
        self._tokenizer: Any = self._processor.tokenizer
        # Positions count from the left, so padding on the left would shift them.
        self._tokenizer.padding_side = "right"
        self._taken = set(inspect.signature(vlm.model.forward).parameters)
        self._single = False
        self._shortened = 0
        self._too_long: list[str] = []

    def encode(self, group: Sequence[CalibrationSample]) -> Iterator[_Inputs]:
        """The inputs of `group`: one batch, or single samples where the processor cannot pad or one is too long."""
        rendered = [self._render(sample, sample.messages) for sample in group]
        if not self._single and len(group) > 1:
            try:
                made = self._process(rendered)
            except _PROCESSOR_ERRORS as error:
                self._single = True
                self._notes.append(f"the processor cannot pad, so samples ran one at a time: {_one_line(error)}")
            else:
                if made.kwargs["input_ids"].shape[1] <= self._recipe.max_tokens:
                    yield made
                    return
        for sample, whole in zip(group, rendered, strict=True):
            inputs = self._shorten(sample, whole)
            if inputs is not None:
                yield inputs

    def finish(self) -> None:
        """Add the notes that are known at the end only."""
        limit = self._recipe.max_tokens
        if self._shortened:
            self._notes.append(f"{self._shortened} samples lost their last turns to fit in {limit} tokens")
        if self._too_long:
            self._notes.append(
                f"{len(self._too_long)} samples were left out: longer than {limit} tokens: {self._too_long[0]}"
            )

    def _shorten(self, sample: CalibrationSample, whole: _Rendered) -> _Inputs | None:
        """One sample, without its last turns as far as needed; None when its first turn is too long already."""
        turns = sample.messages
        rendered = whole
        while True:
            try:
                inputs = self._process([rendered])
            except _PROCESSOR_ERRORS as error:
                name = type(self._processor).__name__
                raise BadInputError(f"{sample.source}: {name} cannot make inputs of it: {_one_line(error)}") from error
            if inputs.kwargs["input_ids"].shape[1] <= self._recipe.max_tokens:
                self._shortened += len(turns) < len(sample.messages)
                return inputs
            turns = turns[:-1]
            if not any(turn.role == "user" for turn in turns):
                self._too_long.append(sample.source)
                return None
            rendered = dataclasses.replace(self._render(sample, turns), pictures=whole.pictures)

    def _render(self, sample: CalibrationSample, turns: Sequence[Turn]) -> _Rendered:
        from jinja2 import TemplateError

        pictures = [] if self._recipe.text_only else sample.pictures()
        try:
            text = self._text(turns, len(pictures))
            prompt = self._prompt(turns, len(pictures))
        except (TemplateError, *_PROCESSOR_ERRORS) as error:
            raise BadInputError(f"{sample.source}: the chat template refuses it: {_one_line(error)}") from error
        return _Rendered(text, prompt, pictures, sample.source)

    def _prompt(self, turns: Sequence[Turn], images: int) -> str:
        """The text up to the last answer; the whole text when the last turn is not the assistant's."""
        return self._text(turns[:-1] if _is_answered(turns) else turns, images)

    def _text(self, turns: Sequence[Turn], images: int) -> str:
        """The turns with image placeholders; ready for the assistant's next turn unless the last is one."""
        if not getattr(self._processor, "chat_template", None):
            bare = "\n".join(turn.text for turn in turns)
            return self._image_token() * images + bare + ("" if _is_answered(turns) else "\n")
        messages = []
        for turn in turns:
            pictures = images if turn.role == "user" else 0
            images -= pictures
            content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": turn.text}]
            messages.append({"role": turn.role, "content": content})
        apply = self._processor.apply_chat_template
        text = str(apply(messages, add_generation_prompt=not _is_answered(turns), tokenize=False))
        # What generation never writes after an answer (a line break before the next turn) is not calibrated on.
        return text.rstrip() if _is_answered(turns) else text

    def _image_token(self) -> str:
        token = getattr(self._processor, "image_token", None)
        if isinstance(token, str):
            return token
        return str(self._tokenizer.convert_ids_to_tokens(self._vlm.facts.image_token_id))

    def _process(self, rendered: Sequence[_Rendered]) -> _Inputs:
        pictures = [r.pictures for r in rendered]
        images: dict[str, Any] = {}
        if any(pictures):
            images = {"images": pictures if len(rendered) > 1 else pictures[0]}
        texts = [r.text for r in rendered]
        padding = {"padding": True} if len(rendered) > 1 else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            made = self._processor(
                text=texts, return_tensors="pt", **special_tokens(self._tokenizer, texts[0]), **padding, **images
            )
        kwargs = {k: v for k, v in made.items() if k in self._taken and isinstance(v, torch.Tensor)}
        ids = kwargs["input_ids"]
        kwargs.setdefault("attention_mask", torch.ones_like(ids))
        return _Inputs(kwargs, self._answers(rendered, kwargs["attention_mask"]))

    def _answers(self, rendered: Sequence[_Rendered], mask: torch.Tensor) -> torch.Tensor:
        """Bool ``[B, S]``: the valid tokens that stand for the text after the prompt."""
        answer = torch.zeros_like(mask, dtype=torch.bool)
        for row, sample in enumerate(rendered):
            # Some templates open the assistant's turn with other words than those of a finished one.
            tail = sample.text[_shared_start(sample.text, sample.prompt) :]
            if tail:
                count = len(self._tokenizer(tail, add_special_tokens=False)["input_ids"])
                stop = int(mask[row].sum())
                answer[row, max(stop - count, 0) : stop] = True
        return answer


def _shared_start(one: str, other: str) -> int:
    """Number of characters that both texts begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _is_answered(turns: Sequence[Turn]) -> bool:
    return bool(turns) and turns[-1].role == "assistant"


class _DecoderReachedError(Exception):
    """Ends the whole-model forward: what follows is not needed."""


def _capture(vlm: VLM, inputs: _Inputs) -> Batch:
    """Run the model on `inputs` until it calls its decoder, and keep what it calls it with."""
    seen: list[dict[str, Any]] = []
    family = vlm.facts.model_type

    def stop(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise UnsupportedModelError(f"{family}: the decoder is called with positional arguments")
        seen.append(dict(kwargs))
        raise _DecoderReachedError

    decoder = text_decoder(vlm.model)
    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            vlm.model(**inputs.kwargs, use_cache=False)
    except _DecoderReachedError:
        pass
    finally:
        handle.remove()
    if not seen:
        raise UnsupportedModelError(f"{family}: the model's forward never calls its decoder")
    kwargs = {name: _float32(value) for name, value in seen[0].items()}
    if kwargs.get("inputs_embeds") is None:
        raise UnsupportedModelError(f"{family}: the decoder is called without inputs_embeds")
    ids = inputs.kwargs["input_ids"]
    valid = inputs.kwargs["attention_mask"].bool()
    return Batch(kwargs, valid, (ids == vlm.facts.image_token_id) & valid, ids, inputs.answer & valid)


def _float32(value: Any) -> Any:
    """`value` with every floating tensor in it, however nested, as float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _float32(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_float32(item) for item in value)
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

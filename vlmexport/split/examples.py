"""Example inputs of a whole model, made by its own processor from pictures drawn here."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.bare_prompt import BarePrompt, bare_prompt
from vlmexport.split.retrieval_examples import retrieval_inputs, with_words

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmexport.model.load import VLM

# Pixels (width, height). Processors that cut an image into tiles make fewer of them from a long picture.
_PICTURES = ((128, 32), (128, 64), (64, 64), (32, 128))
_PROMPTS = ("What is this?", "Describe the image in one sentence.", "What differs between the two images?")
# What a processor raises when it cannot take an image and a prompt of the usual form.
_PROCESSOR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)


def processor_examples(vlm: VLM) -> tuple[dict[str, torch.Tensor], ...]:
    """Keyword inputs of the whole model: one image, one image of another aspect ratio, two images in one prompt.

    All have batch 1 and hold ``input_ids`` and ``attention_mask`` int64 ``[1, sequence]`` and the processor's image
    tensors, under the names that the model's ``forward`` takes. The cheapest pictures are taken first, and the second
    example has more pixels than the first, or else other shapes, where the processor lets them vary.

    Raises `UnsupportedModelError` when the model has no processor or it cannot make such inputs.
    """
    processor = load_processor(vlm)
    made = [example_inputs(vlm, processor, [draw_picture(*size)], _PROMPTS[0]) for size in _PICTURES]
    order = sorted(range(len(made)), key=lambda i: _image_elements(made[i]))
    first = order[0]
    larger = [i for i in order if _image_elements(made[i]) > _image_elements(made[first])]
    others = larger or [i for i in order if _image_shapes(made[i]) != _image_shapes(made[first])] or order[1:]
    width, height = _PICTURES[first]
    pair = [draw_picture(width, height, seed=1), draw_picture(height, width, seed=2)]
    if vlm.facts.output == "embeddings":
        query = retrieval_inputs(vlm, processor, _PROMPTS[2])
        return made[first], with_words(made[others[0]], query), retrieval_inputs(vlm, processor, pair[1])
    return (
        made[first],
        example_inputs(vlm, processor, [draw_picture(*_PICTURES[others[0]])], _PROMPTS[1]),
        _two_pictures(vlm, processor, pair),
    )


def load_processor(vlm: VLM) -> Any:
    """The model's processor; raises `UnsupportedModelError` when there is none that takes images."""
    try:
        processor = vlm.processor()
    except ImportError as error:
        raise UnsupportedModelError(f"{vlm.source}: {_missing_package(error)}") from error
    except (OSError, *_PROCESSOR_ERRORS) as error:
        raise UnsupportedModelError(f"{vlm.source}: its processor cannot be loaded: {_one_line(error)}") from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UnsupportedModelError(
            f"{vlm.source}: no processor for images and text (got {type(processor).__name__}); "
            "the folder needs processor_config.json or preprocessor_config.json"
        )
    return processor


def example_inputs(vlm: VLM, processor: Any, images: Sequence[Image], prompt: str) -> dict[str, torch.Tensor]:
    """What the model's ``forward`` takes for `prompt` and `images`, from its processor and chat template.

    A model that gives embeddings of pages gets its one picture without the prompt.
    """
    if vlm.facts.output == "embeddings":
        return retrieval_inputs(vlm, processor, images[0])
    try:
        text = prompt_text(vlm, processor, len(images), prompt)
        made = processor(images=list(images), text=text, return_tensors="pt")
    except ImportError as error:
        raise UnsupportedModelError(f"{vlm.source}: {_missing_package(error)}") from error
    except _PROCESSOR_ERRORS as error:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: {type(processor).__name__} cannot make inputs of {len(images)} image(s) and a "
            f"prompt: {_one_line(error)}"
        ) from error
    taken = inspect.signature(vlm.model.forward).parameters
    return {k: v for k, v in made.items() if k in taken and isinstance(v, torch.Tensor)}


def prompt_text(vlm: VLM, processor: Any, images: int, prompt: str) -> str:
    """A user turn with `images` pictures: by the chat template, or by the bare image token where there is none."""
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
        turn = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    return _bare(vlm, processor).text(images, prompt)


def _bare(vlm: VLM, processor: Any) -> BarePrompt:
    """How pictures stand in a prompt of a model without a chat template."""
    token = str(processor.tokenizer.convert_ids_to_tokens(vlm.facts.image_token_id))
    return bare_prompt(processor, token) or BarePrompt(token)


def _two_pictures(vlm: VLM, processor: Any, images: Sequence[Image]) -> dict[str, torch.Tensor]:
    """Two pictures in one prompt.

    Where the processor takes one alone, what it makes of both, one behind the other in the image tensors and in the
    text: the model's parts take it, and the number of pictures is no constant of its graphs.
    """
    if getattr(processor, "chat_template", None) or _bare(vlm, processor).several:
        return example_inputs(vlm, processor, images, _PROMPTS[2])
    first, second = (example_inputs(vlm, processor, [image], _PROMPTS[2]) for image in images)
    return {name: torch.cat([first[name], second[name]], dim=int(_is_text(name))) for name in first}


def draw_picture(width: int, height: int, seed: int = 0) -> Image:
    """An RGB picture: a colour gradient with discs, no pixel pure black, the same for the same arguments."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.stack([x / width, y / height, (x + y) / (width + height)], axis=-1)
    pixels = 40 + 150 * ramp * rng.uniform(0.4, 1.0, 3)
    for _ in range(4):
        centre, radius = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0.1, 0.3) * min(width, height)
        disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        pixels[disc] = rng.uniform(20, 250, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def _image_shapes(example: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in example.items() if not _is_text(name)}


def _image_elements(example: dict[str, torch.Tensor]) -> int:
    return sum(shape.numel() for shape in _image_shapes(example).values())


def _is_text(name: str) -> bool:
    return name in {"input_ids", "attention_mask"}


def _missing_package(error: ImportError) -> str:
    if "torchvision" in str(error):
        return "its processor needs torchvision, which is not installed: pip install torchvision"
    return f"its processor needs a package that is not installed: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

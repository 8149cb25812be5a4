"""A prompt about a video, by the model's own processor: what it makes, and whether an export takes that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact
from vlmexport.model.merge import MergeSpec
from vlmexport.model.videos import VIDEO_PIXELS
from vlmexport.runtime.prompt import PromptBuilder, load_image
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.video import Video

if TYPE_CHECKING:
    from PIL.Image import Image

# What a processor raises for a video that it cannot take.
_REFUSALS = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError)


def build_video_prompt(
    builder: PromptBuilder, images: Sequence[Path | Image], video: Video, prompt: str
) -> ModelInputs:
    """Inputs of one user turn: the images, the video, then the text.

    The processor takes every frame, or samples them where its settings say how many (`_samples`). Raises
    `BadInputError` where it takes no videos, its chat template has no place for one, or it refuses this one.
    """
    maker, token = (getattr(builder.processor, name, None) for name in ("video_processor", "video_token"))
    if maker is None or not isinstance(token, str):
        raise BadInputError("the model's processor takes no videos; give pictures with --image")
    if images and (both := _shared(builder.processor)):
        raise BadInputError(
            f"the model's processor makes {both[0]} of pictures and of videos, so a prompt has the one or the other"
        )
    content = [*({"type": "image"} for _ in images), {"type": "video"}, {"type": "text", "text": prompt}]
    text = builder.render([{"role": "user", "content": content}])
    if (found := text.count(token)) != 1:
        raise BadInputError(f"the chat template writes {found} places {token!r} for one video")
    pictures = [load_image(i) if isinstance(i, Path) else i for i in images]
    given = {"videos": [video.pixels()], "video_metadata": [video.metadata()], "do_sample_frames": _samples(maker)}
    try:
        return builder.encode(text, pictures, given)
    except _REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInputError(f"the model's processor refuses a video of {len(video.frames)} frames: {reason}") from error


def _samples(maker: Any) -> bool:
    """Does the video processor choose frames? By its own word, or where it has both a rate and a largest number.

    The second is what SmolVLM's chat does; others with neither take every frame.
    """
    rate, most = getattr(maker, "fps", None), getattr(maker, "num_frames", None)
    return bool(getattr(maker, "do_sample_frames", False)) or (rate is not None and most is not None)


def _shared(processor: Any) -> list[str]:
    """Names that stand for tensors of pictures and for tensors of videos."""
    names = [set(getattr(getattr(processor, part, None), "model_input_names", ()))
             for part in ("image_processor", "video_processor")]  # fmt: skip
    return sorted(names[0] & names[1])


def require_video_inputs(artifact: Artifact, inputs: ModelInputs) -> None:
    """Raise `BadInputError` where the export at hand cannot take `inputs` of a prompt with a video.

    Either the model's rule for videos is in the manifest, or the frames are pictures, all of whose tensors its vision
    encoder takes.
    """
    names = set(inputs.pixel_inputs)
    if not names:
        raise BadInputError("the model's processor makes nothing of a video")
    if VIDEO_PIXELS in names:
        if MergeSpec.from_dict(artifact.manifest.model["merge"]).video is None:
            raise BadInputError(f"{artifact.path}: videos of this model are not supported; give pictures with --image")
        return
    known = {spec.name for spec in artifact.manifest.parts["vision_encoder"].inputs}
    if unknown := sorted(names - known):
        raise BadInputError(
            f"{artifact.path}: the processor makes {', '.join(unknown)} of a video, which the export does not take; "
            "give pictures with --image"
        )

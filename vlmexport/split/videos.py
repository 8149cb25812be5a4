"""How videos enter a decoder, found by giving the whole model one and looking at what reached it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING

import torch

from vlmexport.model.merge import MergeSpec
from vlmexport.model.positions import prompt_positions
from vlmexport.model.videos import (
    GRID,
    PIXELS,
    SECONDS,
    VIDEO_GRID,
    VIDEO_PIXELS,
    VideoSpec,
    as_pictures,
    token_kinds,
)
from vlmexport.split.decoder import DecoderCall, capture_decoder_call
from vlmexport.split.parts import Part
from vlmexport.split.positions import dense_deepstack

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

Example = dict[str, torch.Tensor]
_LIMIT = 1e-5
_FRAMES, _SECONDS = 2, 1.5
_KINDS = "mm_token_type_ids"
_LEFT_OUT = "videos are left out, pictures are not"
_BY_PICTURE_DIMS = 5  # [pictures, tiles, channels, height, width]
_OTHERWISE = "enter this model in a way of their own, which no part of an export has"
# What a model raises for a prompt whose video tokens do not stand as it expects.
_NOT_SO = (ValueError, RuntimeError, IndexError, KeyError, TypeError, AttributeError, StopIteration)


def with_videos(
    vlm: VLM, merge: MergeSpec, parts: tuple[Part, Part], example: Example
) -> tuple[MergeSpec, tuple[str, ...]]:
    """`merge` with the place of videos, where positions and features of one are those of the rules that are known.

    And a note that says why not, where the model takes videos and none of those rules is its own.

    `parts` are the vision encoder and the projector, whose features of a video's frames are compared with the model's;
    `example` is one of the whole model with a picture. Models that take no videos keep none, without a note.
    """
    if merge.packing is not None and _takes_videos(vlm):
        return _with_tiles(vlm, merge, parts, example)
    reasons = []
    candidates = _candidates(vlm) if merge.position == "mrope" and GRID in example else []
    if not candidates and _takes_videos(vlm):
        return merge, (f"{_LEFT_OUT}: {VIDEO_PIXELS} {_OTHERWISE}",)
    if merge.pictures is not None and candidates:
        return merge, ("videos are left out, pictures are not: the vision encoder takes one picture at a time",)
    for spec in candidates:
        found = dataclasses.replace(merge, video=spec)
        prompt = _prompt(vlm, found, spec, example)
        try:
            call = capture_decoder_call(vlm.model, prompt)
        except _NOT_SO as error:
            reasons.append(f"the model raises {type(error).__name__}: {_one_line(error)}")
            continue
        if not _same_positions(found, prompt, call):
            reasons.append("its positions are not those counted from the grids")
        elif not _same_features(vlm, found, parts, prompt, call):
            reasons.append("its features are not those of the frames as pictures")
        else:
            return found, ()
    tried = "; ".join(dict.fromkeys(reasons))
    return merge, (
        (f"videos are left out, pictures are not: for the layouts that are known, {tried}",) if tried else ()
    )


def _with_tiles(
    vlm: VLM, merge: MergeSpec, parts: tuple[Part, Part], example: Example
) -> tuple[MergeSpec, tuple[str, ...]]:
    """`with_videos` for a model that cuts pictures into tiles: frames may be tiles of fewer features."""
    token, packing = _video_token(vlm), merge.packing
    if token is None or packing is None or example[PIXELS].ndim != _BY_PICTURE_DIMS:
        return merge, (f"{_LEFT_OUT}: {VIDEO_PIXELS} {_OTHERWISE}",)
    side = -(-packing.grid // 2)
    found = dataclasses.replace(merge, video=VideoSpec(token, pool=side))
    frames = torch.stack([example[PIXELS][0, 0].roll(shift, -1) for shift in range(_FRAMES)])
    ids = example["input_ids"][0]
    first = int((ids == merge.image_token_id).nonzero()[0])
    run = torch.full((_FRAMES * side * side + packing.newline,), token)
    given = torch.cat([ids[:first], run, ids[first:][ids[first:] != merge.image_token_id]])[None]
    prompt = {"input_ids": given, "attention_mask": torch.ones_like(given), VIDEO_PIXELS: frames[None]}
    try:
        call = capture_decoder_call(vlm.model, prompt)
    except _NOT_SO as error:
        return merge, (
            f"{_LEFT_OUT}: with frames as tiles the model raises {type(error).__name__}: {_one_line(error)}",
        )
    with torch.no_grad():
        rows = parts[1].module(**{parts[1].signature.inputs[0].name: parts[0].module(**{PIXELS: frames})})
    made = torch.from_numpy(packing.pooled(frames.float().numpy(), rows.float().numpy(), side))
    if not _close(made, call.kwargs["inputs_embeds"][given == token]):
        return merge, (f"{_LEFT_OUT}: {VIDEO_PIXELS} {_OTHERWISE}",)
    return found, ()


def _video_token(vlm: VLM) -> int | None:
    config = vlm.model.config
    token = getattr(config, "video_token_id", getattr(config, "video_token_index", None))
    return None if token is None else int(token)


def _takes_videos(vlm: VLM) -> bool:
    return VIDEO_PIXELS in inspect.signature(vlm.model.forward).parameters


def _candidates(vlm: VLM) -> list[VideoSpec]:
    """The ways in which videos may enter, the likeliest first; none for a model that takes no videos by grid."""
    taken = inspect.signature(vlm.model.forward).parameters
    config, token = vlm.model.config, _video_token(vlm)
    if token is None or not {VIDEO_PIXELS, VIDEO_GRID} <= taken.keys():
        return []
    speed = getattr(getattr(config, "vision_config", None), "tokens_per_second", None)
    timed = [VideoSpec(token, per_second=float(speed))] if speed else []
    return [*timed, VideoSpec(token), VideoSpec(token, each_frame=True)]


def _prompt(vlm: VLM, merge: MergeSpec, video: VideoSpec, example: Example) -> Example:
    """A prompt with a video of the example's first picture, and with that picture behind it."""
    ids, token = example["input_ids"][0], merge.image_token_id
    grid = example[GRID][:1]
    rows = int(grid.prod())
    count = rows // merge.spatial_merge_size**2
    first = int((ids == token).nonzero()[0])
    before, after = ids[:first], ids[first + count :]
    after = after[after != token]

    def run(kind: int, length: int) -> torch.Tensor:
        return torch.cat([before, torch.full((length,), kind), after])

    frames = [count] * _FRAMES if video.each_frame else [count * _FRAMES]
    given = torch.cat([*(run(video.token_id, length) for length in frames), run(token, count)])[None]
    picture = example[PIXELS][:rows]
    made = {
        "input_ids": given,
        "attention_mask": torch.ones_like(given),
        PIXELS: picture,
        GRID: grid,
        VIDEO_PIXELS: torch.cat([picture.roll(shift, 0) for shift in range(_FRAMES)]),
        VIDEO_GRID: grid * torch.tensor([_FRAMES, 1, 1]),
    }
    if SECONDS in inspect.signature(vlm.model.forward).parameters:
        made[SECONDS] = torch.tensor([_SECONDS])
    if _KINDS in example:
        made[_KINDS] = torch.from_numpy(token_kinds(merge, given.numpy())).int()
    return made


def _same_positions(merge: MergeSpec, prompt: Example, call: DecoderCall) -> bool:
    """Are the decoder's positions those that are counted from the grids?"""
    given = call.kwargs.get("position_ids")
    pixels = {name: prompt[name].numpy() for name in (GRID, VIDEO_GRID, SECONDS) if name in prompt}
    counted = torch.from_numpy(prompt_positions(merge, prompt["input_ids"].numpy(), pixels))
    return given is not None and given.shape == counted.shape and torch.equal(given, counted)


def _same_features(vlm: VLM, merge: MergeSpec, parts: tuple[Part, Part], prompt: Example, call: DecoderCall) -> bool:
    """Are what the two `parts` make of frames as pictures the rows that the model put into its embeddings?"""
    vision, projector = parts
    arrays = {n: prompt[n].float().numpy() if prompt[n].is_floating_point() else prompt[n].numpy()
              for n in (PIXELS, GRID, VIDEO_PIXELS, VIDEO_GRID)}  # fmt: skip
    ids, pixels = as_pictures(merge, prompt["input_ids"].numpy(), arrays)
    inputs = {spec.name: torch.from_numpy(pixels[spec.name]) for spec in vision.signature.inputs}
    with torch.no_grad():
        made = vision.module(**inputs)
        named = zip(projector.signature.inputs, made if isinstance(made, tuple) else (made,), strict=True)
        rows = projector.module(**{spec.name: tensor for spec, tensor in named})
    places = torch.from_numpy(ids == merge.image_token_id)
    hidden = call.kwargs["inputs_embeds"].shape[-1]
    pairs = [(rows[:, :hidden], call.kwargs["inputs_embeds"][places])]
    if merge.deepstack_layers:
        added = rows[:, hidden:].reshape(len(rows), merge.deepstack_layers, hidden).transpose(0, 1)
        pairs.append((added, dense_deepstack(call)[:, places]))
    return all(_close(got, wanted) for got, wanted in pairs)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or "no message"


def _close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal but for rounding; a model in half precision rounds what is put together here in float32."""
    if got.shape != wanted.shape:
        return False
    scale = wanted.float().abs().max().clamp_min(1e-12)
    limit = max(_LIMIT, 2 * torch.finfo(wanted.dtype).eps)
    return bool((got.float() - wanted.float()).abs().max() / scale <= limit)

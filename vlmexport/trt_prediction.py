"""What an export will need on a GPU, and the times that its data-sheet rates leave it at least.

Memory is a prediction, times are floors: what NVIDIA's data sheets allow at best, never measurements. The workspace's
formula was fitted to what TensorRT for RTX 1.7.1 says of graphs that it builds ("Total Activation Memory" in its log).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmexport.engines import MAX_KEPT, TrtLimits
from vlmexport.errors import BadInputError
from vlmexport.gpu import Gpu
from vlmexport.plan import head_weight_name, linear_weights

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.plan import ExportPlan

# An allowance for the CUDA context and the libraries' kernels, not measured here: the 600 MiB that NVIDIA once named
# for loading TensorRT's libraries (developer forum, "Why TensorRT occupy many memory", of TensorRT 3).
RUNTIME_BYTES = 600 * 2**20
# An allowance for the driver. A profile's gigabytes are decimal, which is less than cards have: an A100 of "80 GB" has
# 80 GiB, and a T4 of "16 GB" 15 GiB, one in sixteen being for error correction.
DRIVER_BYTES = 500_000_000
# Where the CPU uses the same memory, an eighth is left to the system and to the program itself.
SYSTEM_SHARE = 1 / 8
# An engine's scratch memory besides its activations: decode profiles, which have hardly any, ask for 8 to 17 MB.
SCRATCH_BYTES = 17_000_000
_HALF, _FLOAT = 2, 4
_LARGEST = 1 << 24


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of an export that memory and time depend on.

    `vision`, `projector`, `embedding`, `decoder`: bytes of each part's weights as stored. `decoder_parameters` are
    those of the matrices that every token meets, `head_parameters` those of the LM head, which only tokens with logits
    meet; `vision_parameters` those that every patch of an image meets. `intermediate` and `vision_width` are the
    widest rows inside the decoder's and the encoder's layers. `patches` of one image (one tile); 0 where it is unknown.
    `kv_bytes_per_token` are the cache's, for one sequence. `decoder_engines` is 2 where prefill and decode have an
    engine each, with the weights in both.
    """

    vision: int
    projector: int
    embedding: int
    decoder: int
    decoder_parameters: int
    head_parameters: int
    vision_parameters: int
    hidden: int
    intermediate: int
    vocab: int
    layers: int
    vision_width: int
    patches: int
    kv_bytes_per_token: int
    decoder_engines: int = 1

    @property
    def weights(self) -> int:
        """Bytes of all weights, each of which an engine holds in the GPU's memory."""
        return self.vision + self.projector + self.embedding + self.decoder_engines * self.decoder

    @staticmethod
    def from_plan(plan: ExportPlan, vlm: VLM, patches: int, *, two_decoders: bool = False) -> ModelSizes:
        """The sizes of the export that `plan` describes; `patches` as `patches_per_image` or the caller knows them."""
        linear, head = linear_weights(vlm), head_weight_name(vlm)
        used = [w for w in plan.weights if w.action != "drop"]
        stored = {part: sum(w.bytes_after for w in used if w.part == part) for part in {w.part for w in used}}
        matrices = [w for w in used if w.name in linear and w.name != head]
        decoder = [w for w in matrices if w.part == "decoder"]
        vision = [w for w in matrices if w.part == "vision_encoder"]
        return ModelSizes(
            vision=stored.get("vision_encoder", 0),
            projector=stored.get("projector", 0),
            embedding=stored.get("embed_tokens", 0),
            decoder=stored["decoder"],
            decoder_parameters=sum(w.elements for w in decoder),
            head_parameters=plan.weight(head).elements,
            vision_parameters=sum(w.elements for w in vision),
            hidden=vlm.facts.hidden_size,
            intermediate=max(max(w.shape) for w in decoder),
            vocab=vlm.facts.vocab_size,
            layers=vlm.facts.kv.layers,
            vision_width=max((max(w.shape) for w in vision), default=0),
            patches=patches,
            kv_bytes_per_token=plan.kv_bytes_per_token,
            decoder_engines=2 if two_decoders else 1,
        )


def patches_per_image(config: Any) -> int:
    """Patches of one image by a model's config; 0 where its vision encoder has no fixed image size."""
    vision = getattr(config, "vision_config", None)
    image, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    sides = [(v, v) if isinstance(v, int) else v for v in (image, patch)]
    if not all(
        isinstance(s, list | tuple) and len(s) == 2 and all(isinstance(n, int) and n > 0 for n in s) for s in sides
    ):
        return 0
    (height, width), (down, across) = sides  # type: ignore[misc]
    return int(height // down) * int(width // across)


@dataclass(frozen=True)
class Floor:
    """The least time that a step can take by data-sheet rates: the longer of reading memory and of arithmetic.

    `step` says what is done, `unit` what the time is for (``token``); `memory` and `arithmetic` are the two formulas
    with their numbers, and the times in seconds. Attention's own arithmetic is left out, so it is still a floor.
    """

    step: str
    unit: str
    memory: str
    memory_seconds: float
    arithmetic: str
    arithmetic_seconds: float

    @property
    def seconds(self) -> float:
        """The floor."""
        return max(self.memory_seconds, self.arithmetic_seconds)

    @property
    def formula(self) -> str:
        """What makes the floor, with its numbers, and the other of the two times."""
        bound = [(self.memory_seconds, self.memory, "memory"), (self.arithmetic_seconds, self.arithmetic, "arithmetic")]
        (_, formula, _), (other, _, name) = sorted(bound, key=lambda b: -b[0])
        return f"{self.step}: {formula} = {_time(self.seconds)} per {self.unit} ({name}: {_time(other)})"

    def to_dict(self) -> dict[str, Any]:
        """The floor as JSON data."""
        return {**dataclasses.asdict(self), "seconds": self.seconds, "formula": self.formula}


def decode_floor(gpu: Gpu, sizes: ModelSizes, batch: int, length: int) -> Floor:
    """One step of `batch` rows that hold `length` tokens each: all decoder weights and the tokens' cache are read."""
    weights, cache = sizes.decoder + batch * sizes.hidden * _HALF, batch * length * sizes.kv_bytes_per_token
    rows = "1 row" if batch == 1 else f"{batch} rows"
    parameters = sizes.decoder_parameters + sizes.head_parameters
    return Floor(
        step=f"decode, {rows} with {length} tokens each in the cache",
        unit="token" if batch == 1 else f"step of {batch} tokens",
        memory=f"({_size(weights)} weights + {_size(cache)} cache) / {_bandwidth(gpu)}",
        memory_seconds=(weights + cache) / gpu.bandwidth,
        arithmetic=f"2 x {_count(parameters)} parameters x {batch} tokens / {_rate(gpu)}",
        arithmetic_seconds=2 * parameters * batch / gpu.fp16_flops,
    )


def prefill_floor(gpu: Gpu, sizes: ModelSizes, tokens: int) -> Floor:
    """One prompt of `tokens` tokens, of which the last alone gets logits."""
    return Floor(
        step=f"prefill of {tokens} tokens",
        unit="prompt",
        memory=f"{_size(sizes.decoder)} weights / {_bandwidth(gpu)}",
        memory_seconds=sizes.decoder / gpu.bandwidth,
        arithmetic=f"2 x ({_count(sizes.decoder_parameters)} parameters x {tokens} tokens + "
        f"{_count(sizes.head_parameters)} of the LM head) / {_rate(gpu)}",
        arithmetic_seconds=2 * (sizes.decoder_parameters * tokens + sizes.head_parameters) / gpu.fp16_flops,
    )


def vision_floor(gpu: Gpu, sizes: ModelSizes, images: int) -> Floor:
    """`images` images (or tiles) through encoder and projector; without known patches only the weights' reading."""
    stored = sizes.vision + sizes.projector
    return Floor(
        step=f"vision encoder, {_images(images)}",
        unit="call",
        memory=f"{_size(stored)} weights / {_bandwidth(gpu)}",
        memory_seconds=stored / gpu.bandwidth,
        arithmetic=f"2 x {_count(sizes.vision_parameters)} parameters x {images} x {sizes.patches} patches / "
        f"{_rate(gpu)}",
        arithmetic_seconds=2 * sizes.vision_parameters * images * sizes.patches / gpu.fp16_flops,
    )


@dataclass(frozen=True)
class Prediction:
    """What an export needs on a GPU (bytes) and the floors of its steps.

    `kv_cache` is allocated whole; `workspace` is what engines and callers need besides it (see `workspace_bytes`);
    `runtime` the CUDA context's allowance; `available` the GPU's memory less what driver or system keep.
    `decode` is of one row, `decode_batch` of the largest batch, both with full caches; `prefill` of the longest prompt.
    """

    gpu: Gpu
    sizes: ModelSizes
    limits: TrtLimits
    weights: int
    kv_cache: int
    workspace: int
    runtime: int
    available: int
    decode: Floor
    decode_batch: Floor
    prefill: Floor
    vision: Floor

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.weights + self.kv_cache + self.workspace + self.runtime

    @property
    def fits(self) -> bool:
        """Is there room for everything?"""
        return self.total <= self.available

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON data: bytes and seconds, and the formulas as text."""
        names = ("weights", "kv_cache", "workspace", "runtime", "total", "available", "fits")
        floors = {n: getattr(self, n).to_dict() for n in ("decode", "decode_batch", "prefill", "vision")}
        return {
            "gpu": self.gpu.name,
            "limits": dataclasses.asdict(self.limits),
            "sizes": dataclasses.asdict(self.sizes),
            "memory": {name: getattr(self, name) for name in names},
            "memory_formulas": list(self._memory_lines()),
            "floors": {"note": _FLOOR_NOTE, "source": self.gpu.source, **floors},
        }

    def lines(self) -> list[str]:
        """The prediction for a console: memory with its terms, then the floors with their formulas."""
        limits, verdict = self.limits, "fits" if self.fits else "does not fit"
        images = _images(limits.max_images)
        floors = [self.decode, *([self.decode_batch] if limits.max_batch > 1 else []), self.prefill, self.vision]
        return [
            f"memory on {self.gpu.name}, {limits.max_batch} x {limits.max_seq} tokens, {images}: "
            f"{_size(self.total)} of {_size(self.available)} usable, {verdict} (predicted)",
            *(f"  {line}" for line in self._memory_lines()),
            f"times on {self.gpu.name}: {_FLOOR_NOTE} ({self.gpu.source})",
            *(f"  {floor.formula}" for floor in floors),
        ]

    def _memory_lines(self) -> tuple[str, ...]:
        s, limits = self.sizes, self.limits
        return (
            f"weights: {_size(s.vision)} vision + {_size(s.projector)} projector + {_size(s.embedding)} embedding + "
            f"{'2 x ' * (s.decoder_engines - 1)}{_size(s.decoder)} decoder = {_size(self.weights)}",
            f"KV cache, allocated whole: {limits.max_batch} x {limits.max_seq} tokens x {s.kv_bytes_per_token} bytes = "
            f"{_size(self.kv_cache)}",
            f"workspace: {_workspace_formula(s, limits)} = {_size(self.workspace)}",
            f"CUDA context and kernels: {_size(self.runtime)} (an allowance)",
            f"usable: {_size(self.gpu.memory)} - {_size(self.gpu.memory - self.available)} for the "
            f"{'system' if self.gpu.shared_memory else 'driver'} = {_size(self.available)}",
        )


_FLOOR_NOTE = "floors by data-sheet rates, never measurements"


def available_bytes(gpu: Gpu) -> int:
    """What engines may use of a GPU's memory: all but the driver's part, or the system's where the CPU shares it."""
    kept = round(gpu.memory * SYSTEM_SHARE) if gpu.shared_memory else DRIVER_BYTES
    return gpu.memory - kept


def workspace_bytes(sizes: ModelSizes, limits: TrtLimits) -> int:
    """Bytes that engines need for activations at their largest profile, and callers for embeddings and logits.

    Decoder: for every token that one call takes of every row's prompt two booleans for each slot of the cache (the mask
    and what it is made of), a float32 and a float16 row as wide as the model and three float16 rows as wide as the MLP;
    that is 1.05 to 1.21 times what RTX's builder said of decoders with two layers and more. Encoder: four float16 rows
    as wide as its MLP for every patch, 1.0 to 1.8 times what it said of SigLIP's and CLIP's shapes (masks between
    patches are not counted). Both have `SCRATCH_BYTES` on top.
    """
    tokens, patches = limits.max_batch * limits.prompt, limits.max_images * sizes.patches
    decoder = tokens * (2 * limits.max_seq + 3 * _HALF * (sizes.hidden + sizes.intermediate)) + SCRATCH_BYTES
    vision = patches * 4 * _HALF * sizes.vision_width + SCRATCH_BYTES
    logits = limits.max_batch * min(MAX_KEPT, limits.prompt) * sizes.vocab * _FLOAT
    return decoder + vision + tokens * sizes.hidden * _HALF + logits


def _workspace_formula(s: ModelSizes, limits: TrtLimits) -> str:
    batch, length = limits.max_batch, limits.prompt
    return (
        f"{batch} x {length} tokens a call x (2 x {limits.max_seq} mask + 6 x ({s.hidden} + {s.intermediate}) "
        f"activations + 2 x {s.hidden} embeddings) bytes + {limits.max_images} x {s.patches} patches x 8 x "
        f"{s.vision_width} bytes + "
        f"logits {batch} x {min(MAX_KEPT, length)} x {s.vocab} x 4 bytes + 2 x {_size(SCRATCH_BYTES)} scratch"
    )


def predict(gpu: Gpu, sizes: ModelSizes, limits: TrtLimits) -> Prediction:
    """What an export of `sizes` with the engines of `limits` needs on `gpu`, whether it fits or not."""
    return Prediction(
        gpu=gpu,
        sizes=sizes,
        limits=limits,
        weights=sizes.weights,
        kv_cache=limits.max_batch * limits.max_seq * sizes.kv_bytes_per_token,
        workspace=workspace_bytes(sizes, limits),
        runtime=RUNTIME_BYTES,
        available=available_bytes(gpu),
        decode=decode_floor(gpu, sizes, 1, limits.max_seq),
        decode_batch=decode_floor(gpu, sizes, limits.max_batch, limits.max_seq),
        prefill=prefill_floor(gpu, sizes, limits.max_seq),
        vision=vision_floor(gpu, sizes, limits.max_images),
    )


@dataclass(frozen=True)
class LargestFit:
    """What fits when one limit stays: `batch` at the asked length, `length` at the asked batch, `alone` for one row.

    0 where nothing fits; no limit is looked for beyond 2^24.
    """

    batch: int
    length: int
    alone: int


def largest_fit(gpu: Gpu, sizes: ModelSizes, limits: TrtLimits) -> LargestFit:
    """The largest batch for the length of `limits`, the largest length for its batch, and for a batch of 1."""

    def fits(**changed: int) -> bool:
        return predict(gpu, sizes, dataclasses.replace(limits, **changed)).fits

    return LargestFit(
        batch=_largest(lambda n: fits(max_batch=n)),
        length=_largest(lambda n: fits(max_seq=n)),
        alone=_largest(lambda n: fits(max_batch=1, max_seq=n)),
    )


def check_fits(gpu: Gpu, sizes: ModelSizes, limits: TrtLimits) -> Prediction:
    """The prediction for `limits`; raises `BadInputError` with what does fit when the GPU has too little memory."""
    prediction = predict(gpu, sizes, limits)
    if prediction.fits:
        return prediction
    need = (
        f"--max-batch {limits.max_batch} --max-seq {limits.max_seq} (--max-prompt {limits.prompt}) need "
        f"{_size(prediction.total)} ({_size(prediction.weights)} weights, {_size(prediction.kv_cache)} KV cache, "
        f"{_size(prediction.workspace)} workspace, {_size(prediction.runtime)} CUDA context), {gpu.name} has "
        f"{_size(gpu.memory)} ({_size(prediction.available)} usable)"
    )
    raise BadInputError(f"{need}; {_advice(largest_fit(gpu, sizes, limits), limits)}")


def _advice(fit: LargestFit, limits: TrtLimits) -> str:
    choices = []
    if fit.batch:
        choices.append(f"batch {fit.batch} at {limits.max_seq} tokens")
    if fit.length:
        choices.append(f"batch {limits.max_batch} at {fit.length} tokens")
    if not choices and fit.alone:
        choices.append(f"batch 1 at {fit.alone} tokens")
    if choices:
        return f"the largest that fits: {', or '.join(choices)}"
    return "not even a batch of 1 with 1 token fits: choose --quant with fewer bits, fewer --max-images or a larger GPU"


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n up to 2^24 that `fits`, where every smaller one does too; 0 when 1 does not."""
    low, high = 0, 1
    while high <= _LARGEST and fits(high):
        low, high = high, 2 * high
    if high > _LARGEST:
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _size(count: float) -> str:
    """Bytes as decimal gigabytes, or in smaller units where those say nothing."""
    if count == 0:
        return "0 GB"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= (0.01 if unit == "GB" else 1) * factor:
            return f"{_digits(count / factor)} {unit}"
    return f"{count:.0f} bytes"


def _count(parameters: int) -> str:
    unit, factor = ("G", 1e9) if parameters >= 1e9 else ("M", 1e6)
    return f"{_digits(parameters / factor)} {unit}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _time(seconds: float) -> str:
    return f"{_digits(seconds * 1e3)} ms" if seconds < 1 else f"{_digits(seconds)} s"


def _digits(value: float) -> str:
    """Three digits that count, without an exponent where it is not tiny."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bandwidth(gpu: Gpu) -> str:
    return f"{gpu.bandwidth / 1e9:g} GB/s"


def _rate(gpu: Gpu) -> str:
    return f"{gpu.fp16_flops / 1e12:g} TFLOPS"

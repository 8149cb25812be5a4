"""The layer loop: observe a decoder layer, quantize it, run it again, go on to the next.

One layer is in memory in float32 at a time; of the samples only the hidden states at the current layer are kept, on
disk. Every layer is observed on what the quantized layers before it produce.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch.utils import _pytree as pytree

from vlmexport import __version__
from vlmexport.calibrate.capture import Batch, capture_batches, token_shares
from vlmexport.calibrate.dataset import load_samples
from vlmexport.calibrate.folding import FoldPlan, find_folds
from vlmexport.calibrate.head import quantize_rest
from vlmexport.calibrate.layer import LayerTask, Rounded, fold_layer, round_layer, smooths
from vlmexport.calibrate.recipe import CalibrationOptions, resolve_recipe
from vlmexport.calibrate.replay import LayerReplay, relative_difference
from vlmexport.calibrate.sites import SitePowers, SiteStatistics
from vlmexport.calibrate.store import HiddenStates, Step, StepStore
from vlmexport.calibrate.working import WorkingLayer, working
from vlmexport.errors import BadInputError
from vlmexport.manifest import file_sha256
from vlmexport.progress import Progress, Stage
from vlmexport.quantize.fold import Fold
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.statistics import InputPower
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.experts import eager_experts
from vlmexport.split.layers import layer_kinds
from vlmexport.split.names import module_path
from vlmexport.split.parts import Role

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split


_T = TypeVar("_T")


@dataclass(frozen=True)
class Calibrated:
    """What the loop leaves: codes (read from disk when asked for), folds, and the manifest's account of it.

    `powers` are of the inputs of every matrix in the layers, after the folds, as the layers before give them.
    """

    quantized: Mapping[str, QuantizedTensor]
    folds: Mapping[str, Fold]
    report: dict[str, Any]
    powers: Mapping[str, InputPower]


def calibrate_decoder(
    vlm: VLM,
    split: Split,
    schemes: Mapping[str, QuantScheme],
    options: CalibrationOptions,
    work: Path,
    progress: Progress,
    finish: Callable[[LayerTask], Rounded] = round_layer,
) -> Calibrated:
    """Quantize the decoder layer by layer on calibration samples.

    `schemes` are by whole-model weight name (without any, layers run as they are and their inputs are measured);
    `finish` is what becomes of a layer once scales were moved. Finished layers are kept in `work`, and a later call
    with the same model, schemes and samples goes on after them, with the same result to the byte. Raises
    `BadInputError` for samples that cannot be used and for NaN weights, `UnsupportedModelError` for a decoder whose
    layers cannot be run one by one.
    """
    recipe = resolve_recipe(options)
    notes: list[str] = []
    with progress.stage("calibration samples"):
        samples = load_samples(recipe)
        batches = list(capture_batches(vlm, samples.samples, recipe, notes))
    shares = token_shares(batches)
    if not shares.image_tokens and not recipe.text_only:
        raise BadInputError(
            f"calibration {recipe.name} has no image in {len(samples.samples)} samples, so it would tune the decoder "
            "for text alone; add images, or ask for that with --text-only-calibration"
        )
    account = {**samples.to_dict(), "seed": recipe.seed, **shares.to_dict()}
    account["warnings"] = [*samples.notes, *notes]
    part = split.parts[Role.DECODER].module
    if not isinstance(part, DecoderPart):
        raise TypeError(f"the decoder part holds a {type(part).__name__}")
    store = StepStore(work, _fingerprint(vlm, schemes, batches, finish.__name__))
    steps = LayerLoop(vlm.model, part, schemes, batches, store, finish).run(progress)
    reports = [store.report(step) for step in range(steps)]
    return Calibrated(store.codes(steps), store.folds(steps), _report(account, reports), store.powers(steps))


class LayerLoop:
    """Quantizes the decoder of `part`, which lives inside `model`, on `batches`; finished steps go to `store`.

    `schemes` are by whole-model weight name; a packed parameter of experts ``[E, N, K]`` has one scheme, and each
    expert codes of its own under ``<name>.<expert>``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        part: DecoderPart,
        schemes: Mapping[str, QuantScheme],
        batches: Sequence[Batch],
        store: StepStore,
        finish: Callable[[LayerTask], Rounded] = round_layer,
    ) -> None:
        self.finish = finish
        self.model, self.part, self.schemes, self.batches, self.store = model, part, schemes, batches, store
        self.replay = LayerReplay(part.decoder, model.config.model_type)
        self.layers = self.replay.layers
        self.paths = [module_path(model, layer) for layer in self.layers]
        self.kinds = layer_kinds(self.layers)
        self.shapes = [batch.kwargs["inputs_embeds"].shape for batch in batches]
        self.smallest = min(range(len(batches)), key=lambda i: batches[i].valid.numel())

    def run(self, progress: Progress) -> int:
        """Do the steps that are not finished yet (the layers, then the rest); returns the number of all."""
        steps = len(self.layers) + 1
        experts = eager_experts(self.part.decoder)
        with experts, torch.no_grad(), progress.stage("calibrate", total=steps) as stage:
            self._begin()
            finished = self.store.finished()
            stage.advance(finished)
            for index in range(finished, len(self.layers)):
                self._step(index, stage)
            if finished < steps:
                last = self.store.hidden(len(self.layers) - 1, self.shapes)
                self.store.write(len(self.layers), self._rest(last))
                stage.advance(1, "LM head")
        return steps

    def _begin(self) -> None:
        notes = self.store.open()
        if notes is None:
            self.replay.check(self.batches[self.smallest])
            self.store.begin({"returns_tuple": self.replay.returns_tuple})
        else:
            self.replay.returns_tuple = list(notes["returns_tuple"])

    def _step(self, index: int, stage: Stage) -> None:
        stage.advance(0, f"layer {index}")
        before = self.store.hidden(index - 1, self.shapes) if index else None
        with working(self.layers[index]) as work:
            after = self.store.new_hidden(index, self.shapes)
            prefix = f"{self.paths[index]}."
            schemes = {n: self.schemes[prefix + n] for n in work.parameters if prefix + n in self.schemes}
            if schemes:
                task = LayerTask(prefix, work, self._observe(index, work, before), schemes)
                result = self._quantize(index, task, before)
                for i in range(len(self.batches)):
                    after[i] = self._output(index, i, before)
            else:
                result = self._measure(index, work, before, after)
        self.store.write(index, result)
        stage.advance()

    def _output(self, index: int, batch: int, before: HiddenStates | None) -> torch.Tensor:
        return self.replay.run(index, self.batches[batch], None if before is None else before[batch])

    def _measure(self, index: int, work: WorkingLayer, before: HiddenStates | None, after: HiddenStates) -> Step:
        """A layer without schemes stays as it is; one run gives its outputs and its inputs' power."""
        powers = SitePowers(work.parameters)
        for i, batch in enumerate(self.batches):
            with powers.watching(work.layer, batch.valid):
                after[i] = self._output(index, i, before)
        seen = {matrix.name: power for matrix, power in powers.seen()}
        report = {"layer": self.paths[index], "folds": [], "weights": {}}
        return Step({}, {}, report, _prefixed(f"{self.paths[index]}.", seen))

    def _quantize(self, index: int, task: LayerTask, before: HiddenStates | None) -> Step:
        prefix = task.prefix
        folds: list[dict[str, Any]] = []
        if any(smooths(scheme) for scheme in task.schemes.values()):
            folds = self._fold(index, task, before)
        powers = task.powers()
        codes, reports = self.finish(task)
        report = {
            "layer": self.paths[index],
            "folds": folds,
            "weights": {prefix + name: dataclasses.asdict(row) for name, row in reports.items()},
        }
        return Step(_prefixed(prefix, codes), _prefixed(prefix, task.work.folds), report, _prefixed(prefix, powers))

    def _observe(self, index: int, work: WorkingLayer, before: HiddenStates | None) -> SiteStatistics:
        statistics = SiteStatistics(work.parameters)
        for i, batch in enumerate(self.batches):
            with statistics.watching(work.layer, batch.valid):
                self._output(index, i, before)
        return statistics

    def _fold(self, index: int, task: LayerTask, before: HiddenStates | None) -> list[dict[str, Any]]:
        valid = self.batches[self.smallest].valid
        unchanged = self._output(index, self.smallest, before)

        def run() -> torch.Tensor:
            return self._output(index, self.smallest, before)

        def difference() -> float:
            return relative_difference(run(), unchanged, valid)

        # Noted, since another layer of the kind may show other sites (experts that saw no token): a resumed run must
        # go on with those that the first layer showed.
        key = f"folds-{self.kinds[index]}"
        noted = self.store.noted(key)
        plan = find_folds(task.work, run, difference) if noted is None else FoldPlan.from_dict(noted)
        if noted is None:
            self.store.note(key, plan.to_dict())
        return fold_layer(task, plan, difference)

    def _rest(self, last: HiddenStates) -> Step:
        """The LM head on what the last layer leaves, and weights with schemes outside the layers."""
        layers = zip(self.paths, self.layers, strict=True)
        done = {f"{path}.{name}" for path, layer in layers for name, _ in layer.named_parameters()}
        rest = {name: scheme for name, scheme in self.schemes.items() if name not in done}
        finals = ((self.replay.final(batch, last[i]), batch.valid) for i, batch in enumerate(self.batches))
        return quantize_rest(self.model, self.part, rest, finals)


def _prefixed(prefix: str, values: Mapping[str, _T]) -> dict[str, _T]:
    return {prefix + name: value for name, value in values.items()}


def _report(account: dict[str, Any], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's account: samples and tokens, then every layer; fallbacks are summed up among the warnings."""
    fell = [(n, w["fallback"]) for step in steps for n, w in step["weights"].items() if w["fallback"]]
    if fell:
        name, reason = fell[0]
        account["warnings"].append(f"{len(fell)} weights fell back to round-to-nearest (first: {name}: {reason})")
    return {**account, "layers": list(steps)}


def _fingerprint(vlm: VLM, schemes: Mapping[str, QuantScheme], batches: Sequence[Batch], finish: str) -> str:
    """SHA-256 of what decides the result: code, versions, threads, checkpoint, schemes and the decoder's inputs."""
    files = sorted([*vlm.path.glob("*.safetensors"), *vlm.path.glob("*.json")])
    made_of = {
        "version": __version__,
        "code": _code_digest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "files": {f.name: file_sha256(f) for f in files},
        "lora": {f.name: file_sha256(f) for f in vlm.adapter_files},
        "schemes": {name: scheme.to_dict() for name, scheme in sorted(schemes.items())},
        "finish": finish,
        "samples": [_batch_digest(batch) for batch in batches],
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _code_digest() -> str:
    """SHA-256 of the algorithms and of the loop: in a checkout the version does not change with them."""
    digest = hashlib.sha256()
    for room in ("quantize", "calibrate"):
        for file in sorted((Path(__file__).parent.parent / room).glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _batch_digest(batch: Batch) -> str:
    digest = hashlib.sha256()
    leaves, spec = pytree.tree_flatten((batch.kwargs, batch.valid))
    digest.update(str(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.contiguous().numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()

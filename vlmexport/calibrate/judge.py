"""`Judge`: how far the decoder's answers move when some of its weights are exchanged, measured on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from vlmexport.calibrate.capture import Batch
from vlmexport.calibrate.replay import LayerReplay, float32_parameters
from vlmexport.errors import BadInputError
from vlmexport.split.experts import eager_experts
from vlmexport.split.names import module_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmexport.split.decoder import DecoderPart

# One-sided 95 % of a normal distribution.
_ONE_SIDED_95 = 1.645


@dataclass(frozen=True)
class Divergence:
    """Divergence of exchanged weights from the original: nats per token, averaged over `samples` of `tokens` tokens.

    `kl` is the mean over the tokens of questions and answers, `upper` a limit that the mean over many more such samples
    stays under with 95 % confidence (normal approximation over samples). `answer_kl` is the mean over answer tokens
    alone (0 without any): few, and mostly certain, so one sample in a hundred decides it and no limit is set on it.
    """

    kl: float
    upper: float
    answer_kl: float
    samples: int
    tokens: int


class Judge:
    """Compares the decoder of `part`, inside `model`, with itself under other weights, on `batches`.

    The tokens that count are those of text; image tokens are not predicted. Enter `ready` before measuring: it holds
    the decoder in float32. Raises `BadInputError` when no token counts.
    """

    def __init__(self, model: PreTrainedModel, part: DecoderPart, batches: Sequence[Batch]) -> None:
        self.model, self.part, self.batches = model, part, batches
        self.replay = LayerReplay(part.decoder, model.config.model_type)
        self.paths = [module_path(model, layer) for layer in self.replay.layers]
        self._places = [_judged(batch) for batch in batches]
        if not any(place.any() for place in self._places):
            raise BadInputError(f"none of {len(batches)} batches of held-out samples has a text token to judge by")
        self._reference: list[torch.Tensor] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within, the decoder and the LM head are in float32, and the original's answers are known."""
        smallest = min(self.batches, key=lambda batch: batch.valid.numel())
        with torch.no_grad(), eager_experts(self.part.decoder), float32_parameters(self.part.modules()):
            self.replay.check(smallest)
            self._reference = [self._final(i, 0, None) for i in range(len(self.batches))]
            yield
            self._reference = []

    def inputs(self) -> list[torch.Tensor | None]:
        """What enters layer 0 (which the decoder makes itself)."""
        return [None] * len(self.batches)

    def advance(self, index: int, hidden: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """What leaves layer `index` for each batch, given what leaves the one before."""
        return [self.replay.run(index, batch, h) for batch, h in zip(self.batches, hidden, strict=True)]

    def finals(self, hidden: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """What enters the LM head, float32 ``[judged tokens, H]`` of each batch, given what leaves the last layer."""
        return [self._final(i, len(self.paths), h) for i, h in enumerate(hidden)]

    def divergence(
        self, weights: Mapping[str, torch.Tensor], first: int = 0, hidden: Sequence[torch.Tensor | None] | None = None
    ) -> Divergence:
        """The divergence with `weights` (whole-model names) in place; layers before `first` gave `hidden`."""
        before = self.inputs() if hidden is None else hidden
        sums: list[torch.Tensor] = []
        counts: list[torch.Tensor] = []
        answers: list[torch.Tensor] = []
        for i, place in enumerate(self._places):
            reference = self._log_probabilities(self._reference[i])
            with exchanged(self.model, weights):
                found = self._log_probabilities(self._final(i, first, before[i]))
            per_token = (reference.exp() * (reference - found)).sum(-1).double()
            rows = place.nonzero()[:, 0]
            sums.append(torch.zeros(place.shape[0], dtype=torch.float64).index_add(0, rows, per_token))
            counts.append(place.sum(1))
            answers.append(per_token[_next(self.batches[i].answer)[place]])
        return _summary(torch.cat(sums), torch.cat(counts), torch.cat(answers))

    def _final(self, batch: int, first: int, previous: torch.Tensor | None) -> torch.Tensor:
        """The LM head's input ``[judged tokens, H]`` from layer `first` on."""
        return self.replay.onward(first, self.batches[batch], previous)[self._places[batch]]

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``[judged tokens, vocab]`` float32."""
        logits: torch.Tensor = self.part.logits(hidden)
        return logits.float().log_softmax(-1)


def _judged(batch: Batch) -> torch.Tensor:
    """Bool ``[B, S]``: the positions whose next token counts."""
    return _next(batch.valid & ~batch.image) & batch.valid


def _next(tokens: torch.Tensor) -> torch.Tensor:
    """Bool ``[B, S]``: the positions before `tokens`, which predict them."""
    places = torch.zeros_like(tokens)
    places[:, :-1] = tokens[:, 1:]
    return places


def _summary(sums: torch.Tensor, counts: torch.Tensor, answers: torch.Tensor) -> Divergence:
    """The ratio estimate of the mean over tokens, and its error from sample to sample."""
    there = counts > 0
    sums, tokens = sums[there], counts[there].double()
    total = float(tokens.sum())
    mean = float(sums.sum()) / total
    samples = len(tokens)
    spread = float((sums - mean * tokens).square().sum())
    error = math.sqrt(spread * samples / max(samples - 1, 1)) / total
    kl = max(mean, 0.0)
    answer_kl = max(float(answers.mean()), 0.0) if len(answers) else 0.0
    return Divergence(kl, kl + _ONE_SIDED_95 * error, answer_kl, samples, int(total))


@contextmanager
def exchanged(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within, parameters are those of `weights` (by whole-model name); a tied one changes in the named module only."""
    with ExitStack() as stack:
        for name, value in weights.items():
            path, _, local = name.rpartition(".")
            module = model.get_submodule(path)
            before = module.get_parameter(local)
            stack.callback(module.register_parameter, local, before)
            module.register_parameter(local, nn.Parameter(value.to(before.dtype), requires_grad=False))
        yield

"""Prompts for the gate: the drawn probes and the questions, through the export's processor and the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmexport.calibrate.synthetic import TEST_SEEDS, samples
from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.verify.gates import Gate
from vlmexport.verify.inputs import Probe, standard_probes
from vlmexport.verify.parts import Prompt
from vlmexport.verify.quantization import Item
from vlmexport.verify.questions import Question
from vlmexport.verify.videos import video_prompts

if TYPE_CHECKING:
    from vlmexport.verify.reference import Reference


@dataclass(frozen=True)
class Prompts:
    """The probes as model inputs, and the means to build more."""

    probes: tuple[Prompt, ...]
    exported: PromptBuilder
    reference: PromptBuilder | None

    @property
    def decode_text(self) -> Callable[[list[int]], str]:
        """From answer tokens to text, special tokens left out."""
        tokenizer = self.exported.tokenizer
        return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))


def build_prompts(gate: Gate, artifact: Artifact, reference: Reference | None) -> Prompts:
    """Put every probe through both processors.

    A probe that the model's own processor refuses (two images, say) is reported as not run. An export whose processor
    does not load fails ``processor/load`` and is judged further with the model's own; raises `BadInputError` when that
    is not at hand either.
    """
    trust = reference.vlm.trust_remote_code if reference else False
    own = PromptBuilder(reference.vlm.path, trust_remote_code=trust) if reference else None
    try:
        exported = PromptBuilder(artifact.path, trust_remote_code=trust)
    except BadInputError as error:
        if own is None:
            raise
        gate.fail("processor/load", "processor", "lowering", str(error))
        exported = own
    probes = []
    for probe in probes_of(own or exported):
        try:
            wanted = build(own, probe) if own else None
        except (BadInputError, ValueError, TypeError) as error:
            reason = f"the model's own processor refuses this prompt: {error}"
            gate.not_run(f"processor/probe[{probe.name}]", "processor", "lowering", reason)
            continue
        with gate.guard(f"processor/probe[{probe.name}]", "processor", "lowering"):
            probes.append(Prompt(probe.name, build(exported, probe), wanted))
    probes += video_prompts(gate, artifact, (exported, own), reference)
    return Prompts(tuple(probes), exported, own)


def probes_of(builder: PromptBuilder) -> tuple[Probe, ...]:
    """The probes that are prompts of the model: where each has one picture at most, two are none of them."""
    several = builder.bare is None or builder.bare.several
    return tuple(probe for probe in standard_probes() if several or len(probe.images) <= 1)


def build(builder: PromptBuilder, probe: Probe) -> ModelInputs:
    """The probe as model inputs; models without a chat template get their image tokens and the text."""
    if getattr(builder.processor, "chat_template", None):
        return builder.build(probe.images, probe.text)
    bare = builder.bare
    token = "<image>" if bare is None else bare.token
    text = f"{token * len(probe.images)}\n{probe.text}"
    if bare is not None and bare.places_itself:
        text = bare.text(len(probe.images), probe.text)
    return builder.encode(text, probe.images)


def answer_items(prompts: Prompts, asked: Sequence[Question], drawn: int) -> list[Item]:
    """What both sides answer: the questions, or without any `drawn` pictures with one question each (not scored).

    The probes are no substitute: they are few, and made to catch a broken graph, not to be like what a model sees.
    """
    own = prompts.reference or prompts.exported
    if not asked:
        probes = [_drawn_probe(TEST_SEEDS[-1 - index]) for index in range(drawn)]
        return [Item(build(prompts.exported, probe), build(own, probe)) for probe in probes]
    return [
        Item(prompts.exported.build(q.images, q.text), own.build(q.images, q.text), q.answers, q.task, q.text, q.images)
        for q in asked
    ]


def _drawn_probe(seed: int) -> Probe:
    """One drawn picture (shapes, counting, reading, a chart) and a question about it."""
    sample = next(samples(seed, 1))
    return Probe("drawn", sample.question, (sample.image,))

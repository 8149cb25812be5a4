"""The same question to the model and to llama.cpp: are the prompts the same, token for token?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmexport.errors import ArtifactError, BadInputError
from vlmexport.runtime.llamacpp.chunks import IMAGE_ID
from vlmexport.runtime.llamacpp.prompt import marked_prompt
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner
from vlmexport.verify.gates import Gate
from vlmexport.verify.gguf.files import GgufFile
from vlmexport.verify.gguf.prompts import ChatTemplate, first_difference, ids_fault, prompt_ids
from vlmexport.verify.gguf.reference import FullPrompt, FullReference
from vlmexport.verify.inputs import Probe, draw_picture, standard_probes

if TYPE_CHECKING:
    from vlmexport.runtime.llamacpp.chunks import LlamaPrompt

# Larger than one tile of the encoders that cut pictures into tiles.
_LARGE = Probe("large", "What is in the picture?", (draw_picture(1100, 700, 6),))
_VIEWS = {"server": "llama-server", "cli": "llama-mtmd-cli"}
_TEMPLATE_FIX = "`vlmexport gguf` writes a template that both read alike; or give a fixed one by --chat-template-file"


@dataclass(frozen=True)
class Words:
    """One question: the model's own rendering, and the same for llama.cpp with a marker for every picture."""

    rendered: str
    marked: str


@dataclass(frozen=True)
class Pair:
    """One prompt on both sides, its ids proven equal."""

    name: str
    reference: FullPrompt
    llama: LlamaPrompt


def words(reference: FullReference, text: str, images: int, marker: str) -> Words:
    """The question in the model's words; a model without a chat template gets its image tokens and the text."""
    builder = reference.builder
    if getattr(builder.processor, "chat_template", None):
        return Words(reference.render(images, text), marked_prompt(builder, text, images, marker))
    token = str(getattr(builder.processor, "image_token", "<image>"))
    return Words(f"{token * images}\n{text}", f"{marker * images}\n{text}")


def check_prompts(gate: Gate, reference: FullReference, runner: LlamaCppRunner) -> list[Pair]:
    """``processor/prompt_ids[probe]`` and ``gguf/image_splitting``; the prompts that agree.

    Pictures that the image processor cannot prepare here, and prompts that it refuses, are not run.
    """
    pairs: list[Pair] = []
    cut: list[str] = []
    for probe, name in _runnable(gate, reference):
        with gate.guard(name, "processor", "lowering"):
            own = _own_prompt(gate, reference, runner, probe, name)
            if own is None:
                continue
            found = runner.prompt(own[1], probe.images)
            ids = prompt_ids(found)
            fault = ids_fault(ids, own[0].ids, reference.image_token_id)
            gate.verdict(name, "processor", "lowering", [fault] if fault else [], "prompts that differ")
            rows = int((own[0].ids == reference.image_token_id).sum())
            made = int((ids == IMAGE_ID).sum())
            if _counts_differ(made, rows, own[0].ids, reference):
                cut.append(f"{probe.name}: llama.cpp makes {made} rows of its pictures, the model {rows}")
            elif not fault and probe is not _LARGE:
                pairs.append(Pair(probe.name, own[0], found))
    if reference.why_no_images:
        gate.not_run("gguf/image_splitting", "processor", "lowering", reference.why_no_images)
    else:
        faults = [f"{fault}{_splitting_fix(reference)}" for fault in cut]
        gate.verdict("gguf/image_splitting", "processor", "lowering", faults, "prompts that differ")
    return pairs


def _runnable(gate: Gate, reference: FullReference) -> Iterator[tuple[Probe, str]]:
    for probe in (*standard_probes(), _LARGE):
        name = f"processor/prompt_ids[{probe.name}]"
        if probe.images and reference.why_no_images:
            gate.not_run(name, "processor", "lowering", reference.why_no_images)
        else:
            yield probe, name


def _own_prompt(
    gate: Gate, reference: FullReference, runner: LlamaCppRunner, probe: Probe, name: str
) -> tuple[FullPrompt, str] | None:
    """The probe through the model's own processor, with llama.cpp's words; None (not run) where it refuses."""
    made = words(reference, probe.text, len(probe.images), runner.marker)
    try:
        return reference.encode(made.rendered, probe.images), made.marked
    except (BadInputError, ValueError, TypeError) as error:
        reason = f"the model's own processor refuses this prompt: {' '.join(str(error).split())[:200]}"
        gate.not_run(name, "processor", "lowering", reason)
        return None


def _counts_differ(found: int, rows: int, ids: np.ndarray, reference: FullReference) -> bool:
    """True when the numbers of rows differ by more than the model's own tokens between image tokens can explain."""
    if found == rows:
        return False
    image = ids == reference.image_token_id
    between = int((~image[1:-1] & image[:-2] & image[2:]).sum())
    return found != rows + between


def _splitting_fix(reference: FullReference) -> str:
    processor = getattr(reference.builder.processor, "image_processor", None)
    if getattr(processor, "do_image_splitting", None) is False:
        return (
            "; do_image_splitting is false, which no GGUF key can say: shrink pictures to one tile before they reach "
            "llama.cpp, or switch splitting on in the model's processor"
        )
    return "; their sizes or tiles differ, so the keys of the mmproj file are not those of the model's processor"


def check_chat_template(gate: Gate, text: GgufFile, reference: FullReference, runner: LlamaCppRunner) -> None:
    """``gguf/chat_template[server]`` and ``[cli]``: users of llama.cpp get the model's own prompt.

    The template of the GGUF file is rendered as llama.cpp does it, with markers for pictures, and compared with the
    rendering of the model's own; both as the token ids that llama.cpp makes of them.
    """
    own = getattr(reference.builder.processor, "chat_template", None)
    template = None
    for view, client in _VIEWS.items():
        name = f"gguf/chat_template[{view}]"
        with gate.guard(name, "processor", "lowering"):
            if not own:
                fault = "the model has no chat template, so there is none to compare with"
                gate.not_run(name, "processor", "lowering", fault)
                continue
            template = template or ChatTemplate(text)
            faults = [
                f"{client}, {probe.name}: {fault}; {_TEMPLATE_FIX}"
                for probe in standard_probes()
                if (fault := _view_fault(template, reference, runner, probe, view))
            ]
            gate.verdict(name, "processor", "lowering", faults, "prompts that differ")


def _view_fault(
    template: ChatTemplate, reference: FullReference, runner: LlamaCppRunner, probe: Probe, view: str
) -> str:
    count = len(probe.images)
    wanted = words(reference, probe.text, count, runner.marker).marked
    try:
        found = str(getattr(template.views(count, probe.text, runner.marker), view))
    except ArtifactError as error:
        return str(error)
    if found == wanted:
        return ""
    if found.count(runner.marker) != count:
        return f"{found.count(runner.marker)} places for {count} pictures: {first_difference(found, wanted)}"
    # Words may differ where ids do not (a begin token that llama.cpp adds itself).
    images = probe.images if not reference.why_no_images else tuple(draw_picture(32, 32, 1) for _ in probe.images)
    same = np.array_equal(runner.prompt(found, images).ids, runner.prompt(wanted, images).ids)
    return "" if same else first_difference(found, wanted)

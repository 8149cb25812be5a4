"""Train the bundled model from scratch on the CPU, in as many processes as the schedule says."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing
from torch.nn import functional
from transformers import GenerationConfig, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor

from tools.train_fixture.design import Schedule, check_seeds, model_config
from tools.train_fixture.muon import Muon
from tools.train_fixture.rows import IGNORED, Batch, RowMaker
from tools.train_fixture.tokenizer import build_processor

SNAPSHOT_EVERY = 100


@dataclass(frozen=True)
class Optimizers:
    """Muon for the matrices inside the network, AdamW for embeddings, head, norms and biases."""

    muon: Muon
    adam: torch.optim.AdamW
    parameters: list[torch.nn.Parameter]


def train(schedule: Schedule, out: Path, start: Path | None = None) -> None:
    """Train one phase, from scratch or from the checkpoint folder `start`, and leave a checkpoint folder at `out`."""
    check_seeds()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29513")
    multiprocessing.spawn(_train_process, args=(schedule, out, start), nprocs=schedule.ranks)


def _train_process(rank: int, schedule: Schedule, out: Path, start: Path | None) -> None:
    distributed.init_process_group("gloo", rank=rank, world_size=schedule.ranks)
    torch.set_num_threads(1)
    torch.manual_seed(schedule.seed)
    processor = build_processor()
    model = build_model(processor)
    if start is not None:
        model.load_state_dict({name: weight.float() for name, weight in load_file(start / "model.safetensors").items()})
    rows = RowMaker(processor, schedule)
    optimizers = build_optimizers(model)
    held_out = rows.validation(96) if rank == 0 else None
    started = time.monotonic()
    for step in range(schedule.steps):
        loss = _train_step(model, optimizers, rows.batch(schedule.first_step + step, rank), schedule, step, rank)
        if rank == 0 and step % 10 == 0:
            print(f"step {step} loss {loss:.4f} {time.monotonic() - started:.0f} s", flush=True)
        if held_out is not None and (step + 1) % SNAPSHOT_EVERY == 0:
            print(f"step {step + 1} teacher-forced {held_out_accuracy(model, held_out)}", flush=True)
            save(model, processor, out)
    if rank == 0:
        save(model, processor, out)
    distributed.destroy_process_group()


def build_model(processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    """Return a fresh FP32 model in eager attention."""
    model = Idefics3ForConditionalGeneration._from_config(build_config(processor), attn_implementation="eager")
    return model.float().train()


def build_config(processor: Idefics3Processor) -> Idefics3Config:
    """Return the configuration with the token ids of this processor."""
    tokenizer = processor.tokenizer
    return model_config(
        {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
            "image": processor.image_token_id,
        }
    )


def build_optimizers(model: Idefics3ForConditionalGeneration) -> Optimizers:
    """Sort the parameters: two-dimensional weights of layers and connector go to Muon."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = ".layers." in name or "modality_projection" in name
        (matrices if inner and parameter.ndim == 2 else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    return Optimizers(Muon(matrices), adam, matrices + others)


def _train_step(
    model: Idefics3ForConditionalGeneration,
    optimizers: Optimizers,
    batch: Batch,
    schedule: Schedule,
    step: int,
    rank: int,
) -> float:
    logits, labels = answer_logits(model, batch)
    loss = functional.cross_entropy(logits, labels)
    loss.backward()
    _average_gradients(optimizers.parameters, schedule.ranks)
    torch.nn.utils.clip_grad_norm_(optimizers.parameters, 1.0)
    share = rate_share(schedule, step)
    optimizers.muon.step(schedule.muon_rate * share, rank, schedule.ranks)
    for group in optimizers.adam.param_groups:
        group["lr"] = schedule.adam_rate * share
    optimizers.adam.step()
    for parameter in optimizers.parameters:
        parameter.grad = None
    return loss.item()


def rate_share(schedule: Schedule, step: int) -> float:
    """Linear warm-up, a plateau, then a cosine down to nearly nothing."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    decay_start = int(schedule.decay_from * schedule.horizon)
    done = max(0, step - decay_start) / (schedule.horizon - decay_start)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def answer_logits(model: Idefics3ForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [N, vocabulary] and labels [N] at the positions that predict answers."""
    features = model.model.connector(model.model.vision_model(pixel_values=batch.pixels).last_hidden_state)
    embeddings = model.get_input_embeddings()(batch.ids)
    pictured = batch.ids == model.config.image_token_id
    merged = embeddings.masked_scatter(pictured[..., None], features)
    hidden = model.model.text_model(
        inputs_embeds=merged, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    asked = batch.labels != IGNORED
    return model.lm_head(hidden[asked]), batch.labels[asked]


def _average_gradients(parameters: list[torch.nn.Parameter], ranks: int) -> None:
    if ranks == 1:
        return
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
    distributed.all_reduce(flat)
    flat /= ranks
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


@torch.no_grad()
def held_out_accuracy(model: Idefics3ForConditionalGeneration, batch: Batch) -> dict[str, float]:
    """Return the share of answers (percent per task) whose every token is the most likely one."""
    right = torch.zeros_like(batch.labels, dtype=torch.bool)
    logits, labels = answer_logits(model, batch)
    right[batch.labels != IGNORED] = logits.argmax(-1) == labels
    hits: dict[str, list[bool]] = defaultdict(list)
    for row, start, stop, task in batch.answers:
        hits[task].append(bool(right[row, start:stop].all()))
    return {task: round(100 * sum(found) / len(found), 1) for task, found in sorted(hits.items())}


def save(model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, out: Path) -> None:
    """Write the checkpoint folder in bfloat16, replacing an older one in one step."""
    fresh = out.with_name(out.name + ".new")
    copy = Idefics3ForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    tokenizer = processor.tokenizer
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    copy.to(torch.bfloat16).save_pretrained(fresh)
    processor.save_pretrained(fresh)
    out.mkdir(parents=True, exist_ok=True)
    for file in fresh.iterdir():
        file.replace(out / file.name)
    fresh.rmdir()

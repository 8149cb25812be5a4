from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, ProcessorMixin

from tests.demo.conftest import some_questions
from tools.train_fixture.evaluate import forced, load, question_batches
from tools.train_fixture.rows import Batch
from tools.train_fixture.train import answer_logits
from vlmexport.demo import model_dir
from vlmexport.demo.variants import make_outlier_variant, make_range_variant
from vlmexport.errors import BadInputError

Bundled = tuple[PreTrainedModel, ProcessorMixin]


@pytest.fixture(scope="module")
def batches(bundled: Bundled) -> list[Batch]:
    return question_batches(bundled[1], some_questions(12))


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_outlier_variant(model_dir(), tmp_path_factory.mktemp("variant") / "outliers")


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_range_variant(model_dir(), tmp_path_factory.mktemp("variant") / "range")


@torch.no_grad()
def round_to_nearest(model: PreTrainedModel, group: int) -> PreTrainedModel:
    """Round the decoder layers' weights to symmetric INT4 values."""
    for module in model.model.text_model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.view(-1, group)
            scale = groups.abs().amax(1, keepdim=True) / 7
            module.weight.copy_(((groups / scale).round().clamp(-8, 7) * scale).view_as(module.weight))
    return model


@pytest.mark.parametrize("variant", ["outliers", "ranged"])
def test_variants_are_the_same_function_in_fp32(
    variant: str, request: pytest.FixtureRequest, bundled: Bundled, batches: list[Batch]
) -> None:
    model, _ = load(request.getfixturevalue(variant))
    with torch.no_grad():
        plain, _ = answer_logits(bundled[0], batches[0])
        moved, _ = answer_logits(model, batches[0])
    assert float((plain - moved).abs().max()) == 0.0


def test_plain_int4_g128_loses_over_five_points_on_outliers(
    outliers: Path, bundled: Bundled, batches: list[Batch]
) -> None:
    reference = forced(bundled[0], batches)
    coarse = forced(round_to_nearest(load(outliers)[0], 128), batches)
    fine = forced(round_to_nearest(load(outliers)[0], 32), batches)
    assert coarse.accuracy() < reference.accuracy() - 5
    assert fine.kl_from(reference) < coarse.kl_from(reference)


def test_plain_int4_hardly_hurts_the_plain_model(bundled: Bundled, batches: list[Batch]) -> None:
    reference = forced(bundled[0], batches)
    rounded = forced(round_to_nearest(load(model_dir())[0], 128), batches)
    assert rounded.accuracy() > reference.accuracy() - 2


def test_range_variant_overflows_naive_fp16_only(ranged: Path, small: Batch) -> None:
    with torch.no_grad():
        naive, _ = answer_logits(_in_dtype(ranged, torch.float16), _half(small, torch.float16))
        safe, _ = answer_logits(_in_dtype(ranged, torch.bfloat16), _half(small, torch.bfloat16))
    assert not bool(naive.isfinite().all())
    assert bool(safe.isfinite().all())


def test_plain_model_fits_fp16(small: Batch) -> None:
    with torch.no_grad():
        naive, _ = answer_logits(_in_dtype(model_dir(), torch.float16), _half(small, torch.float16))
    assert bool(naive.isfinite().all())


def _in_dtype(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return load(folder, dtype)[0]


@pytest.fixture(scope="module")
def small(bundled: Bundled) -> Batch:
    return question_batches(bundled[1], some_questions(1)[:4])[0]


def _half(batch: Batch, dtype: torch.dtype) -> Batch:
    lowest = torch.finfo(dtype).min
    mask = batch.mask.clamp_min(lowest).to(dtype)
    return Batch(batch.ids, batch.positions, batch.labels, mask, batch.pixels.to(dtype), batch.answers)


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="exists"):
        make_range_variant(model_dir(), tmp_path)


def test_a_folder_without_decoder_layers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="no Llama decoder layers"):
        make_outlier_variant(tmp_path / "empty", tmp_path / "out")

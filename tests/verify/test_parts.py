"""Vision encoders that hand several tensors to their projector: each is judged."""

import numpy as np
import pytest

from vlmexport.runtime.protocol import VisionFeatures, feature_outputs
from vlmexport.target import load_target
from vlmexport.verify.gates import Gate
from vlmexport.verify.parts import check_embedding, close_features

ROWS, MASK = np.ones((2, 3), np.float32), np.ones((2, 1), np.bool_)


@pytest.mark.parametrize(
    ("found", "failed"),
    [
        (ROWS, {"vision": False}),
        ((ROWS, MASK), {"vision": False, "vision:vision_features_1": False}),
        ((ROWS, ~MASK), {"vision": False, "vision:vision_features_1": True}),
        ((ROWS * 2, MASK), {"vision": True, "vision:vision_features_1": False}),
    ],
)
def test_each_tensor_is_judged(found: VisionFeatures, failed: dict[str, bool]) -> None:
    gate = Gate()
    wanted = (ROWS, MASK) if len(failed) > 1 else ROWS
    close_features(gate, "vision", "vision_encoder", (wanted, found), 1e-3)
    assert {check.name: check.status == "failed" for check in gate.checks} == failed


def test_a_lost_tensor_fails() -> None:
    gate = Gate()
    close_features(gate, "vision", "vision_encoder", ((ROWS, MASK), ROWS), 1e-3)
    assert [check.status for check in gate.checks] == ["passed", "failed"]
    assert "missing" in gate.checks[1].reason


def test_features_are_known_among_the_outputs_by_name() -> None:
    assert feature_outputs(["vision_features_1", "other", "vision_features"]) == (
        "vision_features",
        "vision_features_1",
    )


class _Table:
    """A runner whose embedding is the row number, times `scale`, as `dtype`."""

    def __init__(self, scale: float, dtype: type) -> None:
        self.scale, self.dtype = scale, dtype

    def embed(self, input_ids: np.ndarray) -> np.ndarray:
        rows = np.sin(1.0 + np.arange(600, dtype=np.float32)).astype(np.float16).astype(np.float32).reshape(-1, 6)
        return (rows[input_ids] * np.float32(self.scale)).astype(self.dtype)


@pytest.mark.parametrize(
    ("scale", "found", "status"),
    [
        (11.3125, _Table(11.3125, np.float16), "passed"),  # one rounding of scaled rows
        (11.3125, _Table(11.3125 * 1.002, np.float16), "failed"),
        (11.3125, _Table(11.3125 * 1.00001, np.float32), "failed"),  # float32 has nothing to round
        (1.0, _Table(1.0, np.float16), "passed"),
        (1.0, _Table(1.0003, np.float16), "failed"),  # unscaled rows are float16 numbers as they are
    ],
)
def test_rows_of_a_table_may_be_rounded_once_and_only_where_they_are_scaled(
    scale: float, found: _Table, status: str
) -> None:
    gate, limits = Gate(), load_target("cuda").parity
    check_embedding(gate, found, _Table(scale, np.float32), 100, [], limits)  # type: ignore[arg-type]
    assert [check.status for check in gate.checks] == [status]

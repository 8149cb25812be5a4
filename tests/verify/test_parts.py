"""Vision encoders that hand several tensors to their projector: each is judged."""

import numpy as np
import pytest

from vlmexport.runtime.protocol import VisionFeatures, feature_outputs
from vlmexport.verify.gates import Gate
from vlmexport.verify.parts import close_features

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

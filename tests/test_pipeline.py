from pathlib import Path

import pytest

from vlmexport import pipeline
from vlmexport.errors import BadInputError
from vlmexport.plan import OnnxOptions
from vlmexport.progress import SilentProgress


@pytest.mark.parametrize("name", ["export", "export.failed"])
def test_a_folder_of_the_user_s_is_never_replaced(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / name / "thesis.txt"
    theirs.parent.mkdir()
    theirs.write_text("keep me")
    with pytest.raises(BadInputError, match=f"{name} is not empty and not a vlmexport export"):
        pipeline.export_onnx(
            "demo", tmp_path / "export", OnnxOptions(), force=True, verify=True, progress=SilentProgress()
        )
    assert theirs.read_text() == "keep me"

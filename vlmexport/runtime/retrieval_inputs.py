"""From a page or a query to model inputs, by a processor that takes one or the other, never both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmexport.model.retrieval_processor import check_processor, processed
from vlmexport.runtime.prompt import PromptBuilder, load_image
from vlmexport.runtime.protocol import ModelInputs

if TYPE_CHECKING:
    from PIL.Image import Image

_NOT_PIXELS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


class RetrievalInputs:
    """Makes inputs of pages and queries with the processor in `folder` (an export or a checkpoint); loads no model.

    Raises `BadInputError` when the processor does not load or has no words for pages and queries.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.processor: Any = PromptBuilder(folder, trust_remote_code=trust_remote_code).processor
        check_processor(self.processor, str(folder))

    def __call__(self, item: Path | Image | str) -> ModelInputs:
        """`query` of a text, `page` of anything else."""
        return self.query(item) if isinstance(item, str) else self.page(item)

    def page(self, image: Path | Image) -> ModelInputs:
        """Inputs of the picture of one page."""
        picture = load_image(image) if isinstance(image, Path) else image
        return _inputs(processed(self.processor, picture))

    def query(self, text: str) -> ModelInputs:
        """Inputs of one query."""
        return _inputs(processed(self.processor, text))


def _inputs(made: Mapping[str, Any]) -> ModelInputs:
    arrays = {name: np.asarray(value) for name, value in made.items() if hasattr(value, "shape")}
    pixels = {name: value for name, value in arrays.items() if name not in _NOT_PIXELS}
    return ModelInputs(arrays["input_ids"].astype(np.int64), pixels)

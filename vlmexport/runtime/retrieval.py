"""Run an export that gives embeddings of pages and queries, by ONNX Runtime alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact
from vlmexport.runtime.decoder_inputs import DecoderInputs, merged_inputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.sessions import PartSession


class RetrievalRunner:
    """Embeddings of batches of pages and queries. `threads`: intra-op threads, 0 = onnxruntime's choice.

    Raises `BadInputError` for an export that writes text.
    """

    def __init__(self, artifact: Artifact, *, threads: int = 0) -> None:
        if artifact.manifest.model.get("output") != "embeddings":
            raise BadInputError(f"{artifact.path} writes text; it gives no embeddings of pages")
        self.runner = OnnxRunner(artifact, threads=threads, exact=True)
        path = artifact.part_path("decoder")
        self._decoder = PartSession(path, "decoder", self.runner.settings, "embeddings")

    def embeddings(self, batch: Sequence[ModelInputs]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """``[batch, tokens, width]`` of right-padded prompts, and their mask ``[batch, tokens]``.

        Each embedding has length 1; those of padding are zero.
        """
        inputs, mask = merged_inputs(self.runner, batch)
        return self.decoded(inputs, mask), mask

    def decoded(self, inputs: DecoderInputs, mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings ``[batch, tokens, width]`` of what reaches the decoder, by the decoder's graph alone."""
        out = self._decoder({"inputs_embeds": inputs.embeds, "attention_mask": mask, **inputs.extras})
        return np.asarray(out, np.float32)

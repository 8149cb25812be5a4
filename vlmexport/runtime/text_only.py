"""What an export that gives embeddings cannot do: answer."""

from __future__ import annotations

from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact


def require_text(artifact: Artifact) -> None:
    """Raise `BadInputError`, which says what to use instead, for an export that writes no text."""
    if artifact.manifest.model.get("output") == "embeddings":
        raise BadInputError(
            f"{artifact.path} gives embeddings of pages and queries, it writes no text: use "
            "vlmexport.runtime.retrieval.RetrievalRunner in Python (docs/retrieval.md)"
        )

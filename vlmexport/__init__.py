"""vlmexport: export and quantization compiler for vision-language models.

Importing the package has no side effects; ``torch``, ``transformers`` and the runtimes are imported by the
functions that need them. The typed entry points, one per command, are in :mod:`vlmexport.api`.
"""

__version__ = "0.1.0"

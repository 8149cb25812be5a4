"""Calls of transformers' loaders: without their noise, and with what they raise as one clear line."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.model.checkpoint import Checkpoint


@contextmanager
def clear_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """What transformers raises on a folder that is at fault, as `BadInputError` or `NotPossibleHereError`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise BadInputError(f"{checkpoint.path}: the weights cannot be read: {_one_line(error)}") from error
    except ImportError as error:
        raise NotPossibleHereError(f"{checkpoint.path} needs a package that is missing: {_one_line(error)}") from error
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        # transformers checks configs by using them: a wrong value surfaces as any of these.
        raise BadInputError(
            f"{checkpoint.path}: transformers cannot build model_type {checkpoint.model_type!r}: {_one_line(error)}"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the loading bars and the load report: what it says is raised by `check_loading`."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with _no_bars():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide bars of libraries below transformers: compressed-tensors has no switch for its own."""
    bar: Any = importlib.import_module("tqdm").tqdm
    made = bar.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "disable": True})

    bar.__init__ = hidden
    try:
        yield
    finally:
        bar.__init__ = made


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

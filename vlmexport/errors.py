"""The error tree. Every error a user can cause is one of these, and each maps to one exit code.

An error message is one line that names the thing, the value, and the limit or the choices.
"""


class VlmExportError(Exception):
    """Base of all errors that vlmexport raises on purpose; exit code 1 unless a subclass says otherwise."""

    exit_code = 1


class BadInputError(VlmExportError):
    """The user's input cannot be used: a wrong option, folder, file or model (exit code 2)."""

    exit_code = 2


class UnsupportedModelError(BadInputError):
    """The model cannot be exported by this version; the message carries the reason (exit code 2)."""


class ArtifactError(BadInputError):
    """A folder is not a vlmexport export, or it was changed or written by a newer version (exit code 2)."""


class GateFailedError(VlmExportError):
    """A parity gate turned red (exit code 3)."""

    exit_code = 3


class NotPossibleHereError(VlmExportError):
    """What was asked for needs hardware or a package that this machine lacks (exit code 4)."""

    exit_code = 4

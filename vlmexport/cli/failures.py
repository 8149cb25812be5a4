"""What to say, and which exit code to give, for an exception that is not one of ours."""

from __future__ import annotations

import errno

BAD_INPUT, INTERNAL, NOT_HERE = 2, 1, 4
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def describe_failure(error: Exception) -> tuple[str, int]:
    """One line and an exit code for `error`.

    A full disk or exhausted memory is the machine's (4), a path that cannot be used is the user's (2), the rest is a
    bug of ours (1).
    """
    if isinstance(error, MemoryError):
        return "this machine has not enough memory for the model", NOT_HERE
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return f"no room left to write{_where(error)}: {error.strerror}; nothing was kept", NOT_HERE
    path_errors = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
    if isinstance(error, path_errors) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", BAD_INPUT
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"internal error: {type(error).__name__}: {first_line} (run again with -v for the traceback)", INTERNAL


def _where(error: OSError) -> str:
    return f" {error.filename}" if error.filename else ""

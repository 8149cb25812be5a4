"""How numbers and examples look on the screen."""

from __future__ import annotations


def bytes_text(size: float) -> str:
    """`size` bytes with a decimal unit: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def count_text(count: float) -> str:
    """`count` with a short unit: ``4.2 M``."""
    for unit in ("", " K", " M", " B"):
        if abs(count) < 1000 or unit == " B":
            break
        count /= 1000
    return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"


def example(*commands: str) -> str:
    """The epilog of a command's help: its examples, kept line by line."""
    lines = "\n".join(f"  {c}" for c in commands)
    return f"\b\nExample:\n{lines}"

"""The part of a model card that the gate fills in: what was proven, in numbers, and what was not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BEGIN, _END = "<!-- proof -->", "<!-- /proof -->"
_NOT_RUN = "The gate has not judged this export (`--no-verify`): nothing is known of its numbers."


def proof_section(report: Mapping[str, Any] | None) -> list[str]:
    """Lines of the card; `report` is what ``verify --json`` writes, None when the gate did not run."""
    body = [_NOT_RUN] if report is None else _numbers(report)
    return [_BEGIN, "## Proof", "", *body, _END]


def write_proof(folder: Path, report: Mapping[str, Any]) -> None:
    """Put `report` into the card of the export in `folder`, in place of what stood there."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{card} has no place for the proof")
    card.write_text(before + "\n".join(proof_section(report)) + after, encoding="utf-8")


def _numbers(report: Mapping[str, Any]) -> list[str]:
    counts = [check["status"] for check in report["checks"]]
    told = [f"{counts.count(status)} {words}" for status, words in _WORDS.items() if counts.count(status)]
    lines = [f"`vlmexport verify`: **{report['status']}** ({', '.join(told)})."]
    rows = [
        f"| {words} | {_number(report[side].get(key), share)} |"
        for side, key, words, share in _ROWS
        if report[side].get(key) is not None
    ]
    if rows:
        lines += ["", "| against the original | |", "|---|---|", *rows]
    lines += _variants(report)
    missing = [check["name"] for check in report["checks"] if check["status"] == "not_run"]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        lines += ["", f"Not run: {', '.join(f'`{name}`' for name in missing[:5])}{more}."]
    return lines


def _variants(report: Mapping[str, Any]) -> list[str]:
    """A row for each precision, where the export has several: the numbers above are the first one's."""
    found = report.get("runtime", {}).get("variants", {})
    rows = [
        " | ".join((f"| `{name}`", one["status"], *(_told(one[side].get(key), share) for side, key, share in _COLUMNS)))
        for name, one in found.items()
    ]
    header = "| dtype | gate | largest difference of a logit | KL from the original, nats per token | same top token |"
    return ["", header, "|---|---|---|---|---|", *(f"{row} |" for row in rows)] if rows else []


def _told(value: float | None, share: bool) -> str:
    return "" if value is None else _number(value, share)


_COLUMNS = (("lowering", "max_abs_logit", False), ("quantization", "kl", False), ("quantization", "top1", True))
_WORDS = {"passed": "checks passed", "failed": "failed", "not_run": "not run"}
_ROWS = (
    ("lowering", "max_abs_logit", "largest difference of a logit, same codes in PyTorch", False),
    ("lowering", "kl", "KL of the runtime as shipped from the same codes in PyTorch, nats per token", False),
    ("quantization", "kl", "KL of the answers from the original model, nats per token", False),
    ("quantization", "top1", "same top token as the original model", True),
    ("quantization", "perplexity_ratio", "perplexity over the original's", False),
    ("quantization", "accuracy", "accuracy on the questions", True),
    ("quantization", "reference_accuracy", "accuracy of the original model", True),
)


def _number(value: float, share: bool) -> str:
    return f"{100 * value:.1f} %" if share else f"{value:.3g}"

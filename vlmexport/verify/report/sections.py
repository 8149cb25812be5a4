"""Sections of the page that come from elsewhere than the gate: sizes, speed and memory, sensitivity, answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vlmexport.calibrate.heatmap import heat_table, subtitle, title
from vlmexport.calibrate.sensitivity import Sensitivity
from vlmexport.errors import BadInputError
from vlmexport.manifest import Manifest, open_artifact
from vlmexport.verify.report.svg import Group, grouped
from vlmexport.verify.result import AnsweredQuestion

THUMBNAIL_SIDE = 220
SHOWN_ANSWERS = 8
# What a bench measures, as people say it: key, title, unit, divisor, which side is good.
_MEASURES = (
    ("ttft_ms", "Time to first token", "ms", 1.0, "less is better"),
    ("prefill_tok_s", "Prompt", "tokens/s", 1.0, "more is better"),
    ("decode_tok_s", "Answer", "tokens/s", 1.0, "more is better"),
    ("peak_rss_bytes", "Peak memory", "MB", 1e6, "less is better"),
    ("size_bytes", "Size on disk", "MB", 1e6, "less is better"),
    ("load_s", "Load", "s", 1.0, "less is better"),
)
_CONTENDERS = {"artifact": "export", "pytorch_fp32": "PyTorch FP32", "pytorch_bf16": "PyTorch BF16"}


@dataclass(frozen=True)
class Beside:
    """What a page shows beside the gate; None for what is not at hand.

    `manifest` of the export, `bench` as ``bench --json`` writes it, `sensitivity` as measured.
    """

    manifest: Manifest | None = None
    bench: Mapping[str, Any] | None = None
    sensitivity: Sensitivity | None = None


def read_beside(path: Path, bench: Path | None, sensitivity: Path | None) -> Beside:
    """What there is to show of the export in the folder `path`; a file that is no export has no sizes.

    `bench` and `sensitivity` are files of the user's; without `bench` the export's own record counts. Raises
    `BadInputError` naming a file that is something else.
    """
    manifest = open_artifact(path, check_hashes=False).manifest if path.is_dir() else None
    measured = None if manifest is None else manifest.results.get("bench")
    if bench is not None:
        measured = _read(bench, ("runtime", "artifact", "references"), "vlmexport bench --json")
    found = None
    if sensitivity is not None:
        keys = ("model", "scheme", "together", "modules", "notes")
        found = Sensitivity.from_dict(_read(sensitivity, keys, "vlmexport sensitivity"))
    return Beside(manifest, measured, found)


def _read(path: Path, keys: Sequence[str], writer: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInputError(f"{path} is not what `{writer}` writes: {error}") from error
    missing = [key for key in keys if not isinstance(data, dict) or key not in data]
    if missing:
        raise BadInputError(f"{path} is not what `{writer}` writes: it has no {missing[0]!r}")
    return dict(data)


def sections(beside: Beside, answers: Sequence[AnsweredQuestion]) -> list[str]:
    """HTML fragments of all sections that there is something for."""
    made = [
        answered_questions(answers),
        "" if beside.bench is None else speed_and_memory(beside.bench),
        "" if beside.manifest is None else size_breakdown(beside.manifest),
        "" if beside.sensitivity is None else heat_map(beside.sensitivity),
    ]
    return [section for section in made if section]


def speed_and_memory(bench: Mapping[str, Any]) -> str:
    """Bars of the export and of PyTorch in the same run, a figure for each measure; the ratios below."""
    columns = {"artifact": bench["artifact"], **bench["references"]}
    figures = []
    for key, name, unit, divisor, side in _MEASURES:
        values = {who: found[key] / divisor for who, found in columns.items() if found.get(key)}
        if "artifact" not in values:
            continue
        bars = [(_CONTENDERS.get(who, who), value, who == "artifact") for who, value in values.items()]
        figures.append(
            f"<section class=card><h3>{escape(name)}, {escape(unit)} <span class=soft>({side})</span></h3>"
            f"{grouped([Group('', bars)], f'{name}, {unit}')}</section>"
        )
    settings = bench.get("settings", {})
    how = ", ".join(
        f"{settings[key]} {word}"
        for key, word in (("threads", "threads"), ("rounds", "rounds"), ("prompt_tokens", "prompt tokens"))
        if settings.get(key)
    )
    note = "" if bench["references"] else f" PyTorch {escape(str(settings.get('references', 'was not measured')))}."
    text = f"<p class=soft>{escape(str(bench['runtime']))}; medians of one run, taking turns ({escape(how)}).{note}</p>"
    return f"<h2>Speed and memory</h2>{text}<div class=cards>{''.join(figures)}</div>"


def size_breakdown(manifest: Manifest) -> str:
    """Bytes of each part in the checkpoint and in the export, and of everything else in the folder."""
    before, after = _part_bytes(manifest, "bytes_before"), _part_bytes(manifest, "bytes_after")
    graphs = sum(
        record.bytes
        for name, record in manifest.files.items()
        if any(name == part.file or name.startswith(part.file) for part in manifest.parts.values())
    )
    rest = sum(record.bytes for record in manifest.files.values()) - graphs
    rows = [
        Group(part, [("checkpoint", before.get(part, 0) / 1e6, False), ("export", size / 1e6, True)])
        for part, size in after.items()
    ]
    rows.append(Group("other files", [("export", rest / 1e6, True)]))
    total = sum(record.bytes for record in manifest.files.values())
    text = f"The export takes {total / 1e6:.1f} MB; its weights took {sum(before.values()) / 1e6:.1f} MB before."
    return f"<h2>Size</h2><p class=soft>{text}</p><div class=card>{grouped(rows, 'MB by part', unit='MB')}</div>"


def heat_map(found: Sensitivity) -> str:
    """The sensitivity of every quantized module, layers down, modules across."""
    head = f"<p>{escape(title(found))}</p><p class=soft>{escape(subtitle(found))}</p>"
    return f"<h2>Sensitivity per layer</h2>{head}{heat_table(found)}"


def answered_questions(answers: Sequence[AnsweredQuestion]) -> str:
    """Some questions with their pictures and both answers: where the export is wrong first, then one of each task."""
    chosen = chosen_answers(answers)
    if not chosen:
        return ""
    cards = "".join(_answer_card(answer) for answer in chosen)
    text = f"{len(chosen)} of {len(answers)} questions; those that the two answer otherwise come first."
    return f"<h2>Questions and answers</h2><p class=soft>{text}</p><div class=answers>{cards}</div>"


def chosen_answers(answers: Sequence[AnsweredQuestion], count: int = SHOWN_ANSWERS) -> list[AnsweredQuestion]:
    """At most `count`: half of them where the answers differ, then the first of each task, then more."""
    different = [a for a in answers if a.answer != a.reference_answer][: (count + 1) // 2]
    tasks = dict.fromkeys(a.task for a in answers)
    first_of = [next(a for a in answers if a.task == task) for task in tasks]
    ordered = dict.fromkeys([*different, *first_of, *answers])
    return list(ordered)[:count]


def _answer_card(answer: AnsweredQuestion) -> str:
    pictures = "".join(_thumbnail(Path(image)) for image in answer.images)
    wanted = escape(" / ".join(answer.accepted))
    rows = [
        ("accepted", wanted, ""),
        ("original", escape(answer.reference_answer), "passed" if answer.reference_correct else "failed"),
        ("export", escape(answer.answer), "passed" if answer.correct else "failed"),
    ]
    terms = "".join(f'<dt>{name}</dt><dd class="{status}">{text}</dd>' for name, text, status in rows)
    return (
        f"<section class=card>{pictures}<p><b>{escape(answer.question)}</b> <span class=soft>{escape(answer.task)}"
        f"</span></p><dl>{terms}</dl></section>"
    )


def _thumbnail(path: Path) -> str:
    """The picture as an inline PNG; a sentence where it cannot be read any more."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError) as error:
        return f"<p class=soft>{escape(path.name)}: {escape(str(error))}</p>"
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    with io.BytesIO() as stream:
        small.save(stream, "PNG")
        data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img alt="{escape(path.name, quote=True)}" src="data:image/png;base64,{data}">'


def _part_bytes(manifest: Manifest, key: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for weight in manifest.plan.get("weights", ()):
        part = str(weight.get("part", weight.get("file", "weights")))
        sizes[part] = sizes.get(part, 0) + int(weight.get(key, 0))
    return sizes

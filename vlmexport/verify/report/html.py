"""The report as one self-contained page: no script, no network, plots inline, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from vlmexport.calibrate.heatmap import HEAT_STYLE
from vlmexport.verify.report.sections import Beside, sections
from vlmexport.verify.report.svg import Bar, bars, line
from vlmexport.verify.report.words import (
    CheckGroup,
    compact,
    group_checks,
    lowering_subject,
    part_label,
    percent,
    ratio,
    reference_name,
)
from vlmexport.verify.result import Check, ParityReport

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--panel:#f6f7f9;--ink:#1c2128;--soft:#5c6570;--rule:#d9dee4;--good:#1a7f4b;
--empty:#eceef0;--bad:#c4302b;--wait:#9a6700;--blue:#2f6fbf;--limit:#8a4fbf}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--panel:#1d2127;--ink:#e4e8ec;--soft:#9aa4af;--rule:#333a43;
--empty:#22272e;--good:#4cc38a;--bad:#ff7b72;--wait:#e3b341;--blue:#6cb0ff;--limit:#c397f0}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1000px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 10px}h3{font-size:14px;margin:0 0 8px;font-weight:600}
p{margin:0 0 8px}.soft{color:var(--soft)}
.badge{display:inline-block;padding:1px 10px;border-radius:99px;font-weight:600;border:1px solid currentColor;
font-size:.8em;vertical-align:middle;white-space:nowrap}
.passed{color:var(--good)}.failed{color:var(--bad)}.not_run,.incomplete{color:var(--wait)}
.alert{border-left:4px solid var(--bad);background:var(--panel);padding:12px 16px;margin:18px 0;
border-radius:0 6px 6px 0}
.alert.failed,.alert.not_run{color:inherit}.alert.not_run{border-color:var(--wait)}
.alert ul{margin:6px 0 0;padding-left:20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:16px;margin-top:20px}
.card{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:16px 18px;min-width:0}
.card dl{display:grid;grid-template-columns:1fr auto;gap:4px 16px;margin:10px 0 0}
dd{margin:0;text-align:right;font-variant-numeric:tabular-nums;font-weight:600}dt{color:var(--soft)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;padding:5px 10px;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
svg{width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
svg .axis{fill:var(--soft);font-size:11px}svg .value{font-variant-numeric:tabular-nums}
.grid{stroke:var(--rule);stroke-width:1}.bar.passed{fill:var(--blue)}.bar.failed{fill:var(--bad)}
.mark{stroke:var(--limit);stroke-width:3}.limit{stroke:var(--limit);stroke-width:1.5;stroke-dasharray:5 4}
svg .limit-label{fill:var(--limit);font-size:11px}.series{fill:none;stroke:var(--blue);stroke-width:1.8}
.bar.own{fill:var(--blue)}.bar.other{fill:var(--soft)}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:16px}
.answers img{display:block;width:100%;height:auto;border-radius:4px;margin-bottom:8px;image-rendering:auto}
.answers .card{padding:12px}
.answers dl{grid-template-columns:auto 1fr;margin:0}.answers dd{text-align:left;font-weight:400}
.dot{fill:var(--blue)}.key{color:var(--limit);font-weight:600}
"""
_PLOTS = (
    ("decode_exact_rel", "Decoding, exact: relative error of logits", "decode step", "decoder/decode"),
    ("decode_shipped_kl", "Decoding, as shipped: KL from the same codes", "decode step", "decoder/shipped_kl"),
    ("answer_kl", "Answers: KL from {reference}", "answer token", "quantization/kl"),
)


def write(report: ParityReport, path: Path, beside: Beside | None = None) -> None:
    """Write the page to `path` (UTF-8)."""
    path.write_text(page(report, beside), encoding="utf-8")


def page(report: ParityReport, beside: Beside | None = None) -> str:
    """The report as an HTML document; `beside` says what there is to show of the export itself."""
    body = [_head(report), _alerts(report), _cards(report), _part_plot(report), _step_plots(report), _tasks(report)]
    body += [*sections(beside or Beside(), report.answers), _table(report.checks), _facts(report)]
    return document(f"vlmexport verify: {report.status}", body)


def write_bench(bench: Mapping[str, Any], path: Path, beside: Beside) -> None:
    """Write the page of a measurement (``bench --json``'s data) to `path` (UTF-8)."""
    body = ["<h1>Measured</h1>", *sections(replace(beside, bench=bench), ())]
    path.write_text(document("vlmexport bench", body), encoding="utf-8")


def document(title: str, body: Sequence[str]) -> str:
    """A self-contained page of the fragments `body`."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{HEAT_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _head(report: ParityReport) -> str:
    counts = [f"{len(report.checks)} checks"]
    counts += [
        f"{n} {word}" for n, word in ((len(report.failures()), "failed"), (len(report.not_run()), "not run")) if n
    ]
    source = report.runtime.get("reference")
    against = f" against {escape(str(source))}" if source else ""
    return f"<h1>Parity {_badge(report.status)}</h1><p class=soft>{', '.join(counts)}{against}</p>"


def _alerts(report: ParityReport) -> str:
    return _alert(report.failures(), "failed", "What failed") + _alert(
        report.not_run(), "not_run", "What could not run"
    )


def _alert(checks: Sequence[Check], kind: str, title: str) -> str:
    if not checks:
        return ""
    items = "".join(f"<li><b>{escape(part_label(c.part))}</b>: {_sentence(c)}</li>" for c in checks[:8])
    more = f"<li>and {len(checks) - 8} more in the table below</li>" if len(checks) > 8 else ""
    return f'<div class="alert {kind}"><b>{title}</b><ul>{items}{more}</ul></div>'


def _sentence(check: Check) -> str:
    measured = "" if check.value is None or check.limit is None else f" {_comparison(check)}"
    reason = f" ({escape(check.reason)})" if check.reason else ""
    return f"<code>{escape(check.name)}</code>{measured}{reason}"


def _comparison(check: Check) -> str:
    return escape(f"{check.metric.rsplit(' ', 1)[0]} {compact(check.value)}, limit {compact(check.limit)}")


def _cards(report: ParityReport) -> str:
    low, quant, against = report.lowering, report.quantization, reference_name(report)
    lowering = [
        ("largest logit difference, exact", compact(low.max_abs_logit)),
        ("KL as shipped, nats per token", compact(low.kl)),
        ("same top token as shipped", percent(low.top1)),
    ]
    quantization = [
        (f"KL from {against}, nats per token", compact(quant.kl)),
        ("same top token", percent(quant.top1)),
        ("answer perplexity ratio", ratio(quant.perplexity_ratio)),
        ("accuracy on the questions", percent(quant.accuracy)),
        (f"accuracy of {against}", percent(quant.reference_accuracy)),
    ]
    first = _card("Lowering error", report.status_of("lowering"), lowering_subject(report), lowering)
    text = f"The export as shipped against {against}."
    second = _card("Quantization loss", report.status_of("quantization"), text, quantization)
    return f"<div class=cards>{first}{second}</div>"


def _card(title: str, status: str, text: str, rows: list[tuple[str, str]]) -> str:
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f"<section class=card><h3>{title} {_badge(status)}</h3><p class=soft>{text}</p><dl>{terms}</dl></section>"


def _part_plot(report: ParityReport) -> str:
    rows = [
        Bar(_group_label(group), math.inf if check.value is None else check.value, check.limit, check.status)
        for group in group_checks(report.checks)
        if (check := group.worst).limit
        and check.metric.endswith("<=")
        and check.metric != "ratio <="
        and not check.name.startswith("baseline/")
    ]
    if not rows:
        return ""
    return (
        "<h2>Error per part</h2><p class=soft>The worst of each kind of check, on a log scale; "
        f"<span class=key>|</span> marks its limit.</p><div class=card>{bars(rows, 'Error per part')}</div>"
    )


def _group_label(group: CheckGroup) -> str:
    return group.name if group.count == 1 else f"{group.name} ({group.count})"


def _step_plots(report: ParityReport) -> str:
    limits = {check.name: check.limit for check in report.checks}
    plots = [(name, title.format(reference=reference_name(report)), *rest) for name, title, *rest in _PLOTS]
    figures = [
        f"<section class=card><h3>{escape(title)}</h3>{line(values, limits.get(check), title, label)}</section>"
        for name, title, label, check in plots
        if (values := _series(report, name))
    ]
    return f"<h2>Error per step</h2><div class=cards>{''.join(figures)}</div>" if figures else ""


def _series(report: ParityReport, name: str) -> Sequence[float]:
    """The series of that name: of an export with variants, the primary one's."""
    found = (values for key, values in report.series.items() if key.rpartition(":")[2] == name)
    return next(found, ())


def _tasks(report: ParityReport) -> str:
    if not report.tasks:
        return ""
    rows = "".join(
        f"<tr><td>{escape(t.task)}</td><td class=n>{t.questions}</td><td class=n>{percent(t.accuracy)}</td>"
        f"<td class=n>{percent(t.reference_accuracy)}</td></tr>"
        for t in report.tasks
    )
    head = "<tr><th>task</th><th class=n>questions</th><th class=n>exported</th><th class=n>original</th></tr>"
    return f"<h2>Accuracy by task</h2><div class=wide><table>{head}{rows}</table></div>"


def _table(checks: Sequence[Check]) -> str:
    rows = "".join(
        f"<tr><td>{escape(c.part)}</td><td>{escape(c.name)}</td><td>{_badge(c.status)}</td>"
        f"<td>{escape(c.metric)}</td><td class=n>{compact(c.value)}</td><td class=n>{compact(c.limit)}</td>"
        f"<td>{escape(c.reason)}</td></tr>"
        for c in checks
    )
    names = "<th>part</th><th>check</th><th>status</th><th>metric</th><th class=n>value</th><th class=n>limit</th>"
    return f"<h2>All checks</h2><div class=wide><table><tr>{names}<th>reason</th></tr>{rows}</table></div>"


def _facts(report: ParityReport) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in report.runtime.items())
    return f"<h2>Run by</h2><section class=card><dl>{rows}</dl></section>" if rows else ""


def _badge(status: str) -> str:
    return f'<span class="badge {status}">{status.replace("_", " ")}</span>'

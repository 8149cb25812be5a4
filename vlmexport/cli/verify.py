"""``vlmexport verify``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmexport import api
from vlmexport.cli.onnx import print_and_judge
from vlmexport.cli.options import reference_lora_option, reference_option, trust_option
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import example
from vlmexport.errors import BadInputError, NotPossibleHereError

if TYPE_CHECKING:
    from vlmexport.verify.report.sections import Beside
    from vlmexport.verify.result import ParityReport

_PERCENT = 100


class Share(click.ParamType[float]):
    """A share of 0 or more: ``5%`` or ``0.05``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a number; anything else is bad usage."""
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%")) / (_PERCENT if text.endswith("%") else 1)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            self.fail(f"{text!r} is not a share; give 5% or 0.05", param, ctx)
        return number


_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(
    epilog=example(
        "vlmexport verify demo-int4",
        "vlmexport verify demo-int4 --junit gate.xml --html gate.html",
        "vlmexport verify demo-int4 --baseline baseline.json --max-regression 5%",
        "vlmexport verify model-Q4_K_M.gguf --mmproj mmproj-model-f16.gguf --model MODEL",
    ),
    short_help="Prove an export equal to the model it was made from.",
)
@click.argument("artifact", metavar="DIR|TEXT.gguf", type=click.Path(path_type=Path))
@click.option(
    "--mmproj", type=_FILE, default=None, metavar="FILE", show_default="the export's own",
    help="The vision half that goes with TEXT.gguf.",
)  # fmt: skip
@reference_option
@reference_lora_option
@click.option(
    "--samples", type=_FILE, default=None, metavar="FILE", show_default="the bundled model's own questions",
    help="Questions to judge accuracy by: JSON lines with image, question, answers.",
)  # fmt: skip
@click.option("--junit", type=_FILE, default=None, metavar="FILE", show_default="none", help="Write JUnit XML.")
@click.option("--html", type=_FILE, default=None, metavar="FILE", show_default="none", help="Write a page with plots.")
@click.option(
    "--bench", type=_FILE, default=None, metavar="FILE", show_default="the export's own, from `bench --record`",
    help="What `bench --json` wrote, for the page.",
)  # fmt: skip
@click.option(
    "--sensitivity", type=_FILE, default=None, metavar="FILE", show_default="none",
    help="The sensitivity.json of `vlmexport sensitivity`, for the page's heat map.",
)  # fmt: skip
@click.option(
    "--baseline", type=_FILE, default=None, metavar="FILE", show_default="none",
    help="An earlier report of `verify --json`: fail where a number became worse.",
)  # fmt: skip
@click.option(
    "--max-regression", type=Share(), default="5%", metavar="SHARE", show_default=True,
    help="By how much a number may be worse than the baseline's: `5%` or `0.05`.",
)  # fmt: skip
@click.option(
    "--allow-not-run", is_flag=True, show_default="off", help="Exit 0 although a check could not run on this machine."
)
@trust_option
@common_options
def command(
    session: Session,
    artifact: Path,
    mmproj: Path | None,
    model: str | None,
    lora: str | None,
    samples: Path | None,
    junit: Path | None,
    html: Path | None,
    bench: Path | None,
    sensitivity: Path | None,
    baseline: Path | None,
    max_regression: float,
    allow_not_run: bool,
    trust_remote_code: bool,
) -> None:
    """Prove the export in DIR, or a pair of GGUF files of any tool, equal to the model it was made from.

    Two questions are judged apart: the error of the lowering, and the loss of the quantization.
    With --baseline also: is it worse than it was?
    Exit codes: 3 when a check failed, 4 when something asked for could not run.
    """
    from vlmexport.verify.baseline import against_baseline, read_baseline

    if html is None and (bench or sensitivity):
        raise BadInputError(f"{'--bench' if bench else '--sensitivity'} is for the page; give --html FILE, too")
    shown = _beside(artifact, bench, sensitivity) if html else None
    earlier = None if baseline is None else read_baseline(baseline)
    with session.progress() as progress:
        report = api.verify_artifact(
            artifact,
            mmproj=mmproj,
            model=model,
            lora=lora,
            samples=samples,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    if earlier is not None:
        report = against_baseline(report, earlier, max_regression)
    session.write_json(report.to_dict())
    write_reports(report, junit, html, shown)
    print_and_judge(report, session.console())
    if report.status == "incomplete" and not allow_not_run:
        raise NotPossibleHereError(_not_run_message(report))


def write_reports(report: ParityReport, junit: Path | None, html: Path | None, beside: Beside | None = None) -> None:
    """Write the report files that were asked for; `beside` is what the page shows beside the gate."""
    if junit is not None:
        from vlmexport.verify.report.junit import write as write_junit

        write_junit(report, junit)
    if html is not None:
        from vlmexport.verify.report.html import write as write_html

        write_html(report, html, beside)


def _beside(path: Path, bench: Path | None, sensitivity: Path | None) -> Beside:
    from vlmexport.verify.report.sections import read_beside

    return read_beside(path, bench, sensitivity)


def _not_run_message(report: ParityReport) -> str:
    missing = report.not_run()
    first = f": {missing[0].name}: {missing[0].reason}" if missing else ""
    return f"{len(missing)} checks did not run{first} (--allow-not-run accepts that)"

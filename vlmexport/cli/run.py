"""``vlmexport run``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vlmexport import api
from vlmexport.cli.options import artifact_argument, trust_option
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import example

_IMAGE = click.Path(path_type=Path, dir_okay=False)


@click.command(
    epilog=example(
        'vlmexport run demo-int4 --image photo.png --prompt "What is in the picture?"',
        'vlmexport run demo-int4 --image a.png --image b.png --prompt "Compare." --temperature 0.7 --seed 1',
        'vlmexport run qwen-int4 --video frames --fps 2 --prompt "What happens?"',
    ),
    short_help="Answer a question about pictures or a video with an export.",
)
@artifact_argument
@click.option(
    "--image", "images", multiple=True, type=_IMAGE, metavar="FILE", show_default="none",
    help="A picture; may be given again.",
)  # fmt: skip
@click.option(
    "--video", type=click.Path(path_type=Path), metavar="PATH", show_default="none",
    help="A folder of frames, by name, or an animated GIF, WebP or PNG; it stands behind the pictures.",
)  # fmt: skip
@click.option(
    "--fps", type=click.FloatRange(min=0, min_open=True), metavar="NUMBER", show_default="the file's own times",
    help="Frames a second of --video; a folder needs it.",
)  # fmt: skip
@click.option("--prompt", required=True, metavar="TEXT", help="The question.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer in tokens."
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="0 takes the likeliest token; more is more random.",
)  # fmt: skip
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Sample from the likeliest tokens of this total probability.",
)  # fmt: skip
@click.option(
    "--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="Sample from this many tokens; 0 = all."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option(
    "--stop", multiple=True, metavar="TEXT", show_default="none", help="End the answer before TEXT; may be given again."
)
@click.option(
    "--dtype", default=None, metavar="NAME", show_default="the export's first",
    help="Which of several precisions to run (exports of --layout transformersjs).",
)  # fmt: skip
@trust_option
@common_options
def command(
    session: Session,
    artifact: Path,
    images: tuple[Path, ...],
    video: Path | None,
    fps: float | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    dtype: str | None,
    trust_remote_code: bool,
) -> None:
    """Answer a question about pictures or a video with the export in DIR; the answer streams to stdout.

    Only the exported files run; no PyTorch model is loaded. Greedy unless --temperature is given.
    """
    from vlmexport.runtime.sampling import Sampling

    if fps is not None and video is None:
        raise click.UsageError("--fps is of a video: give --video as well")
    sampling = Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop, max_new_tokens=max_new_tokens
    )
    stream = sys.stderr if session.json_path == "-" else sys.stdout

    def show(text: str) -> None:
        stream.write(text)
        stream.flush()

    answer = api.answer_prompt(
        artifact, images, prompt, sampling, show,
        dtype=dtype, video=video, fps=fps, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    show("\n")
    session.write_json(answer.to_dict())

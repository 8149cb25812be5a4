"""Lint an ONNX graph before TensorRT sees it: what its parser or builder would refuse, and what only seems to work.

Needs neither TensorRT nor a GPU, and reads no weights. The rules are tables of small functions (`RULES`,
`GRAPH_RULES`); the tests build each rule's examples with TensorRT for RTX and compare the verdicts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmexport.engines import ShapeProfile
from vlmexport.errors import ArtifactError, UnsupportedModelError
from vlmexport.lower.tensorrt import lint_attention, lint_inputs, lint_rules
from vlmexport.lower.tensorrt.lint_view import Request, Severity, Site, all_sites

RULES = (*lint_rules.RULES, *lint_attention.RULES)
GRAPH_RULES = (*lint_rules.GRAPH_RULES, *lint_inputs.GRAPH_RULES)
ALL_WEIGHTS = ("fp16", "int8", "int4")
_MOST_LISTED = 8


@dataclass(frozen=True)
class Finding:
    """One problem of a graph.

    `node` is the node's name (its first output where it has none), or the input's or tensor's with an empty `op`. An
    ``error`` fails in the parser or the build, or computes something else; a ``warning`` does neither.
    """

    node: str
    op: str
    severity: Severity
    rule: str
    reason: str
    fix: str

    def __str__(self) -> str:
        where = f"{self.op} {self.node}" if self.op else self.node
        return f"{where}: {self.reason} [{self.rule}]; {self.fix}"


def lint_graph(
    path: Path, profile: Sequence[ShapeProfile] = (), *, weights: Sequence[str] = ALL_WEIGHTS
) -> tuple[Finding, ...]:
    """Every finding in the graph at `path`, errors first, each kind in the graph's order.

    `profile`: the optimization profiles that its engine is to have; without any, dynamic axes are not judged.
    `weights`: the precisions that the GPU takes. Raises `ArtifactError` when the file cannot be read as ONNX.
    """
    request = _request(path, tuple(profile), frozenset(weights))
    findings = [*_in_graph(request), *(f for site in all_sites(request) for f in _at(site))]
    return tuple(sorted(findings, key=lambda f: f.severity != "error"))


def require_clean(
    path: Path, profile: Sequence[ShapeProfile] = (), *, weights: Sequence[str] = ALL_WEIGHTS
) -> tuple[Finding, ...]:
    """The warnings of a graph without errors.

    Otherwise `UnsupportedModelError`: a line with the first error and how many there are, then one for each of the
    others, up to `_MOST_LISTED` in all and the number of what is left.
    """
    findings = lint_graph(path, profile=profile, weights=weights)
    errors = [f for f in findings if f.severity == "error"]
    if not errors:
        return findings
    count = f" (1 of {len(errors)} errors)" if len(errors) > 1 else ""
    lines = [f"{path.name} is not for TensorRT: {errors[0]}{count}"]
    lines += [f"{path.name}: {error}" for error in errors[1:_MOST_LISTED]]
    if len(errors) > _MOST_LISTED:
        lines.append(f"{path.name}: and {len(errors) - _MOST_LISTED} more")
    raise UnsupportedModelError("\n".join(lines))


def _request(path: Path, profiles: tuple[ShapeProfile, ...], weights: frozenset[str]) -> Request:
    """The graph with its functions inlined and the types that ONNX infers."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import inliner

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as ONNX: {error}") from error
    if not model.opset_import:
        raise ArtifactError(f"{path} is no ONNX model: it names no opset")
    if model.functions:
        model = inliner.inline_local_functions(model)
    # Where it fails, the declared types remain, and the rule `types` says why.
    with contextlib.suppress(onnx.shape_inference.InferenceError, ValueError):
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
    return Request(model, path.parent, opsets, profiles, weights)


def _in_graph(request: Request) -> Iterator[Finding]:
    for rule in GRAPH_RULES:
        for name, problem in rule.check(request):
            yield Finding(name, "", problem.severity, rule.name, problem.reason, problem.fix)


def _at(site: Site) -> Iterator[Finding]:
    node = site.node
    name = node.name or next(iter(node.output), "")
    for rule in RULES:
        if not rule.ops or node.op_type in rule.ops:
            for problem in rule.check(site):
                yield Finding(name, node.op_type, problem.severity, rule.name, problem.reason, problem.fix)

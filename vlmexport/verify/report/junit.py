"""The report as JUnit XML, which every CI system shows: one test case per check."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from vlmexport.verify.report.words import compact
from vlmexport.verify.result import Check, ParityReport


def write(report: ParityReport, path: Path) -> None:
    """Write the report to `path`: two suites, ``lowering`` and ``quantization``; not run is ``skipped``."""
    root = ElementTree.Element("testsuites", name="vlmexport verify")
    for question in ("lowering", "quantization"):
        checks = [check for check in report.checks if check.question == question]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=question,
            tests=str(len(checks)),
            failures=str(sum(c.status == "failed" for c in checks)),
            skipped=str(sum(c.status == "not_run" for c in checks)),
            errors="0",
        )
        for check in checks:
            _case(suite, check)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _case(suite: ElementTree.Element, check: Check) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=check.part, name=check.name)
    measured = f"{check.metric} {compact(check.limit)}, measured {compact(check.value)}"
    if check.status == "failed":
        message = check.reason or measured
        ElementTree.SubElement(case, "failure", message=_printable(message)).text = measured
    elif check.status == "not_run":
        ElementTree.SubElement(case, "skipped", message=_printable(check.reason))
    else:
        ElementTree.SubElement(case, "system-out").text = measured


def _printable(text: str) -> str:
    """XML 1.0 cannot hold control characters, not even escaped; runtimes' messages sometimes have them."""
    return "".join(c if c.isprintable() else " " for c in text)

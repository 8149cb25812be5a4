"""The report in each of its forms: complete, well-formed, and the failing part first."""

import dataclasses
import io
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

from rich.console import Console

from tests.verify.synthetic import green_report, red_report
from vlmexport.verify.report import html, junit
from vlmexport.verify.report.console import print_report
from vlmexport.verify.report.words import group_checks


def printed(report, **options):
    out = io.StringIO()
    print_report(report, Console(file=out, width=160), **options)
    return out.getvalue()


def test_the_console_names_the_failing_part_first():
    text = printed(red_report())
    assert text.startswith("The decoder failed: decoder/decode: rel 0.31 (limit 1.00e-05)")
    assert "3 values are <NaN>" in text
    assert "not run: runtime/provider (no CUDAExecutionProvider here)" in text
    assert "verify: failed" in text


def test_the_console_shows_both_questions():
    text = printed(green_report())
    assert "Lowering" in text
    assert "Quantization" in text
    assert "95.0 % (96.0 %)" in text
    assert "verify: passed" in text


def test_checks_of_one_kind_are_one_row_with_the_worst_value():
    groups = {g.name: g for g in group_checks(red_report().checks)}
    assert groups["decoder/prefill"].count == 4
    assert groups["decoder/prefill"].worst.name == "decoder/prefill[text]"
    assert "decoder/prefill[wide]" in printed(red_report(), every_check=True)


def test_json_is_strict():
    text = json.dumps(red_report().to_dict(), allow_nan=False)
    data = json.loads(text)
    assert data["status"] == "failed"
    assert data["details"]["tasks"][0]["task"] == "count"
    assert len(data["details"]["series"]["decode_exact_rel"]) == 17


def test_junit_has_a_case_for_every_check(tmp_path):
    report = red_report()
    junit.write(report, tmp_path / "gate.xml")
    root = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert [s.get("name") for s in root] == ["lowering", "quantization"]
    assert len(root.findall(".//testcase")) == len(report.checks)
    assert len(root.findall(".//failure")) == 2
    assert root.find(".//skipped").get("message") == "no CUDAExecutionProvider here"
    assert root[0].get("failures") == "2"
    case = root.find(".//testcase[@name='decoder/decode']")
    assert case.get("classname") == "decoder"


class Balanced(HTMLParser):
    """Collects unbalanced tags and everything that would load from a network."""

    def __init__(self):
        super().__init__()
        self.open, self.faults = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.faults += [(k, v) for k, v in attrs if k in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def test_the_page_is_well_formed_and_self_contained(tmp_path):
    html.write(red_report(), tmp_path / "gate.html")
    text = (tmp_path / "gate.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert (parser.faults, parser.open) == ([], [])
    assert "<script" not in text
    assert "http" not in text
    assert "&lt;NaN&gt; &amp; co" in text
    assert text.count("<svg") == 4
    assert "prefers-color-scheme:dark" in text


def test_a_page_without_series_or_questions_is_still_whole():
    report = green_report()
    assert "<svg" in html.page(report)
    assert html.page(type(report)(())).startswith("<!doctype html>")


def test_what_was_compared_with_is_named():
    report = green_report()
    kept = dataclasses.replace(report, runtime={**report.runtime, "reference_codes": "gptq 4-bit g32 sym"})
    assert "KL from the original, nats/token" in printed(report)
    assert "KL from the quantized checkpoint, nats/token" in printed(kept)
    assert "The export as shipped against the original." in html.page(report)
    assert "Answers: KL from the original" in html.page(report)
    assert "The export as shipped against the quantized checkpoint." in html.page(kept)
    assert "the original" not in html.page(kept)

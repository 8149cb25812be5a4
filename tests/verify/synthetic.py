"""A report with every kind of check, for the writers' tests."""

from __future__ import annotations

from vlmexport.verify.result import Check, LoweringSummary, ParityReport, QuantizationSummary, TaskAccuracy


def red_report() -> ParityReport:
    """Failed and passed checks, one that did not run, odd characters, a value that is not finite."""
    probes = ("square", "wide", "two_images", "text")
    checks = [
        Check("processor/prompt_ids", "processor", "lowering", "passed", "differing <=", 0.0, 0.0),
        *(_rel(f"vision_encoder/features[{p}]", "vision_encoder", 2e-4, 1e-3) for p in probes[:3]),
        *(_rel(f"projector/features[{p}]", "projector", 4e-4, 1e-3) for p in probes[:3]),
        _rel("embed_tokens/table", "embed_tokens", 3e-4, 1e-3),
        *(_rel(f"decoder/prefill[{p}]", "decoder", 1e-6 * (i + 1), 1e-5) for i, p in enumerate(probes)),
        Check("decoder/decode", "decoder", "lowering", "failed", "rel <=", 0.31, 1e-5),
        Check("decoder/cache", "decoder", "lowering", "failed", "rel <=", None, 1e-5, "3 values are <NaN> & co \x07"),
        Check("decoder/shipped_kl", "decoder", "lowering", "passed", "nats per token <=", 4e-4, 1e-2),
        Check("runtime/provider", "runtime", "lowering", "not_run", "runs", reason="no CUDAExecutionProvider here"),
        Check("quantization/kl", "model", "quantization", "passed", "nats per token <=", 7e-4, 5e-2),
        Check("quantization/top1", "model", "quantization", "passed", "share >=", 0.997, 0.97),
        Check("quantization/perplexity_ratio", "model", "quantization", "passed", "ratio <=", 1.0004, 1.02),
    ]
    return ParityReport(
        tuple(checks),
        LoweringSummary(4.1, 4e-4, 0.99),
        QuantizationSummary(7e-4, 0.997, 1.0004, 0.95, 0.96),
        {
            "decode_exact_rel": tuple(1e-6 * (1 + i % 3) for i in range(8)) + (0.3,) * 9,
            "decode_shipped_kl": tuple(1e-4 * (1 + i % 4) for i in range(17)),
            "answer_kl": tuple(2e-4 * (1 + i % 5) for i in range(12)),
        },
        {"target": "cpu", "provider": "CPUExecutionProvider", "reference": "demo", "seconds": 31.4},
        (TaskAccuracy("count", 10, 0.9, 1.0), TaskAccuracy("word", 10, 1.0, 1.0)),
    )


def green_report() -> ParityReport:
    """The passed checks of `red_report`."""
    red = red_report()
    return ParityReport(
        tuple(c for c in red.checks if c.status == "passed"), red.lowering, red.quantization, red.series
    )


def _rel(name: str, part: str, value: float, limit: float) -> Check:
    return Check(name, part, "lowering", "passed", "rel <=", value, limit)  # type: ignore[arg-type]

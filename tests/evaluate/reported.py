"""Inputs of a report with numbers that can be checked by hand, in the shapes that the stages write.

What has a light producer comes from it (`Numeric`, `FirstBad`, figures of runs, sensitivity); records of the
checkpoint and of engines are spelt out.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbq_export.bundle import Bundle, seal
from mbq_export.calibrate.gradients import Gradients
from mbq_export.calibrate.sensitivity import sensitivity
from mbq_export.evaluate import figures
from mbq_export.evaluate.bisect import FirstBad
from mbq_export.evaluate.comparison import LinearError, StreamError
from mbq_export.evaluate.gathering import Found, Quality, Result, gather
from mbq_export.evaluate.numeric import Numeric
from mbq_export.families.base import ANSWER, PROMPT, VISION
from mbq_export.report import Check, Measurement, Report
from tests.evaluate.requests_by_hand import run

LINEARS = ("self_attn.o_proj", "mlp.down_proj")
UNITS = ("qkv", "o", "gate_up", "down")
HOSTILE = '<script>alert(1)</script>|=cmd("x")'
SHARDS = {"model.safetensors": "b" * 64}


def bundle_folder(
    root: Path,
    *,
    model: str = "tiny-llava-ov",
    layers: int = 3,
    shards: Mapping[str, str] = SHARDS,
    facts: Mapping[str, Any] | None = None,
    engines: bool = True,
    report: Report | None = None,
) -> Path:
    """Seal a bundle of records: no weights, no graphs."""
    parts: dict[str, Any] = {
        "calibration/calib.json": calib(layers),
        "calibration/sensitivity.json": measured(layers),
        "weights/mbq.json": checkpoint(layers),
        "onnx/mbq_export.json": {"schema": "mbq-export/graphs@1"},
    }
    if engines:
        parts["engines/rtx-1.7.1.116/sm89/engine.json"] = engine()
        parts["engines/rtx-1.7.1.116/sm89/layers.json"] = layer_table()
    for path, content in parts.items():
        write(root / path, content)
    checks = validation().checks if report is None else report.checks
    about = {
        "tool": {"name": "mbq-export", "version": "0.1.0", "packages": {"torch": "2.13.0"}},
        "seed": 0,
        "source": {
            "model": model,
            "family": "llava_onevision",
            "config": "a" * 64,
            "shards": dict(shards),
        },
        "calibration": calib(layers)["data"],
        "quant": checkpoint(layers),
        "limits": {"max_context": 512},
        "skipped_engines": {},
        "gates": [check.as_json() for check in checks],
        "gate_override": None,
    }
    provenance = {
        "command": "mbq-export build --wbits 3",
        "finished_unix": 0,
        "seconds": {"onnx": 2},
    }
    if report is not None:
        (root / "reports").mkdir(parents=True)
        report.write(root / "reports" / "validate.json")
    seal(root, {**about, **(facts or {})}, provenance)
    return root


def write(path: Path, content: Any) -> Path:
    """Write JSON as other programs might, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def calib(layers: int) -> dict[str, Any]:
    """Three quarters of the tokens are the picture's; exponents are the layer's number in twentieths."""
    return {
        "schema": "mbq-export/calib@1",
        "data": {
            "sha256": "c" * 64,
            "samples": 128,
            "tokens": {"vision": 750, "prompt": 150, "answer": 100},
        },
        "units": [
            {"layer": layer, "unit": unit, "alpha": layer / 20}
            for layer in range(layers)
            for unit in UNITS
        ],
    }


def measured(layers: int) -> dict[str, Any]:
    """Vision tokens have a tenth of the answer's gradient, prompt tokens a half, in every layer."""
    if not layers:
        return {"schema": "mbq-export/sensitivity@1"}
    mean_abs = np.full((layers, len(LINEARS), 4, 5), np.nan)
    for kind, value in ((ANSWER, 1.0), (VISION, 0.1), (PROMPT, 0.5)):
        mean_abs[:, :, kind] = value
    gradients = Gradients(
        linears=LINEARS, mean_abs=mean_abs, mean_square=mean_abs**2, losses=np.ones(5)
    )
    return {
        **sensitivity(gradients, floor="median", seed=0, facts={}),
        "schema": "mbq-export/sensitivity@1",
    }


def checkpoint(layers: int) -> dict[str, Any]:
    """o_proj of 128 x 128 with error 0.1, down_proj of 128 x 256 with error 0.2, in every layer."""
    shapes = {"self_attn.o_proj": (128, 128, 0.1), "mlp.down_proj": (128, 256, 0.2)}
    return {
        "schema": "mbq-export/checkpoint@1",
        "scheme": {"name": "w3a16", "bits": 3, "group_size": 128},
        "method": {"name": "mbq"},
        "linears": [
            {
                "name": f"model.language_model.layers.{layer}.{linear}",
                "n": n,
                "k": k,
                "scheme": "w3a16",
                "group_size": 128,
                "error": {"weight": error},
            }
            for layer in range(layers)
            for linear, (n, k, error) in shapes.items()
        ],
        "skipped": [{"pattern": "model.vision_tower.*", "modules": 40, "why": "policy"}],
    }


def engine(**changes: Any) -> dict[str, Any]:
    """An engine that nobody has run."""
    check = Check(name="engine.A2", tier="engine", ok=True, value=0, threshold=0)
    facts = {"bytes": 3_000_000, "layers": 2, "lowering": "qdq", "checks": [check.as_json()]}
    return {
        "flavour": "rtx",
        "version": "1.7.1.116",
        "sm": ["8.9"],
        "verified": False,
        "why": "built without a GPU",
        "engines": {"decoder": facts},
        **changes,
    }


def layer_table() -> dict[str, Any]:
    """Two rows that share a constant: two Int4 and one Half in all."""
    first, second = ["w0", "Int4", [128, 128]], ["w1", "Int4", [128, 256]]
    rows = [{"const": [first, ["s", "Half", [128]]]}, {"const": [first, second]}]
    return {"engines": {"decoder": {"layers": rows, "io": []}}}


def numeric(layers: int = 3, *, worst: float = 1e-6) -> Numeric:
    """Every error is 1e-6, but of vision positions in the last layer."""
    return Numeric(
        linears=[
            LinearError(layer=layer, linear=linear, error=1e-6, column=0, modality="vision")
            for layer in range(layers)
            for linear in LINEARS
        ],
        stream=[
            StreamError(
                value=f"layers.{layer}.hidden",
                modality=modality,
                cosine=1.0,
                cosine_worst=1.0,
                norm_ratio=1.0,
                norm_off=0.0,
                error=worst if (layer, modality) == (layers - 1, "vision") else 1e-6,
                positions=10,
            )
            for layer in range(layers)
            for modality in ("vision", "prompt", "answer")
        ],
        checks=[],
        first_bad=None,
    )


def validation(*, worst: float = 1e-6, name: str = "w3", sha256: str = "0") -> Report:
    """A validation that fails if ``worst`` is beyond 1e-4, with one check that was not run."""
    ok = bool(worst <= 1e-4)
    bad = FirstBad(
        layer=2,
        op="mlp.down_proj",
        modality="vision",
        cos=0.5,
        norm_ratio=2.0,
        error=worst,
        column=7,
    )
    return Report(
        kind="validate",
        context={"bundle": name, "sha256": sha256, "backend": "ort", "lowering": "qdq"},
        checks=(
            Check(name="files", tier="structure", ok=True, value=21),
            Check(
                name="parity.relative_error",
                tier="numeric",
                ok=ok,
                value=worst,
                threshold=1e-4,
                modality="vision",
                why="" if ok else "worst at layers.2.hidden",
            ),
            Check(name="parity.cosine", tier="numeric", ok=True, value=1.0, threshold=0.99999),
            Check(
                name="parity.logits", tier="tokens", ok=None, modality="answer", why="no positions"
            ),
        ),
        measurements=(Measurement(name="tokens/kl_mean", value=1e-7),),
        details={
            "first_bad": None if ok else bad.as_json(),
            "layers": numeric(worst=worst).as_json(),
            "warnings": [{"code": "MBQ-W1104", "text": "answer was not measured"}],
            "tiers": {},
        },
    )


def benchmark(
    names: Sequence[str] = ("fp", "w3"),
    *,
    reasons: Sequence[str] = (),
    bundles: Mapping[str, Bundle] | None = None,
) -> Report:
    """A benchmark whose first bundle takes twice as long per token as the others."""
    made = bundles or {}
    runs = [
        run(name, steps=(4.0,) * 3 if name == names[0] else (2.0,) * 3, bundle=made.get(name))
        for name in names
    ]
    return Report(
        kind="bench",
        valid=not reasons,
        context={"bundles": list(names)},
        measurements=tuple(
            one.measurement(figure) for one in runs for figure in (*figures.PHASES, *figures.TOTALS)
        ),
        details={
            "env": {
                "cpu": "Test CPU",
                "cpus": 2,
                "gpu": None,
                "gpu_why": "none",
                "ram_bytes": 8 << 30,
            },
            "protocol": {"repetitions": 3, "warmup": 1},
            "runs": [_run_json(one) for one in runs],
            "comparison": figures.comparison(runs),
            "noise": {"reasons": list(reasons)},
        },
    )


def _run_json(one: figures.Run) -> dict[str, Any]:
    """The part of a run that reports read, as `bench_report` writes it."""
    median = {figure: {"p50_ms": one.measurement(figure).value} for figure in figures.PHASES}
    roof = {"percent": 25.0, "bytes_per_token": 2e6, "ideal_tokens_per_second": 2000.0}
    return {
        "name": one.name,
        "bundle": {"name": one.name, "sha256": one.bundle.sha256},
        "workload": {"name": one.workload, "visual_tokens": 20, "output_tokens": 4},
        "phases": median,
        "ttft_ms": {"p50_ms": one.measurement("ttft").value},
        "tpot_ms": {"p50_ms": one.measurement("tpot").value},
        "tokens_per_second": one.rates(),
        "memory": {
            "kept_bytes": 10_000_000,
            "peak_growth_bytes": 15_000_000,
            "peak_rss_bytes": None,
            "peak_rss_bytes_why": "the system does not tell",
        },
        "energy": {"joules_per_token": None, "joules_per_token_why": "no energy counter is read"},
        "roofline": {"packed": roof, "graph": None, "graph_why": "the torch backend runs no graph"},
    }


def quality() -> dict[str, Any]:
    """Two models of one variant: full precision at 90 %, rtn one point below."""

    def summary(accuracy: float, nats: float) -> dict[str, Any]:
        distance = {"mean": {"value": nats, "low": nats * 0.9, "high": nats * 1.1}}
        return {
            "model": "seed0",
            "variant": "plain",
            "draw": 0,
            "accuracy": {"value": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01},
            "questions": 5000,
            "pictures": 900,
            "kinds": {"color": {"accuracy": accuracy, "questions": 600}},
            "kl": {"answer": distance, "vision": distance, "prompt": distance},
        }

    interval = {"value": -0.01, "low": -0.02, "high": -0.001}
    return {
        "schema": "mbq-export/quality@2",
        "setup": {
            "model": "tiny-llava-ov",
            "device": "cpu",
            "blind_accuracy": 0.3,
        },
        "rows": [
            {"method": "fp", "format": "fp", "title": "", **summary(0.9, 0.0)},
            {"method": "rtn", "format": "w3-g128", "title": "W3 g128", **summary(0.89, 0.02)},
        ],
        "pairs": [
            {
                "model": "seed0",
                "variant": "plain",
                "format": "w3-g128",
                "title": "W3 g128",
                "method": "rtn",
                "draw": 0,
                "against": "fp",
                "accuracy": interval,
                "kl": interval,
                "mcnemar": {"p": 0.03},
            }
        ],
    }


def found_of(*reports: Report, quality: Mapping[str, Any] | None = None) -> Found:
    """Results without bundles."""
    return Found(
        subjects=(),
        results=tuple(
            Result(name=f"{report.kind}{index or ''}.json", report=report)
            for index, report in enumerate(reports)
        ),
        qualities=() if quality is None else (Quality(name="quality.json", content=quality),),
        remarks=(),
    )


def everything(root: Path) -> Found:
    """A bundle with its validation, a benchmark, and a table of task quality."""
    bundle_folder(root / "w3", report=validation())
    w3 = Bundle.open(root / "w3")
    benchmark(bundles={"w3": w3}).write(root / "bench.json")
    write(root / "quality.json", quality())
    return gather([root / "w3", root / "bench.json", root / "quality.json"])

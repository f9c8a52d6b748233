"""The GPU benchmark's cost model in closed form, and what it says beside measurements."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.inputs import Shape
from benchmarks.render import RESULTS as RENDERED
from benchmarks.roofline import DEVICES, NOT_MEASURED, Ceilings, ceilings_of, cost, measured_seconds, table

RESULTS = RENDERED.parent
H200 = DEVICES["NVIDIA H200"]
BIG = Shape(8192, 4096, 128256)


def test_three_products_in_closed_form() -> None:
    # 3 products of 2 * 8192 * 4096 * 128256 operations: 25.8 TFLOP, 32.7 ms at 790 TFLOP/s.
    found = cost("bound", BIG, H200)
    assert found.flops == 3 * 2 * 8192 * 4096 * 128256
    assert found.flops == pytest.approx(25.82e12, rel=1e-3)
    assert found.seconds == pytest.approx(32.68e-3, rel=1e-3)
    # Each product reads two of X, W and Z and writes the third, 2 bytes an element.
    assert found.bytes == 3 * 2 * (8192 * 4096 + 128256 * 4096 + 8192 * 128256)
    assert cost("bound_forward", BIG, H200).flops == found.flops / 3


def test_the_workspace_pays_for_its_passes_and_its_sums() -> None:
    """With products for free what is left is 6 bytes a logit, the float32 sums and the final rounding."""
    free = Ceilings("", 1e30, 1e12, "")
    extra = cost("workspace", BIG, free).seconds - cost("bound", BIG, free).seconds
    # One chunk: 2 * H = 8192 tokens fit.
    assert extra == pytest.approx((6 * 8192 * 128256 + 6 * (128256 + 8192) * 4096) / 1e12)
    twice = dataclasses.replace(BIG, tokens=16384)
    extra = cost("workspace", twice, free).seconds - cost("bound", twice, free).seconds
    assert extra == pytest.approx((6 * 16384 * 128256 + 8 * 128256 * 4096 + 6 * (128256 + 16384) * 4096) / 1e12)


def test_a_frozen_head_and_a_short_workspace() -> None:
    frozen = [cost(path, BIG, H200, weight_gradient=False) for path in ("bound", "workspace", "fused")]
    assert [round(c.flops / cost("bound_forward", BIG, H200).flops) for c in frozen] == [2, 2, 3]
    # Sixteen chunks of 512: fifteen times the sum is read and written, 8 bytes an element.
    short, whole = (cost("workspace", BIG, H200, chunk_tokens=n) for n in (512, 8192))
    assert short.seconds - whole.seconds == pytest.approx(15 * 8 * 128256 * 4096 / 4.3e12)


def test_a_product_is_bound_by_its_slower_side() -> None:
    thin = Shape(1, 4096, 128256)
    assert cost("bound_forward", thin, H200).seconds == pytest.approx(2 * (4096 + 128256 * 4097) / 4.3e12)


def test_the_fused_path_pays_for_its_float32_sums() -> None:
    """Rows of dhidden once a chunk of 4,096 words; with several chunks of 8,192 tokens the chunk of dweight as well."""
    free = Ceilings("", 1e30, 1e12, "")
    for tokens, partial in ((8192, 0), (32768, 8 * 128256 * 4096 * 4)):
        shape = dataclasses.replace(BIG, tokens=tokens)
        products = cost("bound", shape, free).bytes + cost("bound_forward", shape, free).bytes
        statistics = 16 * tokens * 1002
        sums = 8 * tokens * 4096 * 32
        assert cost("fused", shape, free).bytes == products + statistics + sums + partial


def test_routed_costs_one_product_three_shares_and_the_means() -> None:
    dense, forward = cost("fused", BIG, H200), cost("fused_forward", BIG, H200)
    means = 2 * 8192 * 4096 * 1002
    assert cost("routed", BIG, H200, kept_share=1.0).flops == dense.flops + means
    assert cost("routed", BIG, H200, kept_share=0.0).flops == forward.flops + means
    assert dense.flops == 4 * forward.flops
    # One read of the weight is most of it, and little beside the step.
    free = Ceilings("", 1e30, 1e12, "")
    extra = cost("routed", BIG, free, kept_share=1.0).bytes - cost("fused", BIG, free).bytes
    weight = 2 * 128256 * 4096
    assert weight < extra < 1.5 * weight
    assert cost("routed", BIG, H200, kept_share=1.0).seconds < 1.02 * dense.seconds


def _report(dry_run: bool) -> dict:
    methods = {"bound": {"seconds": 0.035}, "eager_hf": {"seconds": 0.05}}
    entry = {"shape": BIG.name, "mode": "scored", "entropy": 11.7, "methods": methods}
    return {"dry_run": dry_run, "environment": {"device": "NVIDIA H200"}, "shapes": [entry], "extras": {}}


def test_what_was_not_measured_is_not_shown() -> None:
    report = _report(dry_run=False)
    assert measured_seconds(report, BIG, "eager") == 0.05
    assert measured_seconds(report, BIG, "workspace") is None
    assert measured_seconds(_report(dry_run=True), BIG, "bound") is None
    assert ceilings_of(report, "NVIDIA H200").flops == pytest.approx(25.82e12 / 0.035, rel=1e-3)
    assert ceilings_of(_report(dry_run=True), "NVIDIA H200") == H200
    lines = [line for line in table(report, H200).splitlines() if line.startswith(f"| {BIG.name} ")]
    assert sum(NOT_MEASURED in line for line in lines) == len(lines) - 2
    with pytest.raises(ValueError, match=r"^device: expected one of NVIDIA H200, NVIDIA H100, got 'x'$"):
        ceilings_of(None, "x")


def test_routed_is_predicted_at_the_share_that_a_run_kept() -> None:
    report = _report(dry_run=False)
    assert f"| {BIG.name} | routed, 14% kept |" in table(report, H200)
    peaked = {"shape": BIG.name, "mode": "peaked", "kept_share": 0.111, "methods": {"routed": {"seconds": 0.0315}}}
    report["shapes"].append(peaked)
    (line,) = (line for line in table(report, H200).splitlines() if line.startswith(f"| {BIG.name} | routed"))
    predicted = cost("routed", BIG, H200, 0.111).seconds
    assert line.split(" | ")[1] == "routed, 11% kept"
    assert line.split(" | ")[4] == f"{predicted * 1e3:.1f}"
    assert line.endswith("| 31.5 |")


def test_every_device_has_its_own_measurements_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for path in RESULTS.glob("gpu*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    said = {}
    for device in ([], ["--device", "NVIDIA H200"], ["--device", "NVIDIA H100"]):
        monkeypatch.setattr(sys, "argv", ["roofline", "--results", str(tmp_path), *device])
        roofline.main()
        said["".join(device[1:])] = capsys.readouterr().out
    assert said[""] == said["NVIDIA H200"] + said["NVIDIA H100"]
    assert said["NVIDIA H200"] != said["NVIDIA H100"]

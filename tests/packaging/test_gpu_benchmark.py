"""The GPU benchmark where there is no GPU: its cost model in closed form, its parts, and a dry run from end to end."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import correct
from benchmarks import report as report_files
from benchmarks.correct import OWN_TESTS, PATHS, IncorrectError, _Bar, check_paths
from benchmarks.gpu import Run, find_shapes
from benchmarks.inputs import IGNORE, SHAPES, TINY, PairLoss, Shape, make_batch, softmax_entropy
from benchmarks.measure import BrokenDeviceError, Clock, Deadline, interleaved
from benchmarks.memory import Job, measure
from benchmarks.methods import GPU_METHODS, methods_of
from benchmarks.processes import OUT_OF_TIME, output_within, run_piece
from benchmarks.roofline import DEVICES, NOT_MEASURED, Ceilings, ceilings_of, cost, measured_seconds, table
from clha_fast import PUBLISHED, HeadOptions, reference
from tests.support.helpers import ROOT

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


@pytest.mark.parametrize("padded", [False, True])
def test_batches_are_what_their_shape_says(padded: bool) -> None:
    shape = dataclasses.replace(TINY[0], tokens=100)
    batch = make_batch(shape, "cpu", padded=padded)
    assert batch.targets.shape == (100,)
    assert sum(batch.lengths) == 100
    assert min(batch.lengths) >= 1
    assert sum(batch.sizes) == len(batch.lengths)
    assert (batch.labels != IGNORE).sum() == 100
    if padded:
        assert batch.rows == len(batch.lengths) * batch.width
        assert torch.equal(batch.labels[batch.row_index], batch.targets)


def test_a_peaked_softmax_has_the_entropy_asked_for() -> None:
    batch = make_batch(dataclasses.replace(TINY[0], vocabulary=2000), "cpu", nats=2.0)
    assert batch.entropy == pytest.approx(2.0, abs=0.05)
    assert batch.entropy == softmax_entropy(batch.hidden, batch.weight)
    # Drawn from the softmax: the mean surprise of the targets is its entropy.
    logp = (batch.hidden.detach() @ batch.weight.detach().t()).log_softmax(-1)
    assert float(-logp.gather(1, batch.targets[:, None]).mean()) == pytest.approx(2.0, abs=0.6)


def test_the_loss_around_peers_is_the_reference_s() -> None:
    batch = make_batch(TINY[0], "cpu")
    logps = -torch.rand(48, generator=torch.Generator().manual_seed(0)) * 5
    ranking = (batch.candidate_lengths, batch.candidates_per_prompt, batch.rewards, None, None, None)
    wanted = reference.clha_loss(logps, batch.targets, *ranking, HeadOptions(), PUBLISHED)[0]
    torch.testing.assert_close(PairLoss(batch)(logps), wanted)


def test_a_method_that_fails_leaves_the_loop_with_its_reason() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel\nof this name")

    steps = {"bound": lambda: None, "broken": broken, "absent": lambda: __import__("no_such_peer")}
    found = interleaved(steps, Clock("cpu"), 2, Deadline(60))
    assert found["bound"]["rounds"] == 2
    assert found["bound"]["over_bound"] == 1.0
    assert found["broken"] == {"failed": "RuntimeError: no kernel"}
    assert found["absent"]["failed"].startswith("not installed: ")


def test_rounds_stop_when_the_time_is_over() -> None:
    found = interleaved({"bound": lambda: None}, Clock("cpu"), 50, Deadline(-1))
    assert found["bound"]["rounds"] == 1


def test_an_error_over_the_bar_ends_the_run() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    bar = _Bar.__new__(_Bar)
    bar.case, bar.dtype, bar.floor, bar.rows = "case", torch.float32, 0.0, []
    bar.exact, bar.eager = [[one.double()]] * 4, [[one + 2**-20]] * 4
    bar.compare("path", [[one + 2**-20]] * 4, ("dhidden",))
    with pytest.raises(IncorrectError, match="path, float32, case: error of dweight is 1, expected"):
        bar.compare("path", [[two]] * 4, ("dweight",))


def test_every_method_belongs_to_a_mode() -> None:
    for mode in ("scored", "padded", "pairs", "peaked"):
        assert methods_of(mode)[0] == "bound"
    listed = {name for mode in ("scored", "padded", "pairs", "peaked") for name in methods_of(mode)}
    assert listed == set(GPU_METHODS)
    assert "not installed" in measure(Job("cce", TINY[0]), "cpu")["failed"] or "cut_cross_entropy" in sys.modules


def test_jobs_survive_the_way_to_another_process() -> None:
    for job in (Job("fused", SHAPES[1]), Job("eager_hf", TINY[0], padded=True)):
        assert Job.decode(job.encode()) == job


def test_files_of_a_report(tmp_path: Path) -> None:
    report = _report(dry_run=True)
    report_files.save(report, tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["bound", "eager_hf"]
    assert rows[1]["seconds"] == "0.05"
    assert report_files.plots(report, tmp_path) == []
    assert len(report_files.plots(_report(dry_run=False), tmp_path)) <= 1


def test_a_method_that_breaks_the_device_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    clock = Clock("cpu")
    clock.seconds(lambda: None)
    monkeypatch.setattr("benchmarks.measure.is_broken", lambda: True)
    clock.cuda = True
    monkeypatch.setattr(clock, "seconds", lambda step: step() or 1.0)
    with pytest.raises(BrokenDeviceError, match=r"^bad: RuntimeError: an illegal") as caught:
        interleaved({"bound": lambda: None, "bad": broken}, clock, 2, Deadline(60))
    assert caught.value.method == "bad"


def test_behind_the_deadline_no_method_begins_and_what_is_known_is_said() -> None:
    said: list[dict] = []
    steps = {"bound": lambda: None, "late": lambda: None}
    found = interleaved(steps, Clock("cpu"), 3, Deadline(-1), after=said.append)
    assert found["late"] == {"failed": OUT_OF_TIME}
    assert said == [found]


def test_a_path_that_is_wrong_is_said_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch path, its weight's gradient 1% too large; the reference is compared with itself beside it."""
    run = correct._run
    monkeypatch.setitem(correct.PATHS, "reference", ("reference", None))

    def spoilt(inputs, dtype, backend, head, of_loss):  # type: ignore[no-untyped-def]
        result = run(inputs, dtype, backend, head, of_loss)
        if backend == "torch":
            result[2] = [part * 1.01 for part in result[2]]
        return result

    monkeypatch.setattr(correct, "_run", spoilt)
    found = check_paths("cpu", ("torch", "reference"), tiny=True)
    assert list(found["wrong"]) == ["torch"]
    assert "error of dweight is 0.01, expected <=" in found["wrong"]["torch"]
    # A value and two gradients in each of four cases; two of them have no bias.
    assert [row["path"] for row in found["rows"]].count("reference") == 4 * 3


def test_what_a_killed_process_had_said_is_kept(tmp_path: Path) -> None:
    out, _, status = output_within([sys.executable, "-u", "-c", "print(1); import time; time.sleep(60)"], 3)
    assert (out, status) == ("1\n", None)
    assert run_piece("speed", {}, "cpu", Deadline(1), tmp_path / "log") == {"failed": OUT_OF_TIME}


def _run(folder: Path, **settings: bool) -> Run:
    return Run("cpu", folder, 60, **settings)


def test_an_earlier_run_is_kept_or_continued_and_never_replaced(tmp_path: Path) -> None:
    first = _run(tmp_path)
    first.report["first_look"] = {"one_loss": {}}
    first.save()
    assert _run(tmp_path, resume=True).report["first_look"] == {"one_loss": {}}
    assert _run(tmp_path).report["first_look"] == {}
    assert json.loads((tmp_path / "gpu.1.json").read_text())["first_look"] == {"one_loss": {}}
    report = json.loads((tmp_path / "gpu.1.json").read_text())
    report["environment"]["device"] = "another"
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match=r"^--resume: .* has device another, here it is CPU dry run"):
        _run(tmp_path, resume=True)


def test_what_was_not_checked_or_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    asked: list[list[str]] = []

    def piece(name: str, given: dict, *rest: object) -> dict:
        asked.append(given["methods"])
        return {"entropy": 1.0, "rows": 1, "methods": {n: {"seconds": 1.0, "spread": 0.0} for n in given["methods"]}}

    monkeypatch.setattr("benchmarks.gpu.run_piece", piece)
    run.speed(TINY[0], "scored", 30)
    methods = run.entry(TINY[0], "scored")["methods"]
    assert asked == [["bound", "bound_forward", "eager_hf"]]
    assert methods["fused"]["failed"].startswith("not checked: ")
    names = list(run.checks())
    wrong = {"workspace": "error of dhidden"}
    run.report["correctness"]["paths"] = {names[0]: {"wrong": {}}, names[1]: {"wrong": wrong}}
    run.speed(TINY[0], "scored", 30)
    assert asked[1] == ["bound", "fused", "fused_forward"]
    assert methods["workspace"]["failed"] == "incorrect: error of dhidden"
    assert methods["fused"]["seconds"] == 1.0
    assert run.stages(()) == 1


def test_a_shape_goes_on_without_the_method_that_broke_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path)

    def piece(name: str, given: dict, *rest: object) -> dict:
        if "eager_hf" in given["methods"]:
            return {"broken": "eager_hf", "why": "illegal address", "methods": {}}
        return {"entropy": 1.0, "methods": {n: {"seconds": 1.0, "spread": 0.0} for n in given["methods"]}}

    monkeypatch.setattr("benchmarks.gpu.run_piece", piece)
    run.speed(TINY[0], "scored", 30)
    methods = run.entry(TINY[0], "scored")["methods"]
    assert methods["bound"]["seconds"] == 1.0
    assert methods["eager_hf"] == {"failed": "broke the GPU's context: illegal address"}


def test_shapes_by_name() -> None:
    assert find_shapes([]) == SHAPES
    assert find_shapes(["8192x4096x128256", SHAPES[1].name]) == SHAPES[:2]
    with pytest.raises(SystemExit, match=r"^--shapes: expected some of .*, got '1x2x3'$"):
        find_shapes(["1x2x3"])


def test_the_gpu_s_own_tests_need_no_more_than_a_bare_machine_has() -> None:
    """Every file with a test marked for a GPU is listed, and it and the benchmark are imported without extras."""
    marked = {str(f.relative_to(ROOT)) for f in ROOT.glob("tests/*/test_*.py") if "pytest.mark.gpu\n" in f.read_text()}
    assert marked == set(OWN_TESTS)
    absent = ["datasets", "hypothesis", "peft", "nltk", "sacrebleu", "scipy", "pandas", "matplotlib", "trl", "ray"]
    collect = ["-q", "-m", "gpu", "--noconftest", "--collect-only", "-p", "no:cacheprovider", *OWN_TESTS]
    code = f"""
import os, sys
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
for name in {absent}:
    sys.modules[name] = None
import benchmarks.gpu, benchmarks.pieces, pytest
sys.exit(pytest.main({collect}))
"""
    out, _, status = output_within([sys.executable, "-c", code], 240, merge=True)
    assert status == 0, out


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_a_dry_run_from_end_to_end(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--cpu-dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=560)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["dry_run"] is True
    assert not list(tmp_path.glob("*.png"))
    modes = {entry["mode"] for entry in report["shapes"]}
    assert modes == {"scored", "peaked", "padded", "pairs"}
    for entry in report["shapes"]:
        for name in ("bound", "workspace", "fused"):
            assert entry["methods"][name]["seconds"] > 0, (entry["mode"], entry["methods"][name])
            assert entry["methods"][name]["flops"] > 0
    paths = report["correctness"]["paths"]
    assert {row["path"] for found in paths.values() for row in found["rows"]} == set(PATHS)
    assert not any(found["wrong"] or "failed" in found for found in paths.values())
    assert all("peak_bytes" in found for found in report["first_look"]["memory"].values())
    for name in ("ranking_share", "over_candidates", "long_input", "memory_over_tokens", "synchronisation"):
        assert "failed" not in report["extras"][name], report["extras"][name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert done.returncode == 2
    assert "no GPU here" in done.stderr

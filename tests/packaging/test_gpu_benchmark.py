"""The GPU benchmark where there is no GPU: its parts, what it does when pieces fail, and a dry run from end to end."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import correct, gpu
from benchmarks import report as report_files
from benchmarks.correct import OWN_TESTS, PATHS, IncorrectError, _Bar, check_paths
from benchmarks.gpu import Run, find_shapes
from benchmarks.inputs import IGNORE, SHAPES, TINY, PairLoss, make_batch, softmax_entropy
from benchmarks.measure import BrokenDeviceError, Clock, Deadline, interleaved
from benchmarks.memory import Job, measure
from benchmarks.methods import GPU_METHODS, methods_of
from benchmarks.processes import OUT_OF_TIME, output_within, run_piece
from clha_fast import PUBLISHED, HeadOptions, reference
from tests.support import forked
from tests.support.helpers import ROOT


def test_what_is_said_of_the_first_look_is_its_limit() -> None:
    """Compiling alone took 39 s of it on two cores, importing 8 s; the call that has all stages has time left."""
    page = (ROOT / "docs" / "gpu-first-run.md").read_text()
    (minutes,) = re.findall(r"--first-look +# (\d+) minutes", page)
    (seconds,) = re.findall(r"--first-look \(versions, one loss, memory; (\d+) s\)", str(gpu.__doc__))
    assert gpu.FIRST_LOOK == 60 * int(minutes) == int(seconds)
    (limit,) = re.findall(r"`--limit` is the seconds\s+of a call \((\d+)\)", page)
    assert 2 * 47 <= gpu.FIRST_LOOK <= int(limit) - gpu.WARM


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


def test_every_round_takes_the_methods_in_an_order_of_its_own() -> None:
    def orders() -> list[tuple[str, ...]]:
        seen: list[str] = []
        steps = {name: lambda name=name: seen.append(name) for name in ("bound", "one", "two", "three")}
        found = interleaved(steps, Clock("cpu"), 6, Deadline(60))
        for row in found.values():
            assert 0 < row["fastest"] <= row["seconds"]
        return [tuple(seen[at : at + 4]) for at in range(0, len(seen), 4)]

    first = orders()
    assert first[0] == ("bound", "one", "two", "three")
    assert all(sorted(order) == sorted(first[0]) for order in first)
    assert len(set(first)) > 3
    assert orders() == first


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


def _report(dry_run: bool) -> dict:
    methods = {"bound": {"seconds": 0.035}, "eager_hf": {"seconds": 0.05}}
    entry = {"shape": SHAPES[0].name, "mode": "scored", "entropy": 11.7, "methods": methods}
    return {"dry_run": dry_run, "environment": {"device": "NVIDIA H200"}, "shapes": [entry], "extras": {}}


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

    def piece(seconds: float, name: str, given: dict, *rest: object) -> dict:
        asked.append(given["methods"])
        return {"entropy": 1.0, "rows": 1, "methods": {n: {"seconds": 1.0, "spread": 0.0} for n in given["methods"]}}

    monkeypatch.setattr("benchmarks.gpu.run_within", piece)
    run.speed(TINY[0], "scored", 30)
    methods = run.entry(TINY[0], "scored")["methods"]
    assert asked == [["bound", "bound_forward", "eager_hf"]]
    assert methods["fused"]["failed"].startswith("not checked: ")
    run.report["correctness"]["paths"] = {name: {"wrong": {}} for name in run.checks()}
    run.report["correctness"]["paths"]["float16, workspace"] = {"wrong": {"workspace": "error of dhidden"}}
    run.speed(TINY[0], "scored", 30)
    assert asked[1] == ["bound", "fused", "fused_forward"]
    assert methods["workspace"]["failed"] == "incorrect: error of dhidden"
    assert methods["fused"]["seconds"] == 1.0
    assert run.verdict(()) == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"broken": "eager_hf", "why": "illegal address"}, "broke the GPU's context: illegal address"),
        # Killed while its first step ran, after all the time that the piece may have.
        ({"at": "eager_hf", "failed": "did not end within 30 s"}, "did not end within 30 s"),
    ],
)
def test_a_shape_goes_on_without_the_method_that_broke_the_device_or_hangs(
    bad: dict, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path)

    def piece(seconds: float, name: str, given: dict, *rest: object) -> dict:
        if "eager_hf" in given["methods"]:
            return {**bad, "methods": {}}
        return {"entropy": 1.0, "methods": {n: {"seconds": 1.0, "spread": 0.0} for n in given["methods"]}}

    monkeypatch.setattr("benchmarks.gpu.run_within", piece)
    run.speed(TINY[0], "scored", 30)
    methods = run.entry(TINY[0], "scored")["methods"]
    assert methods["bound"]["seconds"] == 1.0
    assert methods["eager_hf"] == {"failed": reason}
    assert not list(run.missing(()))


def test_what_the_call_s_own_time_was_too_short_for_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A piece that was cut short is out of time, whatever ran then, and the command to go on is said."""
    run = _run(tmp_path)
    run.report["correctness"]["paths"] = {name: {"wrong": {}} for name in run.checks()}
    cut = {"at": "eager_hf", "failed": OUT_OF_TIME, "methods": {}}
    monkeypatch.setattr("benchmarks.gpu.run_within", lambda *_: dict(cut))
    run.speed(TINY[0], "scored", 30)
    assert run.entry(TINY[0], "scored")["methods"]["eager_hf"] == {"failed": OUT_OF_TIME}
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path), "--resume", "--shapes"])
    assert run.verdict(()) == 3
    assert f"next: python -m benchmarks.gpu --output {tmp_path} --shapes --resume\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("only", "order"),
    [
        ((), ["check", "speed", "peers"]),
        (("cce", "fused"), ["check", "speed", "peers"]),
        (("workspace", "fused", "routed"), ["check", "speed"]),
    ],
)
def test_no_time_waits_for_the_peers_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: tuple[str, ...], order: list[str]
) -> None:
    run, seen = Run("cpu", tmp_path, 60, only=only), []
    monkeypatch.setattr(run, "correct", lambda again: seen.append("check"))
    monkeypatch.setattr(run, "all_shapes", lambda: seen.append("speed"))
    monkeypatch.setattr(run, "piece", lambda most, name, given: seen.append(name) or {})
    monkeypatch.setattr(sys, "argv", ["gpu"])
    run.stages(("shapes",))
    assert seen == order


def test_a_first_look_that_fails_says_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path)
    assert run.verdict(()) == 0
    run.report["first_look"] = {
        "triton": {"failed": "did not end within 60 s"},
        "workspace": {"one_loss": {"wrong": {"workspace": "error of dhidden is 1"}}},
    }
    assert run.verdict(("first_look",)) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "benchmarks.gpu: first look: triton: did not end within 60 s",
        "benchmarks.gpu: first look: workspace: error of dhidden is 1",
    ]
    assert "docs/gpu-first-run.md" in said[2]
    assert str(run.log) in said[2]


def test_a_check_that_hangs_is_said_and_comes_again_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path)
    asked: list[list[str]] = []

    def pieces(most: float, jobs: dict, workers: int) -> list:
        asked.append(list(jobs))
        late = {"failed": "did not end within 150 s", "rows": [], "wrong": {}}
        return [(name, late if name == "float32, torch" else {"wrong": {}}) for name in jobs]

    monkeypatch.setattr(run, "pieces", pieces)
    monkeypatch.setattr(run, "piece", lambda *_: {})
    monkeypatch.setattr(correct, "run_tests", lambda *_, **__: {"passed": "1 passed"})
    for again in (True, False, True):
        run.correct(again)
    assert asked == [list(run.checks()), [], ["float32, torch"]]
    assert run.verdict(()) == 1
    assert "torch is not timed, not checked: did not end within 150 s" in capsys.readouterr().err


# Both of the others end the parent by the same exception.
@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_no_process_goes_on_when_the_run_is_ended(end: signal.Signals, tmp_path: Path) -> None:
    """A piece that would sleep for an hour, in the middle of it: gone some moments after its parent is."""
    piece = "import os, time; from benchmarks.processes import end_with_parent as e; e(); print(os.getpid()); "
    parent = f"""
import signal, sys
from benchmarks import processes
for number in (signal.SIGTERM, signal.SIGINT):  # which a shell has its background jobs ignore
    signal.signal(number, signal.default_int_handler)
command = [sys.executable, "-u", "-c", {piece + "os.dup2(1, 2); time.sleep(3600)"!r}]
popen = processes.subprocess.Popen
processes.subprocess.Popen = lambda *a, **k: print((p := popen(*a, **k)).pid, flush=True) or p
processes.output_within(command, 3600)
"""
    said = tmp_path / "said.out"
    started = forked.start("bare", "-c", parent, out=said.with_suffix(""))
    while not (said.exists() and said.read_text().endswith("\n")):
        assert started.poll() is None, said.with_suffix(".err").read_text()
        time.sleep(0.01)
    child = int(said.read_text())
    os.kill(started.pid, end)
    try:
        # On a machine that is busy with other things the piece may not have got as far as its first line.
        started.wait(300)
        end_of_wait = time.monotonic() + 300
        while _command_of(child) and time.monotonic() < end_of_wait:
            time.sleep(0.1)
        assert not _command_of(child)
    finally:
        for process in (started.pid, child):
            if _command_of(process):
                os.kill(process, signal.SIGKILL)


def _command_of(process: int) -> bytes:
    """Its command line; empty when it has ended."""
    file = Path(f"/proc/{process}/cmdline")
    try:
        return file.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


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
    forked.output("bare", code)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_a_dry_run_from_end_to_end(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--cpu-dry-run", "--output", str(tmp_path)]
    command += ["--limit", "2400"]  # on a machine that others use
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=2500)
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
    assert report["first_look"].keys() == {"triton", "workspace"}
    assert all("peak_bytes" in found["memory"] for found in report["first_look"].values())
    assert "tests collected" in report["correctness"]["tests"]["passed"]
    for name in ("ranking_share", "over_candidates", "long_input", "memory_over_tokens", "synchronisation"):
        assert "failed" not in report["extras"][name], report["extras"][name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = forked.run("bare", "benchmarks.gpu")
    assert done.returncode == 2
    assert "no GPU here" in done.stderr

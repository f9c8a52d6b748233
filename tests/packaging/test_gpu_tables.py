"""What was measured on a GPU as tables, and the two benchmarks beside the main one, where there is no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import render, render_gpu, render_kernels, step, tiles
from benchmarks import report as report_files
from benchmarks.gpu import Run
from benchmarks.inputs import SHAPES
from benchmarks.pieces import EXTRAS
from benchmarks.processes import OUT_OF_TIME
from csrc_triton import configs

RESULTS = render.RESULTS.parent


def table_of(kernel: str) -> dict[str, Any]:
    return tiles.table()[kernel]


def test_every_tile_that_is_tried_differs_from_the_table_s_and_from_the_others() -> None:
    for kernel, tried in tiles.TILES.items():
        own = table_of(kernel)
        found = [own, *({name: v for name, v in (own | tile).items() if v is not None} for tile in tried)]
        assert all(one not in found[:place] for place, one in enumerate(found)), kernel


def test_a_run_puts_its_tiles_into_the_table_and_run_0_takes_them_out() -> None:
    base = tiles.table()
    before = json.dumps([configs.select(kernel, "sm_90", "16-bit") for kernel in base])
    for run in (1, 3):
        tiles.take(run, base)
        for kernel, tile in tiles.tried(run).items():
            chosen = configs.select(kernel, "sm_90", "16-bit")
            assert {name: chosen.get(name) for name in tile} == tile
    tiles.take(0, base)
    assert json.dumps([configs.select(kernel, "sm_90", "16-bit") for kernel in base]) == before


@pytest.mark.parametrize(("capability", "said"), [(None, "no GPU here"), ((8, 0), "expected compute capability 9.x")])
def test_tiles_of_another_device_are_not_tried(
    capability: tuple[int, int] | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is tried would be put into a row that such a device does not read, and timed as if it were."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(sys, "argv", ["tiles", "--output", str(tmp_path / "out")])
    assert tiles.main() == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["8192x4096", "ax2x3", "0x1x2", "1x2x3x4", "1x2x", "-1x2x3"])
def test_a_shape_is_three_sizes(text: str) -> None:
    found = tiles.shape_of("24 x 16 x 8")
    assert (found.tokens, found.width, found.vocabulary) == (24, 16, 8)
    with pytest.raises(SystemExit, match="expected NxHxV"):
        tiles.shape_of(text)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [("8192x4096x128256", "persistent_weight_grad_partial"), ("16384x2304x256000", "persistent_weight_grad")],
)
def test_a_row_that_a_shape_does_not_read_is_not_tried(
    shape: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both kernels have one name: the other's time would stand beside the tiles."""
    monkeypatch.setattr(tiles, "why_not", lambda: None)
    monkeypatch.setattr(sys, "argv", ["tiles", "--output", str(tmp_path / "out"), "--shape", shape, "--only", kernel])
    assert tiles.main() == 2
    assert f"expected no {kernel} at {shape}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sums_of_kernels_by_hand() -> None:
    """Microseconds: 3,000 and 1,500 of the library's own, 2,000 of the vendor's, 500 of others; bare products 4,000."""
    times = {"persistent_forward_kernel": 3000.0, "gradient_kernel": 1500.0, "nvjet_a": 1200.0, "nvjet_b": 800.0}
    times["void at::native::add"] = 500.0
    run = {
        "shape": "1x2x3",
        "environment": json.loads((RESULTS / "gpu.json").read_text())["environment"],
        "runs": [
            {"run": "bound", "kernels": {"nvjet_c": 4000.0}},
            {"run": "eager_hf", "kernels": {"nvjet_c": 6000.0}},
            {"run": 0, "kernels": {"workspace": times, "fused": {"gather_kernel": 1000.0}, "routed": {}}},
        ],
    }
    cells = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
        for line in render_kernels.kernels({"now": run}).splitlines()
        if line.startswith("|")
    }
    assert cells["forward"] == ["3.00", "-", "-", "-"]
    assert cells[render_kernels.LIBRARY] == ["2.00", "-", "-", "6.00"]
    assert cells["all others"] == ["0.50", "1.00", "0.00", "0.00"]
    assert cells["sum"] == ["7.00", "1.00", "0.00", "6.00"]
    assert cells["sum over them"] == ["1.75 x", "0.25 x", "0.00 x", "1.50 x"]


def test_methods_without_a_time_have_no_number() -> None:
    report = json.loads((RESULTS / "gpu.json").read_text())
    text = render_gpu.shapes(render_gpu.merged([report]))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    assert "TRL" in text
    for entry in report["shapes"]:
        entry["methods"]["cce"] = {"failed": "not installed"}
    text = render_gpu.shapes(render_gpu.merged([report]))
    assert "CCE, gradients filtered" not in text
    assert "CCE, exact" in text
    assert render_gpu.peaked(render_gpu.merged([report])) == ""


def test_every_run_of_the_benchmark_in_the_results_is_rendered() -> None:
    runs = {path.name for path in RESULTS.glob("gpu*.json") if "shapes" in json.loads(path.read_text())}
    assert runs == set(render_gpu.FILES)
    devices = render_gpu.by_device(RESULTS)
    assert [render_gpu.short(device) for device in devices] == ["H200", "H100"]
    for report in devices.values():
        for mode, table in (("scored", render_gpu.shapes), ("peaked", render_gpu.peaked)):
            head = table(report).splitlines()[0]
            assert all(f"| {entry['shape']} " in head for entry in render_gpu.measured(report, mode))


def _runs(*rows: dict[str, Any], shapes: tuple[str, ...] = ("1 x 2 x 3",), **changes: Any) -> list[dict[str, Any]]:
    """Reports of one device, each with methods of its own at each shape; commits 0, 1, ..."""
    environment = json.loads((RESULTS / "gpu.json").read_text())["environment"]
    return [
        {
            "environment": environment | {"commit": str(commit), "date": f"day {commit}"} | (changes if commit else {}),
            "shapes": [
                {"shape": shape, "mode": "scored", "entropy": 1.0, "methods": dict(methods)} for shape in shapes
            ],
        }
        for commit, methods in enumerate(rows)
    ]


def _row(seconds: float, **others: Any) -> dict[str, Any]:
    return {"seconds": seconds, "over_bound": seconds, "rounds": 5, **others}


def test_of_a_device_s_runs_the_last_that_says_something_counts() -> None:
    first = {"bound": _row(1.0), "workspace": _row(2.0, peak_bytes=2**30), "fused": _row(3.0), "cce": _row(4.0)}
    then = {
        "bound": _row(1.0),
        "workspace": _row(1.5),
        "fused": {"failed": OUT_OF_TIME},
        "cce": {"failed": "out of memory"},
    }
    (entry,) = render_gpu.merged(_runs(first, then))["shapes"]
    rows = entry["methods"]
    assert [(name, rows[name].get("seconds"), rows[name]["run"]["commit"]) for name in rows] == [
        ("bound", 1.0, "1"),
        ("workspace", 1.5, "1"),
        ("fused", 3.0, "0"),
        ("cce", None, "1"),
    ]
    assert (rows["workspace"]["peak_bytes"], rows["workspace"]["peak_commit"]) == (2**30, "0")


def test_a_peak_alone_is_added_to_what_there_is() -> None:
    """Its time stays that of the run before, with its commit; a method without one has no time."""
    first = {"bound": _row(1.0), "workspace": _row(2.0, peak_bytes=2**30), "fused": _row(3.0)}
    then = {name: {"peak_bytes": 2**31} for name in ("workspace", "fused", "routed")}
    (entry,) = render_gpu.merged(_runs(first, then))["shapes"]
    rows = entry["methods"]
    assert [(rows[name]["seconds"], rows[name]["run"]["commit"]) for name in first] == [
        (1.0, "0"),
        (2.0, "0"),
        (3.0, "0"),
    ]
    assert [(rows[name]["peak_bytes"], rows[name]["peak_commit"]) for name in then] == [(2**31, "1")] * 3
    assert "seconds" not in rows["routed"]


@pytest.mark.parametrize(("share", "routed"), [(0.1, 3.0), (0.2, 5.0)])
def test_where_routed_gradients_take_as_long_as_exact_ones(share: float, routed: float) -> None:
    """1 + 20 for each share, and 4 for exact ones; not by times of two runs, nor without one."""
    (entry,) = render_gpu.merged(_runs({"workspace": _row(4.0), "routed": _row(routed)}))["shapes"]
    entry["kept_share"] = share
    forward = _row(1.0, run={"commit": "0"})
    assert render_gpu.break_even(entry, forward) == pytest.approx(0.15)
    assert render_gpu.break_even(entry, forward | {"run": {"commit": "1"}}) is None
    assert render_gpu.break_even(entry, {}) is None
    assert render_gpu.break_even(entry, forward | {"seconds": routed}) is None
    del entry["kept_share"]
    assert render_gpu.break_even(entry, forward) is None


def test_kept_shares_without_some_times() -> None:
    """A method that failed at a share is no number there, nor on the line; `workspace` without a time is on none."""
    (run,) = _runs({"workspace": _row(2.0)}, shapes=(render_gpu.KEPT_SHAPE,))
    run["shapes"][0]["mode"] = "peaked"
    run["extras"] = {"over_kept_share": []}
    for share, routed in ((0.1, _row(1.0)), (0.2, {"failed": OUT_OF_TIME}), (0.5, _row(5.0))):
        methods = {"bound": _row(1.0), "routed": routed, "fused": {"failed": "out of memory"}}
        row = {"entropy": 2.0, "dropped_mass": 0.01, "kept_share": share, "mean_dropped_mass": 0.01, "methods": methods}
        run["extras"]["over_kept_share"].append(row)
    lines = render_gpu.kept(render_gpu.merged([run])).splitlines()
    assert [line.split(" | ")[-2:] for line in lines[2:5]] == [["1.00 x", "- |"], ["-", "- |"], ["5.00 x", "- |"]]
    assert lines[-1].endswith("By a line between neighbours as long as `workspace` (2.00 x) at 20% kept.")
    later = {"environment": run["environment"] | {"commit": "1"}, "shapes": run["shapes"]}
    assert "By a line" not in render_gpu.kept(render_gpu.merged([run, later])), "of another run"
    run["shapes"][0]["methods"] |= {"workspace": {"failed": OUT_OF_TIME}, "eager_hf": _row(2.0)}
    assert "By a line" not in render_gpu.kept(render_gpu.merged([run]))


def test_crossings_by_hand() -> None:
    points = [(0.0, 0.5), (0.1, 0.9), (0.3, 1.3)]
    assert render_gpu.crossing(points, 1.1) == pytest.approx(0.2)
    assert render_gpu.crossing(points, 0.5) == 0.0
    assert render_gpu.crossing(points, 1.3) is None
    assert render_gpu.crossing(points[:1], 0.7) is None


def test_every_figure_of_several_runs_has_its_commit() -> None:
    shapes = ("1 x 2 x 3", "4 x 5 x 6")
    first = {name: _row(2.0) for name in ("bound", "workspace", "fused", "eager_hf")}
    runs = _runs(first, {"workspace": _row(1.5), "fused": {"failed": OUT_OF_TIME}}, shapes=shapes)
    runs[1]["shapes"][1]["methods"]["fused"] = _row(1.7, rounds=3)
    text = render_gpu.shapes(render_gpu.merged(runs))
    assert "| **clha-fast, workspace** | 1500.0 ms, 1.50 x | 1500.0 ms, 1.50 x |" in text
    assert "day 0, commit 0 (commit 1, day 1: clha-fast, workspace; clha-fast, fused at 4 x 5 x 6);" in text
    assert "medians over 5 interleaved rounds (3 or 5 at 4 x 5 x 6)," in text
    # Another driver is said, too.
    runs = _runs(first, {"workspace": _row(1.5)}, gpu="NVIDIA H200, 1.2.3, 700 W")
    assert "(NVIDIA H200, driver 1.2.3, torch" in render_gpu.shapes(render_gpu.merged(runs))


def test_a_first_screen_has_a_shape_on_every_device_and_a_long_one() -> None:
    (first,) = _runs({"bound": _row(1.0), "workspace": _row(2.0, peak_bytes=2**30)})
    (second,) = _runs({"bound": _row(1.0), "eager_hf": {"failed": "out of memory"}}, shapes=("1 x 2 x 3", "9 x 2 x 3"))
    second["environment"]["device"] = "NVIDIA H100 80GB HBM3"
    reports = {run["environment"]["device"]: render_gpu.merged([run]) for run in (first, second)}
    lines = render_gpu.headline(reports, "1 x 2 x 3", "9 x 2 x 3").splitlines()
    head = (
        "| forward + backward of the loss | H200, ms | over the bound | peak above inputs | H100, ms | over the bound |"
    )
    assert lines[0] == head
    assert lines[2] == "| **clha-fast, workspace** | 2000.0 | 2.00 x | 1.0 GiB | - | - |"
    assert lines[-1] == "9 x 2 x 3 on the H100 (5 interleaved rounds, commit 0): eager: out of memory."


@pytest.mark.parametrize("later", [{}, {"over_kept_share": {"failed": OUT_OF_TIME}}, {"over_kept_share": []}])
def test_a_later_run_without_kept_shares_leaves_those_of_the_run_before(later: dict[str, Any]) -> None:
    runs = _runs({"bound": _row(1.0)}, {"bound": _row(1.0)})
    methods = {name: _row(1.0) for name in ("bound", "routed", "fused")}
    row = {"entropy": 2.0, "dropped_mass": 0.01, "kept_share": 0.1, "mean_dropped_mass": 0.01, "methods": methods}
    runs[0]["extras"], runs[1]["extras"] = {"over_kept_share": [row]}, later
    assert "day 0, commit 0." in render_gpu.kept(render_gpu.merged(runs))
    runs[1]["extras"] = {"over_kept_share": [row]}
    assert "day 1, commit 1." in render_gpu.kept(render_gpu.merged(runs))


def test_every_peak_of_a_first_screen_has_its_commit() -> None:
    first = {name: _row(2.0, peak_bytes=2**30) for name in ("workspace", "eager_hf", "cce", "cce_exact")}
    runs = _runs(first, {name: {"peak_bytes": 2**31} for name in ("fused", "workspace")}, shapes=("1 x 2 x 3",))
    runs[0]["shapes"][0]["methods"]["fused"] = _row(3.0)
    text = render_gpu.headline({"NVIDIA H200": render_gpu.merged(runs)}, "1 x 2 x 3", "9 x 2 x 3")
    assert text.endswith(" Peaks: H200, commit 0 (commit 1: clha-fast, workspace; clha-fast, fused).")


def test_a_whole_step_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways run, what they wrote is marked as a dry run, and the table has a row for each."""
    monkeypatch.setattr(sys, "argv", ["step", "--output", str(tmp_path), "--tiny", "--rounds", "1"])
    assert step.main() == 0
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["dry_run"]
    assert report["shared_tokens"] < report["padded_tokens"]
    assert set(report["ways"]) == set(step.WAYS) == set(render_kernels.WAYS)
    assert all("seconds" in row for row in report["ways"].values())


def _report() -> dict[str, Any]:
    methods = {"bound": {"seconds": 0.035}, "fused": {"seconds": 0.05, "over_bound": 1.4}}
    entry = {"shape": SHAPES[0].name, "mode": "scored", "entropy": 11.7, "methods": methods}
    return {"dry_run": False, "environment": {"device": "NVIDIA H200"}, "shapes": [entry], "extras": {}}


@pytest.mark.parametrize("name", [*EXTRAS, "memory_over_tokens"])
def test_an_extra_that_failed_is_drawn_as_none(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each alone, whichever pictures come of it: the others are drawn."""
    drawn: list[str] = []
    monkeypatch.setattr(report_files, "_draw", lambda path, *_: drawn.append(path.name))
    methods = {"fused": {"seconds": 0.05}, "workspace": {"failed": OUT_OF_TIME}}
    report = _report()
    report["extras"] = {
        "over_candidates": [{"candidates": 2, "methods": methods}],
        "over_kept_share": [{"kept_share": 0.1, "methods": methods}],
        "memory_over_tokens": [{"method": "fused", "tokens": 1024, "peak_bytes": 2**30}, {"failed": OUT_OF_TIME}],
    }
    assert (report_files.plots(report, tmp_path), len(drawn)) == (drawn, 4)
    made_of = {"over_candidates": 1, "over_kept_share": 1, "memory_over_tokens": 1}
    report["extras"][name] = {"failed": OUT_OF_TIME}
    assert len(report_files.plots(report, tmp_path)) == 4 - made_of.get(name, 0)
    assert capsys.readouterr().err == ""


def test_a_picture_that_fails_costs_neither_figures_nor_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run("cpu", tmp_path, 60)
    run.report |= _report() | {"extras": {"over_candidates": [{"methods": {"fused": {"seconds": 1.0}}}]}}
    for name in ("correct", "peers", "speed", "memory", "memory_over_tokens", "extra"):
        monkeypatch.setattr(run, name, lambda *_, **__: None)

    def broken(path: Path, *_: object) -> None:
        raise OSError(f"{path.name}: no space\nleft")

    run.report["shapes"][0]["methods"]["eager_hf"] = {"failed": OUT_OF_TIME}
    monkeypatch.setattr(report_files, "_draw", broken)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert run.stages(("shapes",)) == 3
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "benchmarks.gpu: not drawn: gpu_time.png (OSError: gpu_time.png: no space), gpu_candidates.png (KeyError: "
        "'candidates'); the figures are saved"
    )
    assert said[-1] == "benchmarks.gpu: next: python -m benchmarks.gpu --resume"
    assert json.loads(run.file.read_text())["plots"] == []

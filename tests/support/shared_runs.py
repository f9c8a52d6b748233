"""What `test_shared_runs` starts in several processes: commands that share a file out; no test.

`python -m tests.support.shared_runs all FOLDER` runs what is there with the processes of the launcher, and then in the
first one alone. `... generate|score FOLDER OUT [failing]` is one slow resumable run into OUT; `failing`: the second
process is soon out of memory, and the first is too slow to notice.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from clha_fast.cli import main as cli
from clha_fast.cli.guard import guarded
from clha_fast.data import read_records
from clha_fast.generation import GenerationSettings, generate_answers, load_backend
from clha_fast.processes import ALONE, Processes, join
from clha_fast.rewards.scoring import load_reward_model, score_file

SHORT = ["--max-new-tokens", "6", "--device", "cpu"]
COMMANDS: dict[str, list[str]] = {
    "greedy": ["generate", "{0}/model", "{0}/in.jsonl", "{1}", *SHORT, "--batch-size", "2"],
    "drawn": ["generate", "{0}/model", "{0}/in.jsonl", "{1}", *SHORT, "--batch-size", "3", "--temperature", "1"],
    "one batch": ["generate", "{0}/model", "{0}/in.jsonl", "{1}", *SHORT, "--limit", "2"],
    "rewards": ["score", "{0}/in.jsonl", "{1}", "--reward-model", "{0}/reward", "--batch-size", "4", "--device", "cpu"],
    "logps": ["score", "{0}/in.jsonl", "{1}", "--policy", "{0}/model", "--batch-size", "4", "--device", "cpu"],
    "ranked": ["rank", "{0}/model", "{0}/in.jsonl", "{1}", "--batch-size", "4", "--device", "cpu"],
}
REFUSED: dict[str, list[str]] = {
    "exists already": ["generate", "{0}/model", "{0}/in.jsonl", "{0}/in.jsonl"],
    "--top-pp": ["generate", "{0}/model", "{0}/in.jsonl", "{0}/no", "--top-pp", "3"],
    "--batch-size": ["score", "{0}/in.jsonl", "{0}/no", "--policy", "{0}/model", "--batch-size", "0"],
}


def command(words: list[str], folder: str, out: Path | str = "") -> int:
    try:
        return cli.main([word.format(folder, out) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def run_all(folder: str) -> None:
    processes = join()
    statuses = [command(words, folder, Path(folder) / f"{name}.shared") for name, words in COMMANDS.items()]
    statuses += [command(words, folder) for words in REFUSED.values()]
    found: dict[str, Any] = {"statuses": statuses, "left": [path.name for path in Path(folder).glob("*partial*")]}
    try:
        records, backend = read_records(f"{folder}/in.jsonl"), load_backend(f"{folder}/model", device="cpu")
        batch_size = 2 + processes.rank
        generate_answers(records, backend, f"{folder}/no", batch_size=batch_size, progress=False, processes=processes)
    except ValueError as error:
        found["other run"] = str(error)
    Path(folder, f"found-{processes.rank}.json").write_text(json.dumps(found))
    if not processes.rank:
        for name, words in COMMANDS.items():
            run_alone(words, folder, Path(folder) / f"{name}.alone")


def run_alone(words: list[str], folder: str, out: Path) -> None:
    """The same by one process of the same kind: as many threads of torch, too."""
    import clha_fast.processes as module

    before, module._joined = module._joined, Processes(world=1)
    try:
        assert command(words, folder, out) == 0
    finally:
        module._joined = before


def run_slowly(kind: str, folder: str, out: str, failing: bool) -> int:
    processes = join()
    calls = []

    def wait(*_: Any) -> None:
        calls.append(1)
        if failing and processes.rank and len(calls) > 14:
            raise torch.OutOfMemoryError("none left")
        time.sleep(1000 if failing and not processes.rank and len(calls) > 14 else 0.04)

    records, options = read_records(f"{folder}/in.jsonl"), {"batch_size": 2, "resume": True, "processes": processes}
    if kind == "generate":
        backend = load_backend(f"{folder}/model", device="cpu")
        backend.model.register_forward_hook(wait)
        settings = GenerationSettings(max_new_tokens=6, temperature=1.0)
        generate_answers(records, backend, out, settings, **options)
    else:
        reward_model = load_reward_model(f"{folder}/reward", device="cpu")
        reward_model.model.register_forward_hook(wait)
        score_file(records, out, reward_model, **options)
    return 0


if __name__ == "__main__":
    assert join() is not ALONE
    if sys.argv[1] == "all":
        run_all(sys.argv[2])
    else:
        given = sys.argv[1:]
        sys.exit(guarded(given[0], lambda: run_slowly(given[0], given[1], given[2], "failing" in given)))

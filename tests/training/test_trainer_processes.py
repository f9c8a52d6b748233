"""CLHATrainer in two processes under every wrapper that runs on a CPU: the same run as in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clha_fast.training.config import CLHAConfig
from clha_fast.training.reward_trainer import RewardConfig
from clha_fast.training.samples import SAMPLES_FILE
from tests.support import forked
from tests.support.helpers import ROOT
from tests.support.tiny import make_model, make_rows, make_tokenizer
from tests.support.trainers import trainer
from tests.support.versions import needs, older

TORCHRUN = ["torch.distributed.run", "--standalone"]
# With --cpu it starts one process, whatever --num_processes says; the script itself asks for the CPU.
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0"]
CLOSE = 1e-5


def start(wrapper: str, folder: Path, processes: int, launcher: list[str] | None = None, **env: str) -> dict[str, Any]:
    """By a launcher, or else with the environment alone that one gives its processes."""
    out = folder / f"{wrapper}-{processes}.pt"
    program = ["tests.support.two_processes", wrapper, str(folder / wrapper), str(out)]
    cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", **env}
    if launcher is None:
        done: Any = forked.run("train", *program, processes=processes, **cpu)
    else:
        count = "--num_processes" if launcher is LAUNCH else "--nproc_per_node"
        command = [sys.executable, "-W", "ignore", "-m", *launcher, count, str(processes), "-m", *program]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, **cpu}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = torch.load(out)
    lines = (folder / wrapper / SAMPLES_FILE).read_text("utf-8").splitlines()
    result["samples"] = [line for line in map(json.loads, lines) if line["step"] == 4]
    assert result["samples"], "of the end of the training that has come before the resumed one"
    return result


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return start("ddp", tmp_path_factory.mktemp("alone"), 1)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] - other[name]).double().norm()) ** 2 for name in one) ** 0.5


def check(two: dict[str, Any], one: dict[str, Any]) -> None:
    begin = make_model(len(make_tokenizer()), tie_word_embeddings=False).state_dict()
    moved = distance(one["weights"], begin)
    assert moved > 0.1
    assert two["weights"].keys() == one["weights"].keys()
    assert distance(two["weights"], one["weights"]) < CLOSE * moved
    for name in one["weights"]:  # nothing was left where it began
        assert not torch.equal(two["weights"][name], begin[name]), name
    for name, value in one["eval"].items():
        assert two["eval"][name] == pytest.approx(value, rel=CLOSE, abs=1e-6), name
    assert two["logs"] == [pytest.approx(line, rel=CLOSE, abs=1e-6) for line in one["logs"]]
    assert two["samples"] == one["samples"]
    assert len(two["samples"]) == 2
    if "resumed" in two:
        for name, tensor in two["weights"].items():
            assert torch.equal(two["resumed"][name], tensor), name
        assert {"checkpoint-2", "checkpoint-4"} <= set(two["files"])
    assert not {".writing", "README.md.partial"} & set(two["files"])
    assert "README.md" in two["files"]


def test_fsdp2_by_fsdp_true(alone: dict[str, Any], tmp_path: Path) -> None:
    """accelerate's road; one list of devices that it keeps had to be told that processes on CPUs will do."""
    needs("accelerate", "1.6", "knows no FSDP2")
    two = start("fsdp", tmp_path, 2)
    assert two["model"] == "FSDPLlamaForCausalLM"
    assert two["sharded"]
    assert "resumed" in two
    check(two, alone)


@pytest.mark.skipif(not older("accelerate", "1.6"), reason="this accelerate knows FSDP2")
@pytest.mark.parametrize("asked", [{"fsdp": True}, {"fsdp": "full_shard"}, {}], ids=["true", "words", "environment"])
def test_fsdp2_needs_a_newer_accelerate(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not asked:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"^fsdp: expected accelerate 1\.6 or newer, which knows FSDP2, got 1\."):
        trainer(tmp_path, **asked)


@pytest.mark.slow
def test_fsdp2_sharded_checkpoints(alone: dict[str, Any], tmp_path: Path) -> None:
    needs("accelerate", "1.6", "knows no FSDP2")
    two = start("fsdp-sharded", tmp_path, 2)
    check(two, alone)
    assert "model.safetensors" in two["files"], "the final model is whole all the same"
    assert {"pytorch_model_fsdp_0", "tokenizer.json", "config.json"} <= set(
        os.listdir(tmp_path / "fsdp-sharded" / "checkpoint-4")
    )


@pytest.mark.slow
def test_fsdp2_by_an_accelerate_configuration(alone: dict[str, Any], tmp_path: Path) -> None:
    """The environment that `accelerate launch --config_file examples/fsdp2.yaml` gives its processes."""
    needs("accelerate", "1.6", "knows no FSDP2")
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = str(ROOT / "examples" / "fsdp2.yaml")
    assert load_config_from_file(file).distributed_type == "FSDP"
    arguments = launch_command_parser().parse_args(["--config_file", file, "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    given = {k: v for k, v in prepare_multi_gpu_env(arguments).items() if k.startswith(("FSDP", "ACCELERATE"))}
    assert given["FSDP_VERSION"] == "2"
    two = start("fsdp-environment", tmp_path, 2, **{**given, "ACCELERATE_MIXED_PRECISION": "no"})
    assert two["model"] == "FSDPLlamaForCausalLM"
    check(two, alone)


@pytest.mark.slow
def test_fsdp2_by_transformers(alone: dict[str, Any], tmp_path: Path) -> None:
    needs("transformers", "5.13", "shards no model as it is loaded")
    two = start("native", tmp_path, 2)
    assert two["sharded"]
    check(two, alone)


@pytest.mark.slow
def test_tensor_parallel_head(alone: dict[str, Any], tmp_path: Path) -> None:
    needs("transformers", "5.13", "shards no model as it is loaded")
    two = start("tp", tmp_path, 2)
    assert two["sharded"]
    check(two, alone)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "native", "tp", "zero3"])
def test_shared_rows(alone: dict[str, Any], tmp_path: Path, wrapper: str) -> None:
    """The run of one process with padded rows."""
    if wrapper == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    if wrapper in ("native", "tp"):
        needs("transformers", "5.13", "shards no model as it is loaded")
    if wrapper == "fsdp":
        needs("accelerate", "1.6", "knows no FSDP2")
    check(start(wrapper, tmp_path, 2, ROW_LAYOUT="shared"), alone)


@pytest.mark.slow
def test_an_objective_that_compares_with_a_copy(tmp_path: Path) -> None:
    one, two = start("compare", tmp_path, 1), start("compare", tmp_path, 2)
    assert two["model"] == "DistributedDataParallel"
    check(two, one)
    assert two["said"].startswith("reference: expected 'file' under a model that is spread over processes (DTensor we")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, LAUNCH], ids=["torchrun", "accelerate launch"])
def test_ddp(alone: dict[str, Any], tmp_path: Path, launcher: list[str]) -> None:
    two = start("ddp", tmp_path, 2, launcher)
    assert two["model"] == "DistributedDataParallel"
    check(two, alone)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("wrapper", ["zero2", "zero3", "zero3-loaded"])
def test_deepspeed(alone: dict[str, Any], tmp_path: Path, wrapper: str) -> None:
    """examples/zero3.json, also with a model that is taken apart as it is loaded, and the same at stage 2."""
    two = start(wrapper, tmp_path, 2)
    assert two["model"] == "DeepSpeedEngine"
    assert "model.safetensors" in two["files"]
    check(two, alone)


@pytest.mark.slow
def test_what_a_cpu_cannot_do_is_said(tmp_path: Path) -> None:
    """Not DDP in FSDP's stead, nor DTensor weights in DDP."""
    script = tmp_path / "refused.py"
    script.write_text(REFUSED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", *TORCHRUN, "--nproc_per_node", "2", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    early, first, second = json.loads((tmp_path / "messages.json").read_text())
    assert early.startswith("evaluate: expected a model that training has begun to shard")
    assert first.startswith("fsdp: expected processes with an accelerator each")
    assert second.startswith("model: expected one that is whole, or sharded by from_pretrained")


REFUSED = """
import json, os, sys
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.support import two_processes
from clha_fast.training.config import CLHAConfig
from clha_fast.training.trainer import CLHATrainer

messages = []
trainer = two_processes.make("fsdp", sys.argv[1])
try:
    trainer.evaluate()
except ValueError as error:
    messages.append(str(error))
os.environ.pop("ACCELERATE_USE_FSDP")  # accelerate's own mark
for fsdp in (True, None):
    args = CLHAConfig(**{**two_processes.settings("ddp", sys.argv[1], 2), "fsdp": fsdp})
    model = two_processes.build("ddp", sys.argv[1])
    if not fsdp:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        CLHATrainer(model, args, train_dataset=two_processes.make_rows(4), processing_class=two_processes.TOKENIZER)
    except ValueError as error:
        messages.append(str(error))
if dist.get_rank() == 0:
    with open(sys.argv[1] + "/messages.json", "w") as file:
        json.dump(messages, file)
dist.barrier()
"""


SILENT = """
import os, sys
import torch.distributed as dist
from torch.utils.data import IterableDataset
from tests.support import two_processes
from clha_fast.training.config import CLHAConfig
from clha_fast.training.trainer import CLHATrainer

class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows)

rank = int(os.environ["RANK"])
inert = {"prompt": "say: ", "completions": ["a cat", "a dog"], "rewards": [-1.0, -2.0]}
good = {"prompt": "say: ", "completions": ["a cat", "a dog"], "rewards": [5.0, -2.0]}
for rows in ([inert, good] * 6, [inert] * 12):
    args = CLHAConfig(
        output_dir=sys.argv[1], max_steps=3, per_device_train_batch_size=1, logging_steps=1, save_strategy="no",
        disable_tqdm=True, report_to="none", use_cpu=True, ddp_backend="gloo", train_sampling_strategy="sequential",
    )
    model = two_processes.make_model(len(two_processes.TOKENIZER))
    print("begins", rank, file=sys.stderr, flush=True)
    CLHATrainer(model, args, train_dataset=Stream(), processing_class=two_processes.TOKENIZER).train()
dist.barrier()
sys.stderr.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_one_process_without_effect_is_not_all_of_them(tmp_path: Path) -> None:
    """The first process's prompts are inert, the second's are not; then all are."""
    script = tmp_path / "silent.py"
    script.write_text(SILENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", *TORCHRUN, "--nproc_per_node", "2", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said, begun = "the loss has depended on no response so far", "begins 0"
    assert done.stderr.count(begun) == 2
    assert said not in done.stderr[: done.stderr.rindex(begun)]
    assert said in done.stderr[done.stderr.rindex(begun) :]


COMMAND = """
import sys
import torch
from accelerate import DistributedType, PartialState
from clha_fast.cli import main as cli
from clha_fast.experiments import run
from clha_fast.training.config import CLHAConfig

class OnCpus(CLHAConfig):
    def __post_init__(self):
        super().__post_init__()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

if "--fsdp" in sys.argv:
    run.Run.config_class = OnCpus
torch.set_num_threads(1)
status = cli.main(sys.argv[1:])
torch.distributed.barrier()
sys.stdout.flush()
sys.stderr.flush()
__import__("os")._exit(status)
"""


@pytest.mark.slow
def test_command_line_in_two_processes(tmp_path: Path) -> None:
    """`clha-fast train` by itself, under DDP and under FSDP2: the same held-out metrics before and after."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    rows = "".join(json.dumps(row) + "\n" for row in make_rows(40))
    (tmp_path / "train.jsonl").write_text(rows)
    flags = "--max_steps 4 --normalizer global --logging_steps 2 --eval_samples 1 --plot false --learning_rate 1e-2"
    flags += " --optim sgd --lr_scheduler_type constant --build_tokenizer.vocab_size 300 --use_cpu true --save_steps 2"
    flags += " --ddp_backend gloo --model_config.model_type llama --model_config.hidden_size 32 --eval_fraction 0.3"
    flags += " --model_config.intermediate_size 32 --model_config.num_attention_heads 2"
    flags += " --model_config.num_hidden_layers 1 --model_config.tie_word_embeddings false --overwrite"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = []
    for processes, more in ((1, []), (2, []), (2, ["--fsdp", "true"])):
        folder = tmp_path / f"run-{len(found)}"
        command = [sys.executable, "-W", "ignore", "-m", *TORCHRUN, "--nproc_per_node", str(processes), str(script)]
        command += ["train", *flags.split(), "--train_file", str(tmp_path / "train.jsonl"), *more]
        command += ["--output_dir", str(folder), "--per_device_train_batch_size", str(4 // processes)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("ranking accuracy (kept pairs)") == 1, "one process prints"
        assert (folder / "model.safetensors").exists()
        found.append(json.loads((folder / "metrics.json").read_text()))
    for other in found[1:]:
        for part in ("before", "after"):
            for name in ("eval_rewards/accuracies", "eval_rewards/margins", "eval_kendall_tau", "eval_num_tokens"):
                assert other[part][name] == pytest.approx(found[0][part][name], rel=1e-4, abs=1e-6), (part, name)
    assert found[0]["before"]["eval_rewards/margins"] != found[0]["after"]["eval_rewards/margins"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is found by every process")
@pytest.mark.parametrize("config", [CLHAConfig, RewardConfig])
def test_processes_that_take_themselves_for_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: type
) -> None:
    # It also leaves its own variables in the environment, which every later test would take for a launcher's.
    needs("accelerate", "1.13", "has processes on CPUs find each other without use_cpu")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"use_cpu: expected True where torchrun starts 3 processes .* got False"):
        config(output_dir=str(tmp_path), report_to=[])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # a cluster's variable alone says nothing
    config(output_dir=str(tmp_path), report_to=[])

"""131,072 scored tokens in one step on one GPU: an 8B model, LoRA, shared rows, tiled MLPs, checkpoints in host memory.

    python examples/long_131072.py --model FOLDER
    python examples/long_131072.py --model FOLDER --plan           # what it would need, and nothing else
    python examples/long_131072.py --model FOLDER --candidates 4 --prompt 8192 --response 8192

One prompt of 16,384 tokens with 8 responses of 16,384 tokens each, drawn at random: it shows what fits and how long it
takes, and teaches nothing. The plan is printed first; where it does not fit the device, nothing is loaded. On a CPU
checkpoints stay where they are.
"""

import argparse
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import clha_fast
from clha_fast.batching.batch import pack_candidates
from clha_fast.models.adapters import import_peft
from clha_fast.planning.plan import GIB, Load, plan, table
from clha_fast.planning.step import Switches


def main(given: argparse.Namespace) -> int:
    load = Load(1, given.candidates, given.prompt, given.response, "shared")
    cuda = given.device.startswith("cuda")
    dtype = getattr(torch, given.dtype)
    memory = given.memory
    if memory is None and cuda:
        memory = torch.cuda.get_device_properties(given.device).total_memory / GIB
    switches = Switches(
        dtype=dtype,
        lora_rank=given.lora_rank,
        tiled_mlp=True,
        offload=cuda,
        backend="auto" if cuda else "torch",
        memory=None if memory is None else int(memory * GIB),
    )
    config = AutoConfig.from_pretrained(given.model)
    planned = plan(config, load, switches)
    rows = load.rows
    print(
        f"{given.model}: {planned.parameters:,} weights, {planned.trained:,} train; {rows.scored:,} scored tokens, "
        f"{rows.width:,} run\n{table(planned)}",
        flush=True,
    )
    total = planned.memory.total / GIB
    if memory is not None and total > memory:
        print(
            f"--memory: expected at least the plan's {total:.2f} GiB, got {memory:.2f} GiB; fewer --candidates, or a "
            "shorter --prompt or --response, need less",
            file=sys.stderr,
        )
        return 2
    if given.plan:
        return 0

    peft = import_peft()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).to(given.device)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=given.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    options = clha_fast.CLHAOptions.preset("published")
    attached = clha_fast.attach(model, options, layout="shared", tiled_mlp=True)
    attached.model.activation_checkpointing_enable(**({"offload": True} if cuda else {}))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.learning_rate)

    texts = torch.randint(10, config.get_text_config().vocab_size, (given.prompt + rows.scored,)).tolist()
    responses = [texts[start : start + given.response] for start in range(given.prompt, len(texts), given.response)]
    feature = {
        "prompt_ids": texts[: given.prompt],
        "completion_ids": responses,
        "rewards": [10.0 * k for k in reversed(range(given.candidates))],
        "sft_index": 0,
        "source": "random",
    }
    batch = pack_candidates([feature], pad_token_id=0, objective=options, drop_inert=False, layout="shared")
    fields = batch.to(given.device).as_dict()
    for step in range(given.steps):
        if cuda:
            torch.cuda.reset_peak_memory_stats(given.device)
        start = time.perf_counter()
        loss = model(**fields).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()  # waits for the device
        seconds = time.perf_counter() - start
        peak = f"{torch.cuda.max_memory_allocated(given.device) / GIB:.2f} GiB" if cuda else "not measured on a CPU"
        # The first step also compares its responses with each alone, and compiles kernels.
        print(
            f"step {step} loss {value:.4f}, {seconds:.1f} s, {rows.scored / seconds:,.0f} scored tokens/s, peak {peak} "
            f"(planned {total:.2f} GiB)",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model's folder or name")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16384, help="tokens")
    parser.add_argument("--response", type=int, default=16384, help="tokens of each response")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", type=float, help="GiB of the device; default what it has, no limit on a CPU")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    sys.exit(main(parser.parse_args()))

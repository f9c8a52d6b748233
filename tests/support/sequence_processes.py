"""What `test_sequence_parallel` starts in two processes: rows whose tokens are spread, and whole ones alone; no test.

`torchrun ... -m tests.support.sequence_processes CASES` fails where losses, metrics or gradients differ, or where what
has to be refused is not.
"""

from __future__ import annotations

import copy
import importlib
import io
import os
import random
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

import clha_fast
from clha_fast.batching.batch import pack_candidates
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.layout_probe import candidates_of, pack
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.objectives.dpo import DPOOptions
from clha_fast.objectives.policy import PolicyOptions
from clha_fast.objectives.sft import SFTOptions
from clha_fast.planning.live import LiveMemory
from tests.support.architecture_configs import shrink
from tests.support.architectures import build
from tests.support.layouts import texts
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
# Norms and rotations of most models are computed in float32, whatever the weights: a last bit there. GPT-2's are not.
FLOAT32, EXACT = 1e-5, 1e-11


def of_kind(kind: str, implementation: str = "sdpa", **changes: Any) -> nn.Module:
    config = shrink(kind, False)
    for name, value in {"output_router_logits": False, **changes}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = build(config)
    model.set_attn_implementation(implementation)
    if hasattr(model, "set_experts_implementation"):  # others have no float64
        model.set_experts_implementation("eager")
    return model.double()


def llama(**changes: Any) -> nn.Module:
    return make_model(len(TOKENIZER), **changes).double()


def gpt2(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
    none = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **none, **changes}, bos_token_id=0, eos_token_id=1)).double()


def collate(layout: str, count: int = 3, start: int = 0, **settings: Any) -> dict[str, Any]:
    return RankedCollator(TOKENIZER, layout=layout, **settings)(make_rows(start + count)[start:])


def drawn(layout: str, **settings: Any) -> dict[str, Any]:
    del settings
    return pack(texts(), layout).as_dict()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mean(found: dict[str, Tensor]) -> dict[str, Tensor]:
    for gradient in found.values():
        dist.all_reduce(gradient)
    return {name: gradient / dist.get_world_size() for name, gradient in found.items()}


def differ(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def same(model: nn.Module, other: nn.Module, outputs: tuple[Any, Any], far: float, averaged: bool = False) -> None:
    """Losses, metrics, scores, and the mean of the gradients, against one process's."""
    got, expected = outputs
    assert abs(got.loss.item() - expected.loss.item()) <= far * max(1.0, abs(expected.loss.item())), (
        got.loss,
        expected.loss,
    )
    torch.testing.assert_close(got.metrics.values, expected.metrics.values, rtol=10 * far, atol=10 * far)
    torch.testing.assert_close(got.scores, expected.scores, rtol=10 * far, atol=10 * far)
    ours, theirs = gradients(model), gradients(other)
    ours = ours if averaged else mean(ours)
    assert set(ours) == set(theirs)
    whole = torch.cat([g.flatten() for g in theirs.values()])
    assert float(whole.norm()) > 0
    found = torch.cat([ours[name].flatten() for name in theirs])
    assert differ(found, whole) <= far, differ(found, whole)
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 10 * far * float(whole.norm()), name


def equal(
    make: Callable[[], nn.Module],
    layout: str,
    objective: Any = None,
    batch: Callable[..., dict[str, Any]] = collate,
    far: float = FLOAT32,
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: {},
    before: Callable[[nn.Module], None] = lambda model: None,
    **settings: Any,
) -> None:
    objective = objective or clha_fast.CLHAOptions()
    model, other = make().train(), make().train()
    before(model), before(other)
    given = batch(layout, options=objective, **settings)
    given |= more(given)
    alone = clha_fast.attach(other, objective, layout=layout)
    spread = clha_fast.attach(model, objective, layout=layout, sequence_parallel=dist.group.WORLD)
    assert spread.layout == alone.layout == layout
    outputs = model(**given), other(**given)
    for output in outputs:
        output.loss.backward()
    same(model, other, outputs, far)
    logps = spread.token_logps(given), alone.token_logps(given)
    torch.testing.assert_close(*logps, rtol=10 * far, atol=10 * far)


def references(batch: dict[str, Any]) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return {"reference_logps": -8 * torch.rand(len(batch["targets"]), generator=draw)}


def signals(batch: dict[str, Any]) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return {
        "old_logps": -6 * torch.rand(len(batch["targets"]), generator=draw),
        "advantages": torch.randn(len(batch["candidate_lengths"]), generator=draw),
    }


def checkpointed(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def ddp() -> None:
    """Wrapped afterwards: DDP's mean is the gradient of one process; in two micro-batches with a step's counts."""
    model, other = llama(), llama()
    attached = clha_fast.attach(model, layout="shared", sequence_parallel=dist.group.WORLD)
    alone = clha_fast.attach(other, layout="shared")
    wrapped = DistributedDataParallel(model)
    batches = [collate("shared"), collate("shared", start=3)]
    counts = attached.counts(batches), alone.counts(batches, group=dist.new_subgroups(1)[0])
    for number, batch in enumerate(batches):
        context = wrapped.no_sync() if number == 0 else torch.enable_grad()
        with context:
            outputs = wrapped(**batch, **counts[0]), other(**batch, **counts[1])
            for output in outputs:
                (output.loss / len(batches)).backward()
    same(model, other, outputs, FLOAT32, averaged=True)


def fsdp2() -> None:
    """Weights in parts, once it is attached; its mean is the gradient of one process."""
    model, other = llama(tie_word_embeddings=False), llama(tie_word_embeddings=False)
    clha_fast.attach(model, layout="shared", sequence_parallel=dist.group.WORLD)
    clha_fast.attach(other, layout="shared")
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)
    outputs = model(**collate("shared")), other(**collate("shared"))
    for output in outputs:
        output.loss.backward()
    for parameter in model.parameters():
        parameter.grad = parameter.grad.full_tensor()  # type: ignore[union-attr]
    same(model, other, outputs, FLOAT32, averaged=True)


def lora(model: nn.Module) -> None:
    peft = importlib.import_module("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def two_groups() -> None:
    """Four processes, two for each of two batches: with DDP over all, the gradient of both batches in one process."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    model, other = llama(), llama()
    attached = clha_fast.attach(model, layout="shared", sequence_parallel=groups[mine])
    alone = clha_fast.attach(other, layout="shared")
    wrapped = DistributedDataParallel(model)
    batches = [collate("shared"), collate("shared", count=2, start=3)]
    counts = attached.counts([batches[mine]])
    whole = alone.counts(batches, group=dist.new_subgroups(1)[0], losses=1)
    wrapped(**batches[mine], **counts).loss.backward()
    for batch in batches:
        other(**batch, **whole).loss.backward()
    ours, theirs = gradients(model), gradients(other)
    found = torch.cat([ours[name].flatten() for name in theirs])
    assert differ(found, torch.cat([g.flatten() for g in theirs.values()])) <= FLOAT32


def memory() -> None:
    """Of a long row each process keeps about half: tensors alive in a step, above weights and gradients."""
    sizes = {"max_position_embeddings": 2048, "tie_word_embeddings": False}
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (1024,), generator=draw).tolist()
    features = [candidates_of(ids[:512], [ids[512:704], ids[704:]])]
    peaks = []
    for group in (dist.group.WORLD, None):
        model = make_model(len(TOKENIZER), **sizes)
        clha_fast.attach(model, SFTOptions(), layout="shared", sequence_parallel=group)
        batch = pack(features, "shared").as_dict()
        model(**batch).loss.backward()
        live = LiveMemory()
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        live.known(*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *tensors)
        with live:
            model(**batch).loss.backward()
        peaks.append(live.peak)
    assert peaks[0] < 0.6 * peaks[1], peaks
    if dist.get_rank() == 0:
        print(f"tensors alive at the peak, two processes over one: {peaks[0] / peaks[1]:.2f}", flush=True)


def bfloat16() -> None:
    model, other = llama().bfloat16(), llama().bfloat16()
    clha_fast.attach(model, layout="shared", sequence_parallel=dist.group.WORLD)
    clha_fast.attach(other, layout="shared")
    outputs = model(**collate("shared")), other(**collate("shared"))
    for output in outputs:
        output.loss.backward()
    assert abs(outputs[0].loss.item() - outputs[1].loss.item()) <= 0.02 * abs(outputs[1].loss.item())
    ours, theirs = mean(gradients(model)), gradients(other)
    whole = torch.cat([g.flatten().double() for g in theirs.values()])
    found = torch.cat([ours[name].flatten().double() for name in theirs])
    assert differ(found, whole) <= 0.05, differ(found, whole)


def no_prompts() -> None:
    """A batch without a prompt: 0, and zeros where gradients are."""
    from clha_fast.models.attach import empty_batch

    model = llama()
    clha_fast.attach(model, sequence_parallel=dist.group.WORLD)
    loss = model(**empty_batch().as_dict()).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def longer() -> None:
    """Positions that are wrong in long slices alone: met by the first batch that has them, on both processes."""
    from tests.support.sequence_runs import misplace

    ids = torch.randint(3, 250, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    for layout in ("padded", "packed", "shared"):
        model = llama(max_position_embeddings=1024)
        misplace(model, 150)
        attached = clha_fast.attach(model, SFTOptions(), layout=layout, sequence_parallel=dist.group.WORLD)
        short = pack([candidates_of(ids[:30], [ids[30:50], ids[50:60]])], layout).as_dict()
        model(**short).loss.backward()
        batch = pack([candidates_of(ids[:300], [ids[300:340], ids[340:]])], layout).as_dict()
        refused("sequence_parallel: layout: expected a model that computes", lambda: model(**batch))  # noqa: B023
        refused("sequence_parallel: layout: expected a model that computes", lambda: attached.token_logps(batch))  # noqa: B023
    # Where one process alone finds it, the other is not left waiting.
    model = llama(max_position_embeddings=1024)
    probe = clha_fast.attach(model, layout="shared", sequence_parallel=dist.group.WORLD)._layouts._probe
    compare = probe.compare

    def planted(*args: Any, **kwargs: Any) -> None:
        compare(*args, **kwargs)
        if dist.get_rank() == 0:
            raise UnsupportedLayoutError("planted")

    probe.compare = planted  # type: ignore[method-assign]
    refused(("planted", "another of its processes has refused it")[dist.get_rank()], lambda: model(**batch))

    def too_large(*args: Any, **kwargs: Any) -> None:
        compare(*args, **kwargs)
        if dist.get_rank() == 0:
            raise torch.OutOfMemoryError("planted")

    probe.compare = too_large  # type: ignore[method-assign]
    assert torch.isfinite(model(**batch).loss)  # not compared, which is said
    # Right ones are compared, and run.
    model = llama(max_position_embeddings=1024)
    attached = clha_fast.attach(model, SFTOptions(), layout="shared", sequence_parallel=dist.group.WORLD)
    model(**batch).loss.backward()
    assert attached._layouts._seen == {"joined": (360, 400), "padded": (0, 0)}


def fuzz() -> None:
    """Ragged prompts of any layout and shape, inert candidates among them, against padded rows in one process."""
    draw = random.Random(int(os.environ.get("FUZZ_SEED", "0")))
    model, other = gpt2(n_positions=160), gpt2(n_positions=160)
    spread = clha_fast.attach(model, layout="shared", sequence_parallel=dist.group.WORLD)
    alone = clha_fast.attach(other)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(3, 250) for _ in range(draw.randint(1, most))]

    for number in range(int(os.environ.get("FUZZ_DRAWS", "10"))):
        features = []
        for _ in range(draw.randint(1, 4)):
            size = draw.randint(1, 5)
            own = candidates_of(tokens(draw.choice((1, 5, 60))), [tokens(draw.choice((1, 4, 30))) for _ in range(size)])
            rewards = sorted((draw.choice((-2.0, 0.0, 1.0, draw.gauss(0, 3))) for _ in range(size)), reverse=True)
            features.append({**own, "rewards": rewards, "sft_index": draw.randrange(size)})
        settings = {"pad_token_id": 2, "drop_inert": draw.random() < 0.7}
        layout = ("padded", "packed", "shared")[number % 3]
        multiple = draw.choice((None, None, 8, 32))
        spread_batch = pack_candidates(features, layout=layout, pad_to_multiple_of=multiple, **settings).as_dict()
        batch = pack_candidates(features, **settings).as_dict()
        model.zero_grad(), other.zero_grad()
        outputs = model(**spread_batch), other(**batch)
        for output in outputs:
            output.loss.backward()
        if sum(float(p.grad.norm()) for p in other.parameters()) > 0:
            same(model, other, outputs, EXACT)
        else:
            assert not any(gradient.any() for gradient in gradients(model).values())
        with torch.no_grad():
            torch.testing.assert_close(
                spread.token_logps(spread_batch), alone.token_logps(batch), rtol=10 * EXACT, atol=10 * EXACT
            )


def refused(what: str, call: Callable[[], Any], kind: type[Exception] = UnsupportedLayoutError) -> None:
    with pytest.raises(kind) as error:
        call()
    assert what in str(error.value)


def at_attach(make: Callable[[], nn.Module], layout: str = "padded") -> Callable[[], Any]:
    return lambda: clha_fast.attach(make(), layout=layout, sequence_parallel=dist.group.WORLD)


def _long() -> dict[str, Any]:
    prompt, *responses = [5] * 300, [7] * 40, [9] * 60
    return pack([candidates_of(prompt, responses)], "shared").as_dict()


def refusals() -> None:
    refused(
        "expected a number of processes that divides the 3 attention heads of LlamaAttention (1, 3), got 2",
        at_attach(lambda: llama(num_attention_heads=3, num_key_value_heads=3, hidden_size=24)),
    )
    refused("attn_implementation is 'eager'", at_attach(lambda: of_kind("llama", "eager")))
    refused("attention dropout", at_attach(lambda: llama(attention_dropout=0.1), "shared"))
    refused("rope_type 'dynamic'", at_attach(lambda: llama(rope_parameters=_dynamic())))
    refused("output_router_logits", at_attach(lambda: of_kind("qwen3_moe", output_router_logits=True)))
    refused("MambaForCausalLM", at_attach(lambda: of_kind("mamba", "eager")))
    refused("Qwen3NextForCausalLM", at_attach(lambda: of_kind("qwen3_next")))
    model = llama()
    attached = clha_fast.attach(model, layout="shared", sequence_parallel=dist.group.WORLD)
    apart = "batch: expected the same one in all 2 processes"
    refused(apart, lambda: model(**collate("shared", start=3 * dist.get_rank())), ValueError)
    model(**collate("shared"))
    more = collate("shared", start=3) if dist.get_rank() else _long()  # one alone has texts that are to be compared
    refused(apart, lambda: model(**more), ValueError)
    for name, other in (("rewards", lambda t: -t), ("sft_index", lambda t: t + 1), ("rewards", lambda _: None)):
        changed = {name: other(collate("shared")[name])} if dist.get_rank() else {}
        refused(apart, lambda: model(**{**collate("shared"), **changed}), ValueError)  # noqa: B023
    refused("pixel_values", lambda: model(**collate("shared"), pixel_values=torch.zeros(1)))
    refused("copy of one", lambda: copy.deepcopy(model)(**collate("shared")))
    refused("which no file holds", lambda: torch.save(model, io.BytesIO()), ValueError)
    left = collate("padded")
    left["attention_mask"] = left["attention_mask"].flip(1)
    refused("padding behind the text alone", lambda: model(**left), ValueError)
    ids = torch.arange(3, 12)[None]
    assert model(input_ids=ids).logits.shape[1] == 9  # every other call is the model's own
    attached.detach()
    # A model that only one process refuses: none is left waiting.
    refused("", at_attach(lambda: llama(attention_dropout=0.1 * dist.get_rank())))


def _dynamic() -> dict[str, Any]:
    return {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


CASES: dict[str, Callable[[], None]] = {
    "padded": lambda: equal(llama, "padded"),
    "packed": lambda: equal(llama, "packed"),
    "shared": lambda: equal(llama, "shared"),
    "exact": lambda: equal(gpt2, "shared", far=EXACT),
    "exact, padded": lambda: equal(gpt2, "padded", far=EXACT, drop_inert=False),
    # The last process has no scored token, or padding alone.
    "much padding": lambda: equal(gpt2, "shared", far=EXACT, count=1, pad_to_multiple_of=96),
    "one group of heads": lambda: equal(lambda: llama(num_key_value_heads=1), "shared"),
    "checkpointing": lambda: equal(llama, "shared", before=checkpointed),
    "dpo": lambda: equal(gpt2, "shared", DPOOptions(), far=EXACT, more=references, drop_inert=False),
    "entropy": lambda: equal(
        gpt2,
        "shared",
        PolicyOptions(advantages="given", entropy_weight=0.01),
        far=EXACT,
        more=signals,
        drop_inert=False,
    ),
    "window": lambda: equal(lambda: of_kind("mistral"), "shared", batch=drawn),
    "window, padded": lambda: equal(lambda: of_kind("mistral"), "padded", batch=drawn),
    "softcap": lambda: equal(lambda: of_kind("gemma2", "clha_fast"), "shared", batch=drawn),
    "sinks": lambda: equal(lambda: of_kind("gpt_oss", "clha_fast"), "shared", batch=drawn),
    "latent attention": lambda: equal(lambda: of_kind("deepseek_v3"), "shared", batch=drawn),
    "experts": lambda: equal(lambda: of_kind("qwen3_moe"), "padded", batch=drawn),
    "lora": lambda: equal(llama, "shared", before=lora),
    "ddp": ddp,
    "fsdp2": fsdp2,
    "memory": memory,
    "bfloat16": bfloat16,
    "no prompts": no_prompts,
    "longer": longer,
    "fuzz": fuzz,
    "refusals": refusals,
}
OF_FOUR: dict[str, Callable[[], None]] = {"two groups": two_groups}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for name in names or CASES:
        try:
            (CASES | OF_FOUR)[name]()
        except BaseException:
            print(f"--- {name}, process {dist.get_rank()}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)  # the other process waits for this one
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the threads of a process whose peer has left may abort it


if __name__ == "__main__":
    main(sys.argv[1:])

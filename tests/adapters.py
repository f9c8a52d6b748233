"""Adapters, quantised heads and virtual tokens: every case attached, against the same model's own full logits.

``python -m tests.adapters`` runs them all and prints the table; ``--write PATH`` renders it into a file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from tiny import make_model, make_rows, make_tokenizer
from torch import Tensor, nn

import clha_fast
from clha_fast import CLHAOptions, HeadOptions, reference
from clha_fast.batch import CandidateBatch
from clha_fast.hf.attach import Attached
from clha_fast.hf.collator import RankedCollator

TOKENIZER = make_tokenizer()
OPTIONS = CLHAOptions(margin=0.5, sft_weight=0.1)
ROWS = make_rows(3, seed=3)
# float32 by another order of additions.
TOLERANCE = 2e-6
# A few tokens at a time, so that heads are called many times: (vocabulary of 300) * 4 matrices * 4 bytes a token.
WORKSPACE = 7 * 300 * 16
BODY = ["q_proj", "v_proj", "down_proj"]
HEAD = ["q_proj", "lm_head"]


def collate(rows: Sequence[Any] = tuple(ROWS)) -> CandidateBatch:
    return CandidateBatch.from_dict(RankedCollator(TOKENIZER, OPTIONS)(rows))


def base(tied: bool = False, **changes: Any) -> nn.Module:
    return make_model(len(TOKENIZER), tie_word_embeddings=tied, **changes)


def stir(model: nn.Module) -> nn.Module:
    """Adapters as they are after some training: a fresh one adds nothing, and its half has no gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(config: Any, tied: bool = False, **changes: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied embeddings, which is what some cases are about
        return stir(peft.get_peft_model(base(tied, **changes), config)).train()


def lora(targets: list[str], tied: bool = False, **settings: Any) -> nn.Module:
    return adapted(peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **settings), tied)


def eager_loss(model: nn.Module, batch: CandidateBatch) -> Tensor:
    """The loss by way of the model's own logits; virtual tokens stand in front of them."""
    logits = model(**batch.model_inputs(), use_cache=False).logits.float()
    rows = logits[:, -batch.input_ids.shape[1] :].flatten(0, 1)[batch.row_index]
    logps = rows.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    ranking = (batch.candidate_lengths, batch.candidates_per_prompt, batch.rewards, batch.sft_index, None, None)
    return reference.clha_loss(logps, batch.targets, *ranking, HeadOptions(), OPTIONS)[0]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


@dataclass
class Measured:
    """Relative errors of the loss and of all gradients (largest of any parameter over the norm of all)."""

    loss: float
    gradients: float
    tolerance: float = TOLERANCE

    @property
    def right(self) -> bool:
        return max(self.loss, self.gradients) <= self.tolerance


def compare(model: nn.Module, attach: Callable[[nn.Module], Attached], tolerance: float = TOLERANCE) -> Measured:
    """`model` attached against itself before, on the same random state."""
    batch = collate()
    torch.manual_seed(1)
    wanted = eager_loss(model, batch)
    wanted_grads = gradients(model, wanted)
    with attach(model):
        torch.manual_seed(1)
        loss = model(**batch.as_dict()).loss
        grads = gradients(model, loss)
    assert grads.keys() == wanted_grads.keys(), sorted(grads.keys() ^ wanted_grads.keys())
    size = sum(float(grad.double().norm()) ** 2 for grad in wanted_grads.values()) ** 0.5
    assert size > 0
    worst = max(float((grads[name].double() - grad.double()).norm()) / size for name, grad in wanted_grads.items())
    return Measured(abs(loss.item() - wanted.item()) / abs(wanted.item()), worst, tolerance)


def attach(model: nn.Module) -> Attached:
    return clha_fast.attach(model, OPTIONS, workspace_bytes=WORKSPACE)


def after(build: Callable[[], nn.Module], **settings: Any) -> Callable[[], Measured]:
    """Attached once the adapters are there."""
    return lambda: compare(build(), attach, **settings)


def before(config: Any) -> Measured:
    """Attached first, adapters put on afterwards."""
    model = base().train()
    with attach(model):
        wrapped = stir(peft.get_peft_model(model, config)).train()
        loss = wrapped(**collate().as_dict()).loss
        grads = gradients(wrapped, loss)
    wanted = eager_loss(wrapped, collate())
    expected = gradients(wrapped, wanted)
    size = sum(float(grad.norm()) ** 2 for grad in expected.values()) ** 0.5
    worst = max(float((grads[name] - grad).norm()) / size for name, grad in expected.items())
    return Measured(abs(loss.item() - wanted.item()) / abs(wanted.item()), worst)


def merged(targets: list[str], keep: bool) -> Measured:
    """The loss of merged adapters against unmerged ones; merging rounds the weights once."""
    model = lora(targets)
    with attach(model):
        wanted = model(**collate().as_dict()).loss.item()
        if keep:
            model.merge_adapter()
            got = model(**collate().as_dict()).loss.item()
    if not keep:
        plain = model.merge_and_unload()
        with attach(plain):
            got = plain(**collate().as_dict()).loss.item()
    return Measured(abs(got - wanted) / abs(wanted), 0.0)


def quantised(make: Callable[[nn.Linear], nn.Module], **settings: Any) -> Callable[[], Measured]:
    """A frozen head in few bits behind a body with LoRA."""

    def build() -> nn.Module:
        model = base()
        model.lm_head = make(model.lm_head)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=BODY)
        return stir(peft.get_peft_model(model, config)).train()

    return after(build, **settings)


def eight_bits(plain: nn.Linear) -> nn.Module:
    import bitsandbytes

    head = bitsandbytes.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
    head.load_state_dict(plain.state_dict())
    return head.to("cpu")


def four_bits(plain: nn.Linear) -> nn.Module:
    import bitsandbytes

    head = bitsandbytes.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, quant_type="nf4")
    head.load_state_dict(plain.state_dict())
    return head.to("cpu")


def torchao_int8(plain: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(plain)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder[0]


def virtual(kind: Any, **settings: Any) -> Callable[[], Measured]:
    return after(lambda: adapted(kind(task_type="CAUSAL_LM", num_virtual_tokens=5, **settings)))


def tuned(name: str, **settings: Any) -> Callable[[], Measured]:
    """Another adapter of peft's, on the head as well."""
    return after(lambda: adapted(getattr(peft, name)(task_type="CAUSAL_LM", target_modules=HEAD, **settings)))


def lora_config(targets: list[str], **settings: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **settings)


CASES: dict[str, Callable[[], Measured]] = {
    "LoRA on the body": after(lambda: lora(BODY)),
    "LoRA on the body, tied embeddings": after(lambda: lora(BODY, tied=True)),
    "LoRA on the body, dropout": after(lambda: lora(BODY, lora_dropout=0.3)),
    "LoRA on the body, attached before get_peft_model": lambda: before(lora_config(BODY)),
    "LoRA on the body, merge_adapter": lambda: merged(BODY, keep=True),
    "LoRA on the body, merge_and_unload": lambda: merged(BODY, keep=False),
    "LoRA on the input embedding": after(lambda: lora(["embed_tokens", "q_proj"])),
    "DoRA on the body": after(lambda: lora(BODY, use_dora=True)),
    "LoRA on the head": after(lambda: lora(HEAD)),
    "LoRA on the head, tied embeddings": after(lambda: lora(HEAD, tied=True)),
    "LoRA on the head, rank-stabilised, with a bias": after(lambda: lora(HEAD, use_rslora=True, lora_bias=True)),
    "LoRA on the head, merge_adapter": lambda: merged(HEAD, keep=True),
    "LoRA on the head, merge_and_unload": lambda: merged(HEAD, keep=False),
    "DoRA on the head": after(lambda: lora(HEAD, use_dora=True)),
    "DoRA on the head, tied embeddings": after(lambda: lora(HEAD, tied=True, use_dora=True)),
    "IA3 on the head": tuned("IA3Config", feedforward_modules=[]),
    "VeRA on the head": tuned("VeraConfig", r=4),
    "OFT on the head": tuned("OFTConfig", r=4, oft_block_size=0),
    "modules_to_save=['lm_head']": after(lambda: lora(BODY, modules_to_save=["lm_head"])),
    "modules_to_save=['lm_head'], tied embeddings": after(lambda: lora(BODY, tied=True, modules_to_save=["lm_head"])),
    "modules_to_save=['embed_tokens', 'lm_head'], tied": after(
        lambda: lora(BODY, tied=True, modules_to_save=["embed_tokens", "lm_head"])
    ),
    "trainable_token_indices": after(lambda: lora(BODY, trainable_token_indices=[3, 7, 40])),
    "trainable_token_indices, tied embeddings": after(
        lambda: lora(BODY, tied=True, trainable_token_indices=[3, 7, 40])
    ),
    "Prompt tuning": virtual(peft.PromptTuningConfig),
    "Prompt tuning, p-tuning's encoder": virtual(peft.PromptEncoderConfig, encoder_hidden_size=16),
    "Prefix tuning": virtual(peft.PrefixTuningConfig),
}
if importlib.util.find_spec("bitsandbytes") is not None:
    CASES["bitsandbytes Linear8bitLt as the head"] = quantised(eight_bits)
    CASES["bitsandbytes Linear4bit (nf4) as the head"] = quantised(four_bits)
if importlib.util.find_spec("torchao") is not None:
    CASES["torchao int8 weight-only head"] = quantised(torchao_int8)


def main() -> int:
    import time

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of cases")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in arguments.only or CASES:
        t = time.perf_counter()
        try:
            got = CASES[name]()
            print(
                f"{name:55} {got.loss:.1e} {got.gradients:.1e} {'right' if got.right else 'WRONG'} {time.perf_counter() - t:.2f}",
                flush=True,
            )
        except Exception as e:
            import traceback

            traceback.print_exc(limit=-4)
            print(f"{name:55} {type(e).__name__}: {e}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Adapters, quantised heads and virtual tokens: every case attached, against the same model's own full logits.

Holds no test; `adapter_table.py` renders what comes out.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import clha_fast
from clha_fast import CLHAOptions, HeadOptions, reference
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.errors import BackendError
from clha_fast.models.attach import Attached
from tests.support.tiny import make_model, make_rows, make_tokenizer

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


def lora_config(targets: list[str], **settings: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **settings)


def lora(targets: list[str], tied: bool = False, **settings: Any) -> nn.Module:
    return adapted(lora_config(targets, **settings), tied)


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
    """Relative errors of the loss and of all gradients (largest of any parameter over the norm of all).

    `chunks`: whether the head's own forward was called in chunks, rather than its weight read.
    """

    loss: float
    gradients: float
    chunks: bool = False

    @property
    def right(self) -> bool:
        return max(self.loss, self.gradients) <= TOLERANCE


def measure(
    wanted: Tensor, expected: dict[str, Tensor], loss: Tensor, grads: dict[str, Tensor], attached: Attached
) -> Measured:
    assert grads.keys() == expected.keys(), sorted(grads.keys() ^ expected.keys())
    blind = [name for name, grad in expected.items() if not grad.any()]
    assert not blind, f"gradients of zeros compare nothing: {blind}"
    size = sum(float(grad.double().norm()) ** 2 for grad in expected.values()) ** 0.5
    worst = max(float((grads[name].double() - grad.double()).norm()) / size for name, grad in expected.items())
    error = abs(loss.item() - wanted.item()) / abs(wanted.item())
    return Measured(error, worst, attached.info.own_forward is not None)


def compare(model: nn.Module) -> Measured:
    """`model` attached against itself before, on the same random state."""
    batch = collate()
    torch.manual_seed(1)
    wanted = eager_loss(model, batch)
    expected = gradients(model, wanted)
    with attach(model) as attached:
        torch.manual_seed(1)
        loss = model(**batch.as_dict()).loss
        return measure(wanted, expected, loss, gradients(model, loss), attached)


def attach(model: nn.Module) -> Attached:
    return clha_fast.attach(model, OPTIONS, workspace_bytes=WORKSPACE)


def after(build: Callable[[], nn.Module]) -> Callable[[], Measured]:
    """Attached once the adapters are there."""
    return lambda: compare(build())


def before(config: Any) -> Measured:
    """Attached first, adapters put on afterwards."""
    model, batch = base().train(), collate()
    with attach(model) as attached:
        wrapped = stir(peft.get_peft_model(model, config)).train()
        loss = wrapped(**batch.as_dict()).loss
        grads = gradients(wrapped, loss)
    wanted = eager_loss(wrapped, batch)
    return measure(wanted, gradients(wrapped, wanted), loss, grads, attached)


def merged(targets: list[str], keep: bool) -> Measured:
    """The loss of merged adapters against the unmerged one; there are no gradients to compare."""
    model, batch = lora(targets), collate()
    with attach(model) as attached:
        wanted = model(**batch.as_dict()).loss.item()
        if keep:
            model.merge_adapter()
            got = model(**batch.as_dict()).loss.item()
    if not keep:
        plain = model.merge_and_unload()
        with attach(plain) as attached:
            got = plain(**batch.as_dict()).loss.item()
    return Measured(abs(got - wanted) / abs(wanted), 0.0, attached.info.own_forward is not None)


def with_head(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Another head behind a body with LoRA."""
    model = base()
    model.lm_head = make(model.lm_head)
    return stir(peft.get_peft_model(model, lora_config(BODY))).train()


def quantised(make: Callable[[nn.Linear], nn.Module]) -> Callable[[], Measured]:
    return after(lambda: with_head(make))


class Int8(nn.Module):
    """A frozen head of 8-bit codes with a scale for every row."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (plain.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.codes.to(hidden.dtype) * self.scale)


def inference_only(plain: nn.Linear) -> nn.Module:
    """torch's own 8-bit linear layer, which has no backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao's
        whole = torch.ao.quantization.quantize_dynamic(nn.Sequential(plain), {nn.Linear}, dtype=torch.qint8)
    head: nn.Module = whole[0]
    return head


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


def virtual(kind: str, **settings: Any) -> nn.Module:
    config = getattr(peft, kind)
    return adapted(config(task_type="CAUSAL_LM", **({"num_virtual_tokens": 5} | settings)))


def tuned(kind: str, **settings: Any) -> Callable[[], Measured]:
    """Another adapter of peft's, on the head as well."""
    return after(lambda: adapted(getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=HEAD, **settings)))


def added_by_transformers() -> nn.Module:
    """`model.add_adapter(config)`, without a PeftModel."""
    model = base()
    model.add_adapter(lora_config(HEAD))
    return stir(model).train()


def some_tokens() -> list[int]:
    return collate().targets.unique()[:3].tolist()


def mixed() -> nn.Module:
    return stir(peft.get_peft_model(base(), lora_config(HEAD), mixed=True)).train()


ADAPTION = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
CPT = {"cpt_token_ids": [4, 5, 6], "cpt_tokens_type_mask": [1, 2, 2], "cpt_mask": [1, 1, 1]}
ADDED_BY_TRANSFORMERS = "LoRA on the head, model.add_adapter of transformers"
CASES: dict[str, Callable[[], Measured]] = {
    "LoRA on the body": after(lambda: lora(BODY)),
    "LoRA on the body, tied embeddings": after(lambda: lora(BODY, tied=True)),
    "LoRA on the body, dropout": after(lambda: lora(BODY, lora_dropout=0.3)),
    "LoRA on the body, attached before get_peft_model": lambda: before(lora_config(BODY)),
    "LoRA on the body, merge_adapter": lambda: merged(BODY, keep=True),
    "LoRA on the body, merge_and_unload": lambda: merged(BODY, keep=False),
    "LoRA on the input embedding": after(lambda: lora(["embed_tokens", "q_proj"])),
    "DoRA on the body": after(lambda: lora(BODY, use_dora=True)),
    "Tuned layer norms": after(
        lambda: adapted(peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm", "input_layernorm"]))
    ),
    "Prefix tuning, attached before get_peft_model": lambda: before(
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ),
    "LLaMA-Adapter (AdaptionPrompt), attached before get_peft_model": lambda: before(ADAPTION),
    "LoRA on the head": after(lambda: lora(HEAD)),
    "LoRA on the head, tied embeddings": after(lambda: lora(HEAD, tied=True)),
    "LoRA on the head, rank-stabilised, with a bias": after(lambda: lora(HEAD, use_rslora=True, lora_bias=True)),
    "LoRA on the head, merge_adapter": lambda: merged(HEAD, keep=True),
    "LoRA on the head, merge_and_unload": lambda: merged(HEAD, keep=False),
    "LoRA on the head, PeftMixedModel": after(mixed),
    ADDED_BY_TRANSFORMERS: after(added_by_transformers),
    "DoRA on the head": after(lambda: lora(HEAD, use_dora=True)),
    "DoRA on the head, tied embeddings": after(lambda: lora(HEAD, tied=True, use_dora=True)),
    "IA3 on the head": tuned("IA3Config", feedforward_modules=[]),
    "VeRA on the head": tuned("VeraConfig", r=4),
    "OFT on the head": tuned("OFTConfig", r=4, oft_block_size=0),
    "BOFT on the head": tuned("BOFTConfig", boft_block_size=4),
    "HRA on the head": tuned("HRAConfig"),
    "LoHa on the head": tuned("LoHaConfig", r=2),
    "FourierFT on the head": tuned("FourierFTConfig", n_frequency=10),
    "RandLoRA on the head": tuned("RandLoraConfig", r=4),
    "VB-LoRA on the head": tuned("VBLoRAConfig", r=2, num_vectors=8, vector_length=4),
    "modules_to_save=['lm_head']": after(lambda: lora(BODY, modules_to_save=["lm_head"])),
    "modules_to_save=['lm_head'], tied embeddings": after(lambda: lora(BODY, tied=True, modules_to_save=["lm_head"])),
    "modules_to_save=['embed_tokens', 'lm_head'], tied": after(
        lambda: lora(BODY, tied=True, modules_to_save=["embed_tokens", "lm_head"])
    ),
    "trainable_token_indices": after(lambda: lora(BODY, trainable_token_indices=some_tokens())),
    "trainable_token_indices, tied embeddings": after(
        lambda: lora(BODY, tied=True, trainable_token_indices=some_tokens())
    ),
    "Prompt tuning": after(lambda: virtual("PromptTuningConfig")),
    "p-tuning": after(lambda: virtual("PromptEncoderConfig", encoder_hidden_size=16)),
    "Context-aware prompt tuning (CPT)": after(
        lambda: virtual(
            "CPTConfig",
            num_virtual_tokens=3,
            cpt_token_ids=[4, 5, 6],
            cpt_tokens_type_mask=[1, 2, 2],
            cpt_mask=[1, 1, 1],
        )
    ),
    "Prefix tuning": after(lambda: virtual("PrefixTuningConfig")),
    "8-bit codes with row scales as the head": quantised(Int8),
}
if importlib.util.find_spec("bitsandbytes") is not None:
    CASES["bitsandbytes Linear8bitLt as the head"] = quantised(eight_bits)
    CASES["bitsandbytes Linear4bit (nf4) as the head"] = quantised(four_bits)
if importlib.util.find_spec("torchao") is not None:
    CASES["torchao int8 weight-only head"] = quantised(torchao_int8)


def attached_too_early(config: Any) -> None:
    model = base()
    with attach(model):
        peft.get_peft_model(model, config)(**collate().as_dict())


def switched_off() -> None:
    model = lora(BODY, modules_to_save=["lm_head"])
    with attach(model), model.disable_adapter():
        model(**collate().as_dict())


def head_without_backward() -> None:
    model = with_head(inference_only)
    with attach(model):
        model(**collate().as_dict())


def named_backend() -> None:
    clha_fast.attach(lora(HEAD), OPTIONS, backend="triton")


def several_adapters_in_a_batch() -> None:
    model = lora(HEAD)
    batch = collate()
    with attach(model):
        model.eval()(**batch.as_dict(), adapter_names=["default"] * len(batch.input_ids))


# Each raises: the sentence is part of the table.
REFUSED: dict[str, Callable[[], Any]] = {
    "LoRA on the head, attached before get_peft_model": lambda: attached_too_early(lora_config(HEAD)),
    "modules_to_save=['lm_head'], attached before get_peft_model": lambda: attached_too_early(
        lora_config(BODY, modules_to_save=["lm_head"])
    ),
    "Prompt tuning, attached before get_peft_model": lambda: attached_too_early(
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ),
    "LLaMA-Adapter (AdaptionPrompt), attached after get_peft_model": lambda: attach(adapted(ADAPTION)),
    "modules_to_save=['lm_head'], adapter disabled after attach": switched_off,
    "LoRA on the head, several adapters in a batch (adapter_names)": several_adapters_in_a_batch,
    "LoRA on the head, backend='triton'": named_backend,
    "A head without a backward (torch's dynamic int8), in training": head_without_backward,
}
if hasattr(peft, "LilyConfig"):
    REFUSED["Lily on the head"] = lambda: attach(
        peft.get_peft_model(base(), peft.LilyConfig(task_type="CAUSAL_LM", r=4, target_modules=HEAD))
    )


def sentence(name: str) -> str:
    """What a refusal says."""
    try:
        REFUSED[name]()
    except (ValueError, BackendError) as error:
        return str(error)
    return "**not refused**"

"""Tiny causal language models of several kinds, and their fused heads against eager logits."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from clha_fast import token_logps
from clha_fast.models.heads import fused_head, inspect_head

V, T = 67, 9
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"final_logit_softcapping": 7.0, "head_dim": 8, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.3},
    "phi": {},
    "granite": {"logits_scaling": 13.0},
}


def build(name: str, **changes: object) -> PreTrainedModel:
    kind = name.split("-")[0]
    config = AutoConfig.for_model(kind, **{**SIZES, **MODELS.get(name, {}), **changes})
    if kind == "gpt2":  # its own names, and dropout by default
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights are nearly zero: softcaps would not be felt
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (batch, T), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    rows = torch.arange(batch * T).reshape(batch, T)[:, 3:-1][mask[:, 4:].bool()]
    return ids, mask, rows, ids.flatten()[rows + 1]


def eager(model: nn.Module) -> Tensor:
    ids, mask, rows, targets = inputs()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logps = logits.flatten(0, 1)[rows].log_softmax(-1)
    return logps.gather(1, targets[:, None])[:, 0]


def fused(model: nn.Module) -> Tensor:
    ids, mask, rows, targets = inputs()
    info = inspect_head(model)

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return token_logps(hidden, weight, targets, bias=bias, row_index=rows, head=info.options())

    with fused_head(model, compute, info) as head:
        logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert logps is head.result
    return logps


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    logps.backward(torch.linspace(-1, 1, len(logps), dtype=logps.dtype))
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(model: nn.Module, tolerance: float) -> None:
    model.train()
    expected = eager(model)
    expected_grads = gradients(model, expected)
    logps = fused(model)
    grads = gradients(model, logps)
    assert (logps - expected).norm() <= tolerance * expected.norm()
    whole = sum(g.norm() ** 2 for g in expected_grads.values() if g is not None) ** 0.5
    assert whole > 0
    for name, grad in expected_grads.items():
        if grad is None:
            assert grads[name] is None or not grads[name].any(), name
        else:
            assert (grads[name] - grad).norm() <= tolerance * (grad.norm() + 1e-3 * whole), name


class Behind(nn.Module):
    """A Llama whose logits pass through `behind` once more."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.inner = build("llama")
        self.behind = behind
        self.get_output_embeddings = self.inner.get_output_embeddings
        self.get_input_embeddings = self.inner.get_input_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SimpleNamespace:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        return SimpleNamespace(logits=self.behind(output.logits))

"""MLPs a tile of tokens at a time: found by structure, exact, and gone again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
)

import clha_fast
from clha_fast.models.tiled import find_mlps, is_tiled, tile_mlps, untile
from tests.support.tiny import make_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def double(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    if config.model_type == "deepseek_v3":
        model.set_experts_implementation("eager")  # the others know no float64
    return model


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LlamaConfig(intermediate_size=48, **SMALL), ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (Gemma3TextConfig(intermediate_size=48, head_dim=8, **SMALL), ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
            ["transformer.h.0.mlp", "transformer.h.1.mlp"],
        ),
        (
            DeepseekV3Config(
                intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, first_k_dense_replace=1, n_group=2,
                topk_group=1, num_experts_per_tok=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                v_head_dim=8, qk_nope_head_dim=8, **SMALL,
            ),
            ["model.layers.0.mlp", "model.layers.1.mlp.shared_experts"],
        ),
    ],
    ids=["llama", "gemma3", "gpt2", "deepseek_v3"],
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_found_and_exact(config, names, checkpointing):
    """float64: logits and every gradient are those of whole MLPs, in tiles that do not divide the tokens."""
    model = double(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(2, 11, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def gradients():
        logits = model(input_ids=ids, use_cache=False).logits
        logits.backward(upstream)
        found = [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
        return found

    whole = gradients()
    assert list(find_mlps(model)) == names
    tiled = tile_mlps(model, 4)
    assert [is_tiled(module) for module in tiled] == [True] * len(names)
    for ours, theirs in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, whole[0], rtol=1e-12, atol=1e-13)
    untile(tiled)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_tile_is_what_runs():
    """Five tokens in tiles of two: the activation sees 2, 2 and 1, and in the backward the same again."""
    model = double(LlamaConfig(intermediate_size=48, **SMALL))
    mlp = model.model.layers[0].mlp
    seen = []
    mlp.act_fn.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    tile_mlps(model, 2)
    mlp(torch.ones(1, 5, 32, dtype=torch.float64)).sum().backward()
    assert seen[:3] == [2, 2, 1]
    assert sorted(seen[3:]) == [1, 2, 2]
    tile_mlps(model, True)
    assert mlp._clha_tile_rows == 32


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(intermediate_size=48, **SMALL),
        MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4),
        BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
        OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_refused_where_there_is_none(config):
    """Experts in one tensor, a state space, a residual inside the MLP, linear layers of the layer's own."""
    with pytest.raises(ValueError, match=r"tiled_mlp: expected MLPs that work on each token by itself, got \w+"):
        tile_mlps(AutoModelForCausalLM.from_config(config), True)


@pytest.mark.parametrize("rows", [0, -1, 1.5, "many", None])
def test_refused_settings(rows):
    with pytest.raises(ValueError, match="tiled_mlp: expected True, False or a positive number of tokens a tile"):
        tile_mlps(make_model(64), rows)


def test_somebody_elses_forward_is_refused():
    model = make_model(64)
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(ValueError, match=r"tiled_mlp: expected model.layers.1.mlp with its class's forward"):
        tile_mlps(model, True)
    assert not is_tiled(model.model.layers[0].mlp)


def batch():
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(3))
    rows = torch.cat([torch.arange(i * 9 + 3, i * 9 + 8) for i in range(3)])
    lengths, sizes = torch.full((3,), 5), torch.tensor([3])
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "targets": ids.flatten()[rows + 1]}
    return {**found, "row_index": rows, "candidate_lengths": lengths, "candidates_per_prompt": sizes}


def test_attached_copied_pickled_and_detached():
    """The loss is the same, a copy's tiles are its own, and nothing is left behind."""
    model = make_model(64).double()
    with clha_fast.attach(model):
        expected = model(**batch()).loss
    attached = clha_fast.attach(model, tiled_mlp=4)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mlp = other.model.layers[0].mlp
        assert is_tiled(mlp)
        assert mlp.forward.args[0] is mlp
        torch.testing.assert_close(other(**batch()).loss, expected, rtol=1e-12, atol=0)
    attached.detach()
    assert not any("forward" in vars(module) for module in model.modules())


def test_with_adapters_put_on_before():
    peft = pytest.importorskip("peft")
    model = make_model(64)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    clha_fast.attach(adapted)
    expected = adapted(**batch()).loss
    expected.backward()
    before = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    assert len(tile_mlps(model, 4)) == 2
    loss = adapted(**batch()).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, before[name], rtol=1e-4, atol=1e-6)

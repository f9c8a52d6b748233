"""What a plan counts of adapters, reward models and each backend of the loss, beside what training makes of them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from clha_fast.backends.memory import Workspace
from clha_fast.models.adapters import import_peft
from clha_fast.models.loading import adapter_config, load_model
from clha_fast.planning.live import LiveMemory
from clha_fast.planning.plan import GIB, Load, plan, ways_to_fit
from clha_fast.planning.source import read_source
from clha_fast.planning.step import Rows, Switches, build, head_bytes, loss_backend
from clha_fast.rewards.rows import padded_rewards

WIDTH, WORDS = 64, 1000
LOAD = Load(1, 4, 128, 128)


def small(**changes):
    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": WORDS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096, "pad_token_id": 0}
    return LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **changes})


def counts(model):
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_loss_s_backends_by_hand():
    """100 scored tokens of 300 hidden states, 16 bits: sums of gradients, the gradients, workspace."""
    rows = Rows(3, 100, 100)
    weight, hidden, scored = 2 * WORDS * WIDTH, 300 * WIDTH, 100 * WIDTH
    by_hand = {
        "triton": weight + 4 * scored + 2 * hidden + 64 * 2**20,
        "torch": 2 * weight + 4 * 1000 * 100 + 4 * scored + 6 * hidden,
        # Logits of 1024 in a row and the tokens' own rows beside the gradient and its float32.
        "workspace": 4 * hidden + 2 * 100 * 1024 + 2 * scored + weight + 2 * weight,
    }
    for backend, size in by_hand.items():
        switches = Switches(backend=backend)
        assert head_bytes(build(small(), switches), rows, switches) == size
    bounded = Switches(backend="triton", workspace_bytes=1000)
    assert head_bytes(build(small(), bounded), rows, bounded) == by_hand["triton"] - 64 * 2**20 + 1000


def test_auto_counts_what_training_takes():
    """A sixteenth of the device's memory has room for 4.5 GiB beside an 8B head that trains, and for a frozen one."""
    config = small(
        hidden_size=4096, intermediate_size=64, num_hidden_layers=1, vocab_size=128256, num_attention_heads=32
    )
    room, many, few = Workspace(128256, 4096, 2).worst * 16, Rows(4, 8192, 16384), Rows(4, 2048, 4096)
    chosen = {}
    for memory in (room, room - 16):
        for rank in (None, 4):
            switches = Switches(memory=memory, lora_rank=rank)
            model = build(config, switches)
            chosen[memory, rank] = [loss_backend(model, rows, switches) for rows in (many, few)]
    assert chosen == {
        (room, None): ["workspace", "workspace"],
        (room - 16, None): ["triton", "workspace"],
        (room, 4): ["workspace", "workspace"],
        (room - 16, 4): ["workspace", "workspace"],
    }
    found = plan(config, LOAD, Switches(memory=room))
    assert (found.backend, found.as_dict()["switches"]["backend"]) == ("workspace", "auto")
    assert plan(config, LOAD, Switches()).backend == "workspace"
    assert plan(config, LOAD, Switches(backend="triton", memory=room)).backend == "triton"


def test_auto_counts_the_smaller_step_where_that_holds_more():
    """V 151936, H 2048, 16 GiB: up to 1247 tokens the workspace, whose logits take more than triton's few more tokens.

    Rows are read in full: one hidden state a scored token.
    """
    words, width, limit = 151936, 2048, 1247
    config = small(hidden_size=width, intermediate_size=64, num_hidden_layers=1, vocab_size=words)
    switches = Switches(memory=16 * GIB)
    model = build(config, switches)
    weight, step = 2 * words * width, 4 * width + 2 * words + 2 * width  # a token's sum, logits and row

    def counted(tokens):
        rows = Rows(1, tokens, tokens)
        return loss_backend(model, rows, switches), head_bytes(model, rows, switches)

    assert counted(limit) == ("workspace", weight + step * limit + 64 * 2**20)
    assert counted(limit + 1) == ("triton", counted(limit)[1])
    many = 10**5
    assert counted(many) == ("triton", weight + (4 + 2) * width * many + 64 * 2**20)
    asked = Switches(memory=16 * GIB, backend="triton")
    rows = Rows(1, limit + 1, limit + 1)
    assert head_bytes(model, rows, asked) == weight + 6 * width * (limit + 1) + 64 * 2**20


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "olora"}], ids=str)
def test_an_adapter_s_folder(settings, tmp_path):
    """Numbers of weights as the library loads it to go on training; nothing but configurations is read."""
    base, folder = str(tmp_path / "base"), str(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_config(small())
    model.save_pretrained(base)
    adapter = adapter_config({"r": 3, "target_modules": ["q_proj", "up_proj"], **settings})
    wrapped = import_peft().get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter)
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(folder)
    source = read_source(folder)
    assert not source.is_classifier
    found = plan(source.config, LOAD, Switches(adapter=source.adapter))
    assert (found.parameters, found.trained) == counts(load_model(folder))
    assert found.memory.optimizer == 2 * found.memory.gradients
    # A head that is saved with it trains: its gradient is there.
    assert (found.memory.gradients > 2 * WORDS * WIDTH) == ("modules_to_save" in settings)
    names, _ = ways_to_fit(source.config, LOAD, Switches(adapter=source.adapter), 1)
    assert "lora_rank=16" not in names


def test_adapters_that_are_not_counted():
    with pytest.raises(ValueError, match="peft_config: expected an adapter in the model's layers, got PROMPT_TUNING"):
        plan(small(), LOAD, Switches(adapter=adapter_config({"peft_type": "prompt_tuning", "num_virtual_tokens": 2})))
    with pytest.raises(ValueError, match="peft_config: expected an adapter beside the output embedding, got one on it"):
        plan(small(), LOAD, Switches(adapter=adapter_config({"target_modules": ["lm_head"]})))


def test_a_reward_model(tmp_path):
    classifier = AutoModelForSequenceClassification.from_config(small(num_labels=1))
    classifier.save_pretrained(tmp_path)
    source = read_source(str(tmp_path))
    assert source.is_classifier
    for config in (source.config, small()):
        found = plan(config, LOAD, Switches(reward_model=True))
        assert (found.parameters, found.trained) == counts(classifier)
        assert found.backend == ""
    lora = plan(small(), LOAD, Switches(reward_model=True, lora_rank=2))
    wrapped = import_peft().get_peft_model(
        AutoModelForSequenceClassification.from_config(small(num_labels=1)),
        adapter_config({"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    )
    assert (lora.parameters, lora.trained) == counts(wrapped)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_reward_model_s_step_is_what_a_real_one_takes(checkpointing):
    """At most a tenth more, and never less."""
    config = small(num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(1, WORDS, (4, 256))
    ones = torch.ones_like(ids)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    live = LiveMemory()
    live.known(*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), ids, ones)
    with live:
        padded_rewards(model, model.config, ids, ones, 0).sum().backward()
    switches = Switches(dtype=torch.float32, checkpointing=checkpointing, reward_model=True)
    found = plan(config, LOAD, switches).memory
    assert 1 <= (found.kept + max(found.layer, found.head)) / live.peak < 1.1
    assert found.weights < GIB

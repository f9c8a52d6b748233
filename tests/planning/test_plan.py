"""What a step needs, counted: against closed forms, against a real step, and against the table of an 8B model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    T5Config,
    TrainingArguments,
)

import clha_fast
from benchmarks import long_plan
from clha_fast.models.tiled import tile_mlps
from clha_fast.planning.live import LiveMemory
from clha_fast.planning.plan import GIB, Load, offloads, plan, table, ways_to_fit
from clha_fast.planning.step import Rows, Switches

WIDTH, INNER, LAYERS, WORDS = 128, 448, 4, 1000
LARGE = Load(1, 8, 16384, 16384)


def small(**changes):
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    return LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **changes})


def eight_billion():
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    return LlamaConfig(**sizes, **heads, tie_word_embeddings=False)


def test_live_memory_by_hand():
    given = torch.zeros(256)
    live = LiveMemory()
    live.known(given)
    with live:
        one = given + 1  # 1024 bytes
        view = one[:10]
        two = one.double()  # 2048
        del one
        assert live.now == 3072  # the view holds it
        del view
        assert live.now == 2048
        given.add_(1)
        del two
    assert (live.now, live.peak) == (0, 3072)


def test_fixed_parts_in_closed_form():
    """Weights by hand; AdamW keeps two numbers a trained weight; LoRA trains r (in + out) a layer, in float32."""
    found = plan(small(), Load(1, 2, 8, 8), Switches())
    weights = 2 * WORDS * WIDTH + LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH) + WIDTH
    assert (found.parameters, found.trained) == (weights, weights)
    buffers = found.memory.weights - 2 * weights
    assert 0 <= buffers < 1024  # rotary frequencies
    assert (found.memory.gradients, found.memory.optimizer) == (2 * weights, 4 * weights)
    lora = plan(small(), Load(1, 2, 8, 8), Switches(lora_rank=3))
    adapters = LAYERS * 3 * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))
    assert lora.trained == adapters
    assert (lora.memory.gradients, lora.memory.optimizer) == (4 * adapters, 8 * adapters)
    sgd = plan(small(), Load(1, 2, 8, 8), Switches(optimizer="sgd"))
    assert sgd.memory.optimizer == 0


@pytest.mark.parametrize(
    ("layout", "rows"), [("padded", Rows(6, 8, 18, 9)), ("packed", Rows(1, 48, 18, 9)), ("shared", Rows(1, 28, 18, 9))]
)
def test_rows_by_hand(layout, rows):
    assert Load(2, 3, 5, 3, layout).rows == rows


def test_rows_that_processes_share():
    """28 tokens over three processes: 10 in each, of the last all are scored; half of the layers' part over two."""
    assert Load(2, 3, 5, 3, "shared", 3).slices == Rows(1, 10, 10, 9)
    assert Load(1, 2, 1000, 500, "shared", 2).slices == Rows(1, 1000, 1000, 1000)
    spread = plan(small(), Load(1, 4, 64, 64, "shared", 2), Switches(memory=80 * 2**30))
    assert spread.backend == "triton", "there is no sweep that auto would take the workspace for"
    whole, half = (plan(small(), Load(1, 4, 64, 64, "shared", size), Switches()).memory for size in (1, 2))
    assert half.kept == pytest.approx(whole.kept / 2, rel=0.01)
    assert (half.weights, half.gradients) == (whole.weights, whole.gradients)
    with pytest.raises(ValueError, match="expected a divisor of the 4 attention heads, got 3"):
        plan(small(), Load(1, 4, 64, 64, "shared", 3), Switches())
    with pytest.raises(ValueError, match="sequence_parallel_size: expected 1 for a reward model, got 2"):
        plan(small(), Load(1, 4, 64, 64, "shared", 2), Switches(reward_model=True))
    with pytest.raises(ValueError, match="sequence_parallel_size: expected a positive whole number, got 0"):
        Load(1, 2, 3, 4, sequence_parallel_size=0)


def real_step(switches: Switches) -> int:
    """Bytes that a step of the library's own takes above weights, gradients and inputs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small()).train()
    if switches.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tile_mlps(model, switches.tiled_mlp)
    clha_fast.attach(model, backend="torch")
    ids = torch.randint(0, WORDS, (4, 256))
    rows = torch.cat([torch.arange(i * 256 + 127, i * 256 + 255) for i in range(4)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "row_index": rows}
    batch |= {"targets": ids.flatten()[rows + 1], "candidate_lengths": torch.full((4,), 128)}
    batch |= {"candidates_per_prompt": torch.tensor([4])}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    live = LiveMemory()
    live.known(*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *batch.values())
    with live:
        model(**batch).loss.backward()
    return live.peak


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tiled_mlp", [False, 64])
def test_the_count_is_what_a_real_step_takes(checkpointing, tiled_mlp):
    """At most a tenth more, and never less: all that stands beside a layer is taken to be there at a time."""
    switches = Switches(dtype=torch.float32, checkpointing=checkpointing, tiled_mlp=tiled_mlp, backend="torch")
    found = plan(small(), Load(1, 4, 128, 128), switches).memory
    real = real_step(switches)
    assert 1 <= (found.kept + found.layer) / real < 1.1


@pytest.mark.skipif(not offloads(), reason="an older release")
def test_an_8b_model_on_131072_tokens():
    """By hand: a layer's input is 2 H bytes a token; the others within what a count by hand gives (68, 38; 3.4)."""
    padded = plan(eight_billion(), LARGE, Switches(lora_rank=16)).memory
    assert 64 <= padded.kept / GIB < 64.3
    shared = plan(eight_billion(), Load(1, 8, 16384, 16384, "shared"), Switches()).memory
    assert 36 <= shared.kept / GIB < 36.2
    assert 0.9 * 38 < shared.layer / GIB < 1.1 * 38
    assert 15 < padded.weights / GIB < 15.2
    tiled = plan(eight_billion(), Load(1, 8, 16384, 16384, "shared"), Switches(tiled_mlp=True, offload=True)).memory
    assert tiled.layer < 0.65 * shared.layer
    assert (tiled.kept / GIB < 0.2, round(tiled.host / GIB)) == (True, 36)


@pytest.mark.skipif(not offloads(), reason="an older release")
def test_ways_to_fit():
    """What is turned on is needed: without one of them it does not fit, and what changes learning comes last."""
    load = Load(1, 8, 512, 512)
    kept = Switches(checkpointing=False, backend="torch")
    asked = plan(small(), load, kept).memory.total
    names, found = ways_to_fit(small(), load, kept, asked // 3)
    assert names == ["layout=shared", "checkpointing"]
    assert found.memory.total <= asked // 3
    assert "layer checkpoints" in table(found)
    names, found = ways_to_fit(small(), load, Switches(backend="torch"), 2**20)
    assert names == ["layout=shared", "tiled_mlp", "offload", "lora_rank=16"]
    assert found.memory.total > 2**20
    names, found = ways_to_fit(small(), load, Switches(), GIB)
    assert (names, found.load.layout) == ([], "padded")


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=100),
        GptOssConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, vocab_size=100, num_local_experts=4),
        Gemma3TextConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=6, vocab_size=100),
        DeepseekV3Config(
            hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=4, vocab_size=100,
            n_routed_experts=16, first_k_dense_replace=2,
        ),
        GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=100),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_other_architectures(config):
    """A layer's checkpoint is its input, whatever is in it; without checkpointing more is kept."""
    layers, tokens = config.num_hidden_layers, 24 * 1024
    kept = plan(config, Load(4, 3, 1024, 1024), Switches()).memory.kept
    rotations = (
        4 * tokens * (getattr(config, "head_dim", None) or 64) * 2
    )  # sines and cosines, of two kinds at the most
    assert 0 <= kept - layers * tokens * 64 * 2 < 2 * rotations
    assert plan(config, Load(4, 3, 1024, 1024), Switches(checkpointing=False)).memory.kept > 5 * kept


def test_refusals():
    with pytest.raises(ValueError, match="layout: expected one of padded, packed, shared, got 'tree'"):
        Load(1, 2, 3, 4, "tree")
    with pytest.raises(ValueError, match="response: expected a positive whole number, got 0"):
        Load(1, 2, 3, 0)
    with pytest.raises(ValueError, match=r"encoder-decoder|Unrecognized configuration class"):
        plan(T5Config(), Load(1, 2, 3, 4), Switches())


@pytest.mark.slow
def test_the_page_has_what_is_counted():
    assert f"{long_plan.BEGIN}\n{long_plan.table()}\n" in long_plan.PAGE.read_text(encoding="utf-8")


def test_offload_is_counted_where_training_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    load, switches = Load(1, 2, 64, 64, "padded"), Switches(checkpointing=False, backend="torch")
    monkeypatch.delitem(TrainingArguments.__dataclass_fields__, "activation_checkpointing_kwargs", raising=False)
    with pytest.raises(ValueError, match=r"^offload: expected False with transformers \d.* \(5\.23 has\), got True$"):
        plan(small(), load, dataclasses.replace(switches, offload=True))
    assert "offload" not in ways_to_fit(small(), load, switches, 1)[0]


@pytest.mark.skipif(not offloads(), reason="an older release")
@pytest.mark.parametrize("reward_model", [False, True])
def test_ways_are_those_that_the_trainer_has(reward_model: bool) -> None:
    """MLPs a tile at a time are a setting of language models' training alone."""
    switches = Switches(checkpointing=False, reward_model=reward_model)
    names, _ = ways_to_fit(small(), Load(1, 2, 64, 64, "padded"), switches, 1)
    assert ("tiled_mlp" in names) != reward_model
    assert {"checkpointing", "offload"} <= set(names)

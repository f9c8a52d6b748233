"""Packed and shared rows through real models: against rows alone, and what is refused."""

from __future__ import annotations

import functools
import logging
import threading

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

import clha_fast
from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.segments import TokenSegments
from clha_fast.models import segment_masks
from clha_fast.models.layout_probe import candidates_of, pack
from clha_fast.models.measure import measure_head
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.objectives.sft import SFTOptions
from tests.support.architecture_configs import shrink
from tests.support.architectures import build
from tests.support.layouts import compare, texts
from tests.support.tiny import make_model, make_rows, make_tokenizer
from tests.support.versions import lacks_type, older

TOKENIZER = make_tokenizer()
OLD = older("transformers", "5.15")  # its short convolutions are layers by themselves


def model_of(kind: str, **changes: object) -> nn.Module:
    if lacks_type(kind):
        pytest.skip(f"this transformers has no model type {kind}")
    config = shrink(kind, False)
    for name, value in changes.items():
        setattr(config, name, value)
    return build(config)


def llama() -> nn.Module:
    return make_model(len(TOKENIZER)).eval()


def collate(layout: str, count: int = 3, start: int = 0, **settings) -> dict:
    return RankedCollator(TOKENIZER, layout=layout, **settings)(make_rows(start + count)[start:])


# ---- right ----

# Windows of 16 tokens and prompts of 40 (mistral, gemma, gpt_oss, cohere2), softcaps (gemma2), sinks (gpt_oss), latent
# attention (deepseek_v3), experts (qwen3_moe, gpt_oss), learned positions (gpt2, opt), partial rotations (glm4,
# gpt_neox), no rotation in some layers (smollm3), grouped heads, hidden states scaled (granite).
KINDS = (
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_moe",
    "gpt2",
    "opt",
    "cohere2",
    "glm4",
    "gpt_neox",
    "smollm3",
    "granite",
    "falcon",
)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [*((kind, "shared") for kind in KINDS), *((kind, "packed") for kind in ("gemma2", "opt", "bloom"))],
)
def test_values_and_all_gradients_are_those_of_rows_alone(kind: str, layout: str) -> None:
    model = model_of(kind)
    if layout == "shared" and model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    assert clha_fast.attach(model, SFTOptions(), layout=layout).detach() is model
    nats, relative = compare(model, measure_head(model), texts(), layout)
    assert nats < 2e-5
    assert relative < 2e-4  # where the whole is 1; of a leak or a wrong position 1e-2 and more


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("drop_inert", [True, False])
def test_the_loss_is_that_of_padded_rows(layout: str, drop_inert: bool) -> None:
    model = llama().double()
    clha_fast.attach(model, layout=layout)
    found = []
    for name in ("padded", layout):
        model.zero_grad()
        output = model(**collate(name, drop_inert=drop_inert, pad_to_multiple_of=8))
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((output.loss.item(), output.metrics.values, output.metrics.scores, gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_and_training_mode() -> None:
    model = llama().double()
    clha_fast.attach(model, layout="shared")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        output = model(**collate("shared"))
        output.loss.backward()
        found.append((output.loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-8)


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(llama().double(), peft.LoraConfig(target_modules=["q_proj", "v_proj", "lm_head"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    clha_fast.attach(wrapped, layout="shared")
    found = []
    for layout in ("padded", "shared"):
        wrapped.zero_grad()
        output = wrapped(**collate(layout))
        output.loss.backward()
        gradients = [p.grad.flatten() for p in wrapped.parameters() if p.requires_grad]
        found.append((output.loss.detach(), torch.cat(gradients)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_threads_with_different_layouts() -> None:
    model = llama()
    clha_fast.attach(model, layout="shared")
    batches = [collate(layout, start=start) for start in (0, 3) for layout in ("padded", "shared")]
    expected = [model(**batch).loss.item() for batch in batches]
    got: list[list[float]] = [[] for _ in batches]

    def work(number: int) -> None:
        for _ in range(8):
            got[number].append(model(**batches[number]).loss.item())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[value] * 8 for value in expected]


def test_log_probabilities_of_a_frozen_model() -> None:
    model = llama().double()
    attached = clha_fast.attach(model, layout="shared")
    padded, shared = (attached.token_logps(collate(layout, drop_inert=False)) for layout in ("padded", "shared"))
    torch.testing.assert_close(padded, shared, rtol=1e-10, atol=1e-12)


def test_attach_leaves_modes_and_random_states_alone() -> None:
    model = llama().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    clha_fast.attach(model, layout="shared")
    model(**collate("shared"))  # compared with rows alone before it runs
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


# ---- refused ----


@pytest.mark.parametrize(
    ("kind", "layout", "layer"),
    [
        ("bloom", "shared", "BloomAttention"),
        ("mpt", "shared", "MptAttention"),
        ("mamba", "packed", "asks for no attention mask"),
        ("mamba", "shared", "asks for no attention mask"),
        ("qwen3_next", "packed", "Qwen3NextGatedDeltaNet"),
        ("qwen3_next", "shared", "Qwen3NextGatedDeltaNet"),
        ("bart", "packed", "BartLearnedPositionalEmbedding"),
        ("bart", "shared", "BartLearnedPositionalEmbedding"),
        # Not the attention behind it, whose keys of the prompt are others by then.
        ("olmo_hybrid", "packed", "OlmoHybridShortConvolution" if OLD else "OlmoHybridGatedDeltaNet"),
        ("blenderbot", "packed", "BlenderbotLearnedPositionalEmbedding"),
        ("xlnet", "shared", "asks for no attention mask"),
    ],
)
def test_refused_by_name(kind: str, layout: str, layer: str) -> None:
    model = model_of(kind)
    with pytest.raises(UnsupportedLayoutError) as error:
        clha_fast.attach(model, SFTOptions(), layout=layout)
    text = str(error.value)
    assert type(model).__name__ in text
    assert layer in text
    assert "layout='padded' runs with any model" in text
    assert not hasattr(model, "_clha_attached")


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_linear_biases_are_right_in_packed_rows(kind: str) -> None:
    assert clha_fast.attach(model_of(kind), SFTOptions(), layout="packed").layout == "packed"


def neo(window: int) -> nn.Module:
    config = GPTNeoConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=window,
        max_position_embeddings=1024,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    return GPTNeoForCausalLM(config).eval()


def test_a_window_is_probed_beyond_its_end() -> None:
    """Its local layers have a mask of their own, which counts places."""
    with pytest.raises(UnsupportedLayoutError, match="GPTNeoSelfAttention"):
        clha_fast.attach(neo(256), SFTOptions(), layout="shared")


def test_a_window_too_long_to_probe_is_seen_in_the_first_longer_batch() -> None:
    model = neo(600)
    clha_fast.attach(model, SFTOptions(), layout="shared")
    model(**pack(texts(prompts=(40,)), "shared").as_dict())
    with pytest.raises(UnsupportedLayoutError, match=r"GPTNeoForCausalLM.*log-probabilities differ"):
        model(**pack(texts(prompts=(620,), sizes=(200, 8)), "shared").as_dict())


def test_a_planted_leak_is_caught(monkeypatch) -> None:
    def leaking(own, tokens):
        groups, positions = tokens.group_ids, tokens.position_ids

        def sees(row, head, query, key):
            return (groups[row, query] == groups[row, key]) & own(row, head, positions[row, query], positions[row, key])

        return sees

    monkeypatch.setattr(segment_masks, "by_position", leaking)
    model = llama()
    model.set_attn_implementation("eager")  # sdpa takes no mask in such rows
    with pytest.raises(UnsupportedLayoutError, match="LlamaForCausalLM: LlamaAttention"):
        clha_fast.attach(model, layout="shared")


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_a_leak_too_small_for_values_is_caught(monkeypatch, layout: str) -> None:
    """One that a gradient alone shows: of a token's embedding that is a millionth in another's."""
    model = llama()

    def blend(module, args, output):
        return output + 1e-7 * output.cumsum(1) if output.shape[:2] != (1, 1) else output

    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: ((blend(module, args, args[0]), *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(UnsupportedLayoutError, match=r"a candidate sees others .a gradient of"):
        clha_fast.attach(model, layout=layout)


def test_planted_wrong_positions_are_caught(monkeypatch) -> None:
    def places(self):
        tokens = TokenSegments(*_tokens(self))
        return tokens._replace(position_ids=torch.arange(self.width).repeat(self.rows, 1))

    from clha_fast.batching.segments import Segments

    _tokens = Segments.tokens
    monkeypatch.setattr(Segments, "tokens", places)
    with pytest.raises(UnsupportedLayoutError, match="log-probabilities differ"):
        clha_fast.attach(model_of("gpt2"), SFTOptions(), layout="shared")


def test_an_error_of_a_hook_is_its_own() -> None:
    """In the first comparison, and in the trial itself; what a layer says of a row is the layout's."""

    class Mine:
        def __call__(self, module, args, output):
            if output.shape[1] > 2:
                raise RuntimeError("mine")

    def mine(module, args):
        raise ValueError("mine")

    for registered in (Mine(), functools.partial(Mine.__call__, None)):
        model = llama()
        handle = model.model.layers[1].mlp.register_forward_hook(registered)
        with pytest.raises(RuntimeError, match=r"^mine$"):
            clha_fast.attach(model, layout="shared")
        assert model not in segment_masks.IN_TWO_CALLS
        handle.remove()
        clha_fast.attach(model, layout="shared")
    model.model.embed_tokens.register_forward_pre_hook(mine)
    with pytest.raises(ValueError, match=r"^mine$"):
        model(**collate("shared"))
    model = llama()
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: forward(x) if x.shape[1] <= 40 else x.view(-1, 7, 5)
    with pytest.raises(UnsupportedLayoutError, match="does not run a row of"):
        clha_fast.attach(model, layout="shared")


def test_auto(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="clha_fast"):
        model = llama()
        attached = clha_fast.attach(model, layout="auto")
        assert attached.layout == "auto"
        assert clha_fast.attach(model_of("bloom"), SFTOptions(), layout="auto").layout == "padded"
    said = [text for text in caplog.messages if text.startswith("layout auto")]
    assert len(said) == 2
    assert said[0] == (
        "layout auto: shared where it leaves at most 90% of a batch's tokens, else padded (LlamaForCausalLM computes "
        "shared rows as rows alone)"
    )
    assert "BloomAttention" in said[1]
    assert [record.levelname for record in caplog.records if "layout auto" in record.message] == ["INFO", "WARNING"]
    model = model.double()
    found = {layout: model(**collate(layout, drop_inert=False)).loss for layout in ("auto", "shared", "padded")}
    assert torch.equal(found["auto"], found["shared"])
    torch.testing.assert_close(found["auto"], found["padded"], rtol=1e-5, atol=1e-6)
    one = [{"prompt": "say: a cat", "completions": ["sat on a mat"]}]
    batch = RankedCollator(TOKENIZER, SFTOptions(), layout=attached.layout)(one)
    assert "segments" not in batch


def test_batches_of_a_layout_that_was_not_probed() -> None:
    model = llama()
    with clha_fast.attach(model), pytest.raises(UnsupportedLayoutError, match=r"attach\(model, layout='shared'\)"):
        model(**collate("shared"))
    with clha_fast.attach(model, layout="packed") as attached:
        model(**collate("packed"))
        model(**collate("padded"))
        with pytest.raises(UnsupportedLayoutError, match="expected packed rows, got shared ones"):
            model(**collate("shared"))
        with pytest.raises(UnsupportedLayoutError, match="expected packed rows, got shared ones"):
            attached.token_logps(collate("shared"))
    with pytest.raises(ValueError, match="layout: expected one of padded, packed, shared, auto, got 'tree'"):
        clha_fast.attach(model, layout="tree")


def test_what_rows_of_several_candidates_do_not_take() -> None:
    model = llama()
    clha_fast.attach(model, layout="shared")
    batch = collate("shared")
    with pytest.raises(UnsupportedLayoutError, match="pixel_values: expected tokens alone"):
        model(**batch, pixel_values=torch.zeros(1))
    with pytest.raises(UnsupportedLayoutError, match="inputs_embeds: expected tokens alone"):
        model(**batch, inputs_embeds=torch.zeros(1, 2, 32))
    for name in ("segments", "segment_ids", "group_ids", "position_ids"):
        rest = {field: value for field, value in batch.items() if field != name}
        with pytest.raises(
            ValueError, match=f"^{name}: expected, as all of segments, position_ids, segment_ids, group_ids"
        ):
            model(**rest)


def test_virtual_tokens_are_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(UnsupportedLayoutError, match=r"without virtual tokens .*got 3 in front of each row"):
        clha_fast.attach(model, layout="shared")


def test_bfloat16_is_rounding_and_a_leak_is_not() -> None:
    model = model_of("llama").bfloat16()
    clha_fast.attach(model, SFTOptions(), layout="shared").detach()
    with pytest.raises(UnsupportedLayoutError):
        clha_fast.attach(model_of("mpt").bfloat16(), SFTOptions(), layout="shared")


def test_a_saved_model_comes_back_with_its_layout(tmp_path) -> None:
    model = llama()
    clha_fast.attach(model, layout="shared")
    expected = model(**collate("shared")).loss
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(other(**collate("shared")).loss, expected)


def test_every_candidate_alone_is_what_it_is_beside_others() -> None:
    """The log-probabilities of the model's own logits, by hand."""
    model = llama().double()
    attached = clha_fast.attach(model, SFTOptions(), layout="shared")
    prompt, answers = [5, 6, 7], [[8, 9], [10], [11, 12, 13]]
    got = attached.token_logps(pack([candidates_of(prompt, answers)], "shared").as_dict())
    expected = []
    for answer in answers:
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        expected += [logits[len(prompt) - 1 + place, token] for place, token in enumerate(answer)]
    torch.testing.assert_close(got, torch.stack(expected).detach(), rtol=1e-10, atol=1e-12)


def test_auto_classes_have_the_attention_that_is_probed() -> None:
    config = shrink("llama", False)
    model = AutoModelForCausalLM.from_config(config)  # sdpa, as users have it
    assert model.config._attn_implementation == "sdpa"
    assert clha_fast.attach(model.eval(), SFTOptions(), layout="shared").layout == "shared"

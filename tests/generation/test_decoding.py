"""Answers are drawn from what the model's own forward gives: with the cache, without it, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from clha_fast.data.prompts import PromptRecord
from clha_fast.generation import GenerationSettings, TransformersBackend, encode_prompts
from clha_fast.generation.decoding import Decoding, Tried, _Trial
from clha_fast.generation.tokens import generate_tokens
from clha_fast.training import samples
from clha_fast.training.rollout import RolloutConfig, RolloutTrainer
from tests.support.architecture_configs import OVERRIDES, shrunk_fields
from tests.support.architectures import build
from tests.support.reward_models import spread
from tests.support.tiny import make_model, make_tokenizer
from tests.support.versions import needs

TOKENIZER = make_tokenizer()
RECORDS = [
    PromptRecord("the cat sat on a mat and then a dog ran over it with some joy"),
    PromptRecord("a dog ran over old green hills and then the cat sat on a mat while rain fell"),
]
LENGTH = 6


def tiny(kind: str) -> Any:
    """Of the tokenizer's size, and with its special tokens."""
    config_class = CONFIG_MAPPING[kind]
    ids = {"vocab_size": len(TOKENIZER), "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    changes = {"tie_word_embeddings": False, **OVERRIDES.get(kind, {}), **ids}
    return build(config_class(**shrunk_fields(config_class, changes)))


def prompted(config: Any) -> Any:
    model: Any = peft.get_peft_model(spread(make_model(len(TOKENIZER))), config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "prompt_encoder" in name:
                weight.normal_(generator=torch.Generator().manual_seed(3))
    return model


class Late(LlamaForCausalLM):
    """Takes a token that follows a cache for the one behind it."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None and position_ids.shape[-1] == 1:
            position_ids = position_ids + 1
        return super().forward(*args, position_ids=position_ids, **kwargs)


def late() -> Any:
    return spread(Late(make_model(len(TOKENIZER)).config))


VIRTUAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
# Their own forward is heeded by decoding without the cache alone.
WITHOUT_CACHE = {
    "moshi": lambda: tiny("moshi"),
    "prompt tuning": lambda: prompted(peft.PromptTuningConfig(**VIRTUAL)),
    "p-tuning": lambda: prompted(peft.PromptEncoderConfig(encoder_hidden_size=16, **VIRTUAL)),
    "positions": late,
}


def without_cache(name: str) -> Any:
    if "tuning" in name:
        needs("transformers", "5.24", "decodes behind virtual tokens with its cache as without")
    return WITHOUT_CACHE[name]()


def by_hand(model: Any, prompt: list[int]) -> list[int]:
    """The greedy tokens, one full forward each."""
    found: list[int] = []
    while len(found) < LENGTH and 1 not in found:
        with torch.no_grad():
            row = torch.tensor([[*prompt, *found]])
            logits = model(row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, -1]
        found.append(int(logits.argmax()))
    return found


@pytest.mark.parametrize("name", WITHOUT_CACHE)
def test_a_cache_that_gives_other_answers_is_left_out(name: str, tmp_path: Path, caplog: Any) -> None:
    model = without_cache(name)
    prompts = [list(TOKENIZER(str(record.prompt))["input_ids"]) for record in RECORDS]
    expected = [by_hand(model, prompt) for prompt in prompts]
    assert len(set(map(tuple, expected))) == 2
    texts = [TOKENIZER.decode(row, skip_special_tokens=True).strip() for row in expected]
    backend = TransformersBackend(model, TOKENIZER)
    encoded = encode_prompts(RECORDS, TOKENIZER, GenerationSettings(LENGTH), backend.max_positions)
    assert [backend.answer([prompt], encoded.settings)[0].text for prompt in encoded.prompts] == texts
    assert caplog.text.count("answers without its cache, which takes longer") == 1
    assert samples.generate(model, prompts, TOKENIZER, [1], torch.device("cpu"), LENGTH) == expected
    caplog.clear()
    ours = trainer(tmp_path, model)
    answers = [ours._sample(ours.model.eval(), [prompt], [0], LENGTH, 0.0)[0] for prompt in encoded.prompts]
    assert answers == expected
    assert caplog.text.count("answers without its cache") == 1


def trainer(folder: Path, model: Any, **changes: Any) -> RolloutTrainer:
    quiet: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = RolloutConfig(str(folder), max_steps=1, per_device_eval_batch_size=1, **quiet, **changes)
    return RolloutTrainer(
        model, args, lambda records, answers: [[0.0] * len(texts) for texts in answers], RECORDS, None, TOKENIZER
    )


@pytest.mark.parametrize(("name", "cached"), [("mamba", True), ("falcon_h1", True), ("prompt tuning", False)])
def test_the_trainer_s_autocast_is_within_the_forward(name: str, cached: bool, tmp_path: Path) -> None:
    model = without_cache(name) if name in WITHOUT_CACHE else tiny(name)
    ours = trainer(tmp_path, model, bf16=True, answers_per_prompt=2, max_completion_length=LENGTH)
    ours.train()
    assert [tried.use_cache for tried in ours._sampling.tried.values()] == [cached]


def drawn(rows: int = 1, length: int = LENGTH) -> dict[str, Any]:
    return {"ends": [], "pad": 2, "max_new_tokens": length, "temperature": 1.0, "seeds": range(rows)}


def draw(model: Any, prompts: list[list[int]], trained: bool = False, length: int = LENGTH) -> Decoding:
    decoding = Decoding(trained=trained)
    decoding.answer(model, prompts, **drawn(len(prompts), length))
    return decoding


@pytest.mark.parametrize("kind", ["xlnet", "xlm", "cpmant"])
def test_answers_that_are_never_the_model_s_own(kind: str, caplog: Any) -> None:
    """Of models whose forward looks ahead, or computes a row otherwise than its beginning."""
    if kind == "cpmant":
        needs("transformers", "5.24", "may end in an error where CPM-Ant decodes with its cache")
    model, prompts = tiny(kind), [list(range(3, 12))]
    with pytest.raises(ValueError, match=r"^model: expected one whose answers are drawn from the .* its cache and"):
        draw(model, prompts, trained=True)
    said = Decoding()
    for length in (LENGTH, LENGTH, 3 * LENGTH):
        said.answer(model, prompts, **drawn(length=length))
    assert said.tried[False].use_cache
    assert caplog.text.count("draws answers from other distributions than its own forward") == 1


RIGHT = ["gpt2", "roberta", "mixtral", "gemma2", "mamba", "zamba2", "falcon_h1", "bloom"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", RIGHT)
def test_rounding_is_none(kind: str, dtype: torch.dtype, caplog: Any) -> None:
    if kind == "zamba2":
        needs("transformers", "5.15", "reads ahead in the forward of Zamba2")
    found = draw(tiny(kind).to(dtype), [list(range(3, 20))], trained=True, length=16)
    assert found.tried == {False: Tried(use_cache=True, longest=33, new=16)}
    assert not [record for record in caplog.records if record.name == "clha_fast"]


class Direct(LlamaForCausalLM):
    """Reads its embedding's weight without a call of the module; nor does what was compiled before call new hooks."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        embedded = torch.nn.functional.embedding(input_ids, self.get_input_embeddings().weight)
        return super().forward(inputs_embeds=embedded, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_none_where_no_module_embeds(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
    model: Any = spread(Direct(LlamaConfig(**sizes, num_attention_heads=4))).to(dtype)
    found = draw(model, [list(range(3, 20))], trained=True, length=16)
    assert found.tried == {False: Tried(use_cache=True, longest=33, new=16)}


@pytest.mark.parametrize(("changes", "mixed"), [({}, True), ({}, False), ({"trainable_token_indices": [3, 4]}, False)])
def test_adapters_are_asked_as_their_models(changes: dict[str, Any], mixed: bool) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False, **changes)
    model: Any = peft.get_peft_model(spread(make_model(len(TOKENIZER))), config, mixed=mixed).eval()
    found = draw(model, [list(range(3, 20)), list(range(3, 9))], trained=True)
    assert found.tried == {True: Tried(use_cache=True, longest=17 + LENGTH, new=LENGTH)}


class NoFloat64(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        assert not any(isinstance(part, Tensor) and part.dtype == torch.float64 for part in tree_leaves(found)), func
        return found


@pytest.mark.parametrize("prompts", [[[3, 4, 5]], [[3, 4, 5], [6, 7, 8, 9]]])
def test_a_device_may_have_no_float64(prompts: list[list[int]]) -> None:
    model, decoding = tiny("gpt2"), Decoding(trained=True)
    with NoFloat64():
        decoding.answer(model, prompts, **{**drawn(len(prompts)), "temperature": 0.0})
    assert [tried.use_cache for tried in decoding.tried.values()] == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["moshi", "prompt tuning", "p-tuning"])
def test_no_other_answers_are_rounding(name: str, dtype: torch.dtype) -> None:
    model = without_cache(name).to(dtype)
    assert not draw(model, [list(range(3, 20))], trained=True).tried[False].use_cache


@pytest.mark.parametrize(("before", "after"), [((4, 4), (20, 4)), ((4, 1), (4, 20))])
def test_what_begins_with_longer_rows(before: tuple[int, int], after: tuple[int, int], caplog: Any) -> None:
    """Its cache is right for up to 16 tokens, its window of attention."""
    model, decoding = tiny("moshi"), Decoding(trained=True)
    for (prompt, length), cached in ((before, True), (after, False), (before, False)):
        decoding.answer(model, [list(range(3, 3 + prompt))] * 2, **drawn(2, length))
        assert decoding.tried[False].use_cache is cached
    assert caplog.text.count("answers without its cache") == 1


def test_what_is_right_without_the_cache_is_said_once(caplog: Any) -> None:
    model, decoding, row = late(), Decoding(), list(range(3, 12))
    for prompts in ([row], [row, row[:4]], [row * 3], [row * 3, row]):
        decoding.answer(model, prompts, **drawn(len(prompts)))
    assert not any(tried.use_cache for tried in decoding.tried.values())
    assert caplog.text.count("answers without its cache") == 1


def test_what_is_shown_already_is_not_made_anew() -> None:
    model, prompt = late(), list(range(3, 20))
    asked = {**drawn(), "temperature": 0.0}
    cached, plain = (generate_tokens(model, [prompt], **asked, use_cache=cache) for cache in (True, False))
    assert cached != plain
    decoding = Decoding()
    assert decoding.answer(model, [prompt], **asked, shown=True) == cached
    assert decoding.answer(model, [prompt], **asked, shown=True) == plain


@pytest.mark.parametrize("kind", ["roberta", "camembert", "xlm-roberta"])
def test_a_compiled_model_s_positions_begin_where_its_own_do(kind: str) -> None:
    model = tiny(kind)
    with torch.no_grad():
        model.get_output_embeddings().bias[2] = -30  # a pad that is written is padding to its forward
    prompt = list(range(3, 12))
    compiled = torch.compile(model, backend="eager")
    (answer,) = samples.generate(compiled, [prompt], TOKENIZER, [1], torch.device("cpu"), LENGTH)
    assert answer == by_hand(model, prompt)


def undecided(kind: str, dtype: torch.dtype) -> Any:
    """A mixture of two experts, one a token, whose router finds them nearly equal: rounding chooses."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    experts = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = spread(AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **experts, **shape)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
                weight[1] = weight[0] + 1e-3 * weight[1]
            elif "norm" not in name:
                weight.mul_(4)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_rounding_that_chooses_between_experts_is_none(kind: str, dtype: torch.dtype, caplog: Any) -> None:
    model = undecided(kind, dtype)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    found = draw(model, [list(range(3, 20)), list(range(30, 40))], trained=True, length=16)
    assert found.tried == {True: Tried(use_cache=True, longest=33, new=16)}
    assert not [record for record in caplog.records if record.name == "clha_fast"]
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


class Narrow(nn.Module):
    """A kernel that takes 16 bits alone, as it says."""

    def __init__(self, inner: nn.Module, error: Callable[[str], Exception]) -> None:
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.dtype == torch.float32:
            raise self.error("float32 is not supported")
        return self.inner(hidden)


def looked_at(model: Any) -> bool:
    """What is said of a few tokens that are decoded once more in float32."""
    trial = _Trial(model, 2, 3, torch.device("cpu"))
    return trial.right_in_float32([[3, 4, 5, 6]], [[7, 8, 9]], use_cache=True)


@pytest.mark.parametrize("error", [AssertionError, KeyError, torch.OutOfMemoryError])
def test_what_takes_no_float32_ends_no_run(error: type[Exception]) -> None:
    model = undecided("mixtral", torch.bfloat16)
    assert looked_at(model)
    model.model.norm = Narrow(model.model.norm, error)
    assert not looked_at(model)


@pytest.mark.parametrize(
    ("error", "trained", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True, True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: tried to allocate 9"), False, True),
        (MemoryError(), False, True),
        (RuntimeError("expected scalar type BFloat16"), True, False),
    ],
    ids=["a GPU's", "a CPU's", "Python's", "a kernel"],
)
def test_that_memory_was_short_for_float32_is_said(error: Exception, trained: bool, said: bool, caplog: Any) -> None:
    model = undecided("mixtral", torch.bfloat16)
    model.model.norm = Narrow(model.model.norm, lambda _: error)
    text = ""
    try:
        draw(model, [list(range(3, 20)), list(range(30, 40))], trained=trained, length=16)
    except ValueError as refused:
        text = str(refused)
    text += caplog.text
    assert "of their size" in text
    assert ("; whether it is their rounding alone was not seen: float32 beside them did not fit memory" in text) is said


def test_offloaded_weights_are_left_as_they_are() -> None:
    model = undecided("mixtral", torch.bfloat16)
    weights = {name: weight.clone() for name, weight in model.model.layers.state_dict().items()}
    attach_align_device_hook(model.model.layers, execution_device="cpu", offload=True, weights_map=weights)
    prompt = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(prompt).logits
        looked_at(model)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert torch.equal(before, model(prompt).logits)


class Coarse(MixtralForCausalLM):
    """Decodes off by 1e-3 of its logits, in any dtype."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if kwargs.get("use_cache"):
            size = output.logits.abs().amax(-1, keepdim=True)
            output.logits = output.logits + 1e-3 * size * (-1) ** torch.arange(output.logits.shape[-1])
        return output


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has one switch, of GPUs")
@pytest.mark.parametrize(("precision", "right"), [("highest", False), ("high", True)])
def test_float32_rounds_as_torch_is_set(precision: str, right: bool) -> None:
    """To TF32, where that is allowed."""
    model: Any = undecided("mixtral", torch.bfloat16)
    model.__class__ = Coarse
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", torch.bfloat16):  # is off in float32
            assert looked_at(model) is right
    finally:
        torch.set_float32_matmul_precision(before)

"""Models with adapters, quantised heads and virtual tokens: the table of `adapters.py`, and what it does not show."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.peft import MIN_PEFT_VERSION

import clha_fast
from clha_fast import HeadOptions, reference
from clha_fast.errors import BackendError
from clha_fast.models.attach import empty_batch
from clha_fast.models.heads import HeadForward, UnsupportedHeadError, inspect_head
from clha_fast.models.own_forward import token_statistics
from clha_fast.ops import dispatch
from clha_fast.training.config import CLHAConfig
from clha_fast.training.trainer import CLHATrainer
from clha_fast.types import STATISTICS
from tests.support.adapter_table import render
from tests.support.adapters import (
    ADDED_BY_TRANSFORMERS,
    BODY,
    CASES,
    HEAD,
    OPTIONS,
    REFUSED,
    TOKENIZER,
    WORKSPACE,
    Int8,
    Measured,
    adapted,
    attach,
    base,
    collate,
    compare,
    eager_loss,
    gradients,
    inference_only,
    lora,
    sentence,
    virtual,
    with_head,
)
from tests.support.tiny import make_rows
from tests.support.versions import needs

SAID = {
    "LoRA on the head, attached before get_peft_model": "detach, change the head and attach again",
    "modules_to_save=['lm_head'], attached before get_peft_model": "detach, change the head and attach again",
    "Prompt tuning, attached before get_peft_model": "attach the PeftModel itself, after get_peft_model",
    "LLaMA-Adapter (AdaptionPrompt), attached after get_peft_model": "with peft: attach first, then get_peft_model",
    "modules_to_save=['lm_head'], adapter disabled after attach": "or another one active",
    "LoRA on the head, several adapters in a batch (adapter_names)": "it was called with adapter_names as well",
    "LoRA on the head, backend='triton'": "backend 'triton' cannot run on the output embedding peft",
    "Lily on the head": "its forward mixes tokens (the logits of one depend on others of the batch)",
    "A head without a backward (torch's dynamic int8), in training": "made for inference alone",
}


@pytest.mark.parametrize("name", CASES)
def test_like_the_models_own_logits(name: str) -> None:
    if name == ADDED_BY_TRANSFORMERS:
        needs("peft", MIN_PEFT_VERSION, f"is refused by the add_adapter of transformers {transformers.__version__}")
    measured = CASES[name]()
    assert measured.right, measured
    alone = ("merge_and_unload", "modules_to_save", "body", "input")
    if any(word in name for word in ("on the head", "as the head")) and not any(word in name for word in alone):
        assert measured.chunks


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name: str) -> None:
    assert SAID[name] in sentence(name)


def test_the_table_tells_wrong_from_right() -> None:
    table = render({"one": Measured(1e-7, 1e-7), "two": Measured(1e-7, 1e-3, chunks=True)}, ["three"])
    assert "**1 of 2 right.**" in table
    assert "| two | own forward | 1.0e-07 | 1.0e-03 | **wrong** |" in table
    assert f"| three | | | | not run: transformers asks for peft {MIN_PEFT_VERSION} |" in table


def test_the_adapter_on_the_head_is_felt() -> None:
    """What the base weight alone would give is another loss by far."""
    for model in (lora(HEAD), lora(BODY, modules_to_save=["lm_head"])):
        wanted, plain = eager_loss(model, collate()).item(), copy.deepcopy(model)
        plain.get_output_embeddings = None
        wrapper = plain.base_model.model.lm_head
        plain.base_model.model.lm_head = getattr(wrapper, "base_layer", None) or wrapper.original_module
        assert abs(eager_loss(plain, collate()).item() - wanted) > 0.05


class Shapes(TorchDispatchMode):
    """Notes the shape of everything that is computed, and which gradients the fused loss was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()
        self.asked: list[tuple[bool, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() == "clha_fast::linear_loss":
            self.asked.append(args[-3:])
        parts = result if isinstance(result, (tuple, list)) else [result]
        views = any(value is part for part in parts for value in args)
        if not views and not func.is_view:
            self.seen |= {tuple(part.shape) for part in parts if isinstance(part, Tensor)}
        return result


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_head_has_no_weight_gradient_and_no_buffer_for_one(frozen: bool) -> None:
    model = lora(BODY)
    model.base_model.model.lm_head.weight.requires_grad_(not frozen)
    with attach(model), Shapes() as shapes:
        model(**collate().as_dict()).loss.backward()
    assert shapes.asked == [(True, not frozen, False)]
    assert (tuple(model.base_model.model.lm_head.weight.shape) in shapes.seen) is not frozen
    assert (model.base_model.model.lm_head.weight.grad is None) is frozen


def test_chunks_are_bounded() -> None:
    model, batch, counts = lora(HEAD), collate(), []
    head = model.base_model.model.lm_head
    head.base_layer.register_forward_hook(lambda module, args, output: counts.append(args[0].shape[:-1].numel()))
    with attach(model), Shapes() as shapes:
        counts.clear()
        model(**batch.as_dict()).loss.backward()
    assert max(counts) == WORKSPACE // (len(TOKENIZER) * 16)
    assert sum(counts) == 2 * len(batch.targets)  # the forward, and its repetition in the backward
    widest = max(
        (shape for shape in shapes.seen if shape[-1:] == (len(TOKENIZER),)), key=lambda s: torch.Size(s).numel()
    )
    assert torch.Size(widest).numel() <= max(counts) * len(TOKENIZER)


def test_dropout_in_the_head_is_the_same_in_the_backward() -> None:
    model, batch = lora(HEAD, lora_dropout=0.5), collate()
    info = inspect_head(model, own_forward=True)
    forward = info.own_forward
    assert isinstance(forward, HeadForward)
    hidden = torch.randn(batch.input_ids.numel(), 32, requires_grad=True)
    trained = [p for p in info.module.parameters() if p.requires_grad]
    upstream = torch.linspace(-1, 1, len(batch.targets))
    torch.manual_seed(3)
    head = HeadOptions(workspace_bytes=WORKSPACE)
    given = {"row_index": batch.row_index, "head": head}
    logps, _ = token_statistics(hidden, forward, batch.targets, (), **given)
    got = torch.autograd.grad(logps @ upstream, [hidden, *trained])
    torch.manual_seed(3)
    chunks = zip(hidden[batch.row_index].split(7), batch.targets.split(7), strict=True)
    parts = [forward(rows).log_softmax(-1).gather(1, goals[:, None])[:, 0] for rows, goals in chunks]
    assert torch.equal(torch.cat(parts), logps)
    for grad, wanted in zip(got, torch.autograd.grad(torch.cat(parts) @ upstream, [hidden, *trained]), strict=True):
        torch.testing.assert_close(grad, wanted)
    assert not torch.equal(token_statistics(hidden, forward, batch.targets, (), **given)[0], logps)


def test_scale_softcap_bias_and_ignored_tokens_in_chunks() -> None:
    head = HeadOptions(scale=0.7, softcap=3.0, temperature=1.3, workspace_bytes=2 * 11 * 8 * 5)
    plain = nn.Linear(4, 11, bias=False).double()
    forward = HeadForward(Int8(plain), "8 bits", 11, True)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, rows = torch.tensor([3, -100, 0, 10, 5]), torch.tensor([5, 0, 2, 2, 1])
    z = forward(hidden[rows]) + bias
    wanted = (3.0 * torch.tanh(0.7 * z / 3.0) / 1.3).log_softmax(-1)[torch.arange(5), targets.clamp(min=0)]
    wanted = torch.where(targets == -100, 0.0, wanted)
    logps, _ = token_statistics(hidden, forward, targets, (), bias, rows, head)
    torch.testing.assert_close(logps, wanted)
    upstream = torch.linspace(-1, 1, 5, dtype=torch.float64)
    expected = torch.autograd.grad(wanted @ upstream, (hidden, bias))
    torch.testing.assert_close(torch.autograd.grad(logps @ upstream, (hidden, bias)), expected)
    with pytest.raises(ValueError, match="max_dropped_mass: expected None for Int8, whose own forward is called"):
        token_statistics(hidden, forward, targets, (), None, rows, HeadOptions(max_dropped_mass=0.1))
    with pytest.raises(ValueError, match=r"targets: expected values in \[0, V = 11\) or -100, got 11 at position 3"):
        token_statistics(hidden, forward, targets.where(targets != 10, 11), (), None, rows, head)


def test_what_is_taken_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="clha_fast"):
        for _ in range(2):
            model = lora(HEAD)
            with attach(model):
                model(**collate().as_dict())
    said = [line for line in caplog.messages if "in chunks of tokens" in line]
    assert len(said) == 1
    assert "the own forward of peft.tuners.lora.layer.Linear" in said[0]


def test_named_backends() -> None:
    model = lora(HEAD)
    with clha_fast.attach(model, OPTIONS, backend="reference"):
        assert model(**collate().as_dict()).loss.item() == pytest.approx(eager_loss(model, collate()).item(), rel=1e-6)
    with pytest.raises(BackendError, match=r"backend 'torch' cannot run .*backend 'auto' calls its own forward"):
        clha_fast.attach(model, OPTIONS, backend="torch")
    assert "forward" not in vars(model.base_model.model)
    with clha_fast.attach(lora(BODY), OPTIONS, backend="torch") as attached:
        assert attached.info.own_forward is None


def test_a_head_for_inference_alone_can_score() -> None:
    model = with_head(inference_only)
    with attach(model), torch.no_grad():
        # It rounds its input by the range of the tokens it is given, here a few at a time.
        assert model(**collate().as_dict()).loss.item() == pytest.approx(eager_loss(model, collate()).item(), rel=1e-3)


class Neighbours(Int8):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden + hidden.roll(1, dims=-2))


def test_a_head_that_mixes_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedHeadError, match="its forward mixes tokens"):
        attach(with_head(Neighbours))


def test_attach_again_after_an_adapter_came() -> None:
    for settings in ({"target_modules": HEAD}, {"target_modules": BODY, "modules_to_save": ["lm_head"]}):
        model = base()
        attached = attach(model)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        attached.detach()
        with attach(wrapped):
            loss = wrapped(**collate().as_dict()).loss
        assert loss.item() == pytest.approx(eager_loss(wrapped, collate()).item(), rel=1e-6)


@pytest.mark.parametrize("build", [lambda: lora(HEAD), lambda: virtual("PromptTuningConfig")], ids=["head", "prompt"])
def test_no_prompts_and_nothing_kept_are_zeros_with_gradients(build: Any) -> None:
    inert = [{"prompt": "say: ", "completions": ["a cat", "a dog"], "rewards": [-1.0, -2.0]}]
    for batch in (empty_batch(), collate(inert)):
        model = build()
        with attach(model):
            loss = model(**batch.as_dict()).loss
        assert loss.item() == 0
        grads = gradients(model, loss)
        assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        assert not any(grad.any() for grad in grads.values())


def test_no_token_gives_a_bias_behind_the_head_zeros_too() -> None:
    # DistributedDataParallel waits for the gradient of every parameter.
    forward = HeadForward(nn.Linear(4, 6, bias=False), "a test", 6, True)
    bias, none = torch.zeros(6, requires_grad=True), torch.empty(0, dtype=torch.int64)
    token_statistics(torch.randn(3, 4), forward, none, (), bias, none)[0].sum().backward()
    assert bias.grad is not None
    assert not bias.grad.any()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # its name changed during transformers 5
def test_gradient_checkpointing_and_autocast() -> None:
    model = lora(HEAD)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert compare(model).right
    plain, batch = lora(HEAD), collate()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = eager_loss(plain, batch)
        with attach(plain):
            loss = plain(**batch.as_dict()).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(rounded.item(), rel=1e-5)


def test_adalora_adds_its_regulariser() -> None:
    model = adapted(peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, target_modules=BODY))
    wanted = eager_loss(model, collate()).item()
    with attach(model):
        loss = model(**collate().as_dict()).loss
    products = [p @ p.T if "lora_A" in name else p.T @ p for name, p in model.named_parameters() if p.requires_grad]
    products = [product for product in products if product.shape == (4, 4)]
    distances = [torch.norm(product - torch.eye(4)) for product in products]
    assert loss.item() == pytest.approx(wanted + 0.5 * float(sum(distances)) / len(distances), rel=1e-4)
    assert gradients(model, loss)


@pytest.mark.slow
def test_compiled() -> None:
    model, batch = lora(HEAD), collate()
    wanted = eager_loss(model, batch)
    expected = gradients(model, wanted)
    compiled = torch.compile(model, backend="aot_eager")
    with attach(compiled):
        loss = compiled(**batch.as_dict()).loss
        grads = gradients(model, loss)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


def test_generation_with_virtual_tokens_is_the_models_own() -> None:
    model, ids = virtual("PromptTuningConfig").eval(), collate().input_ids[:1, :4]
    wanted = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with attach(model):
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), wanted)


TRAINED = {
    "body": lambda: lora(BODY),
    "modules_to_save": lambda: lora(BODY, modules_to_save=["lm_head"]),
    "prompt": lambda: virtual("PromptTuningConfig"),
    "prefix": lambda: virtual("PrefixTuningConfig"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_trainer(name: str, tmp_path: Any) -> None:
    model = TRAINED[name]()
    settings = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    settings |= {field.name: getattr(OPTIONS, field.name) for field in dataclasses.fields(OPTIONS) if field.init}
    args = CLHAConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, **settings)
    trainer = CLHATrainer(model, args, train_dataset=make_rows(6), processing_class=TOKENIZER)
    batch = collate()
    loss, _ = trainer._loss(model, batch, None)
    wanted = eager_loss(model, batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    expected, grads = gradients(model, wanted), gradients(model, loss)
    size = sum(float(grad.norm()) ** 2 for grad in expected.values()) ** 0.5
    assert max(float((grads[key] - grad).norm()) for key, grad in expected.items()) <= 2e-6 * size
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer.train()
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == set(expected)


def test_statistics_of_a_head_with_a_forward_of_its_own() -> None:
    """As of the weight alone, with their gradients, in chunks and whole; an ignored token, a softcap."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=draw, dtype=torch.float64)
    linear = nn.Linear(5, 11, bias=False).double()
    forward = HeadForward(linear, "a test", 11, True)
    targets = torch.tensor([3, -100, 0, 10, 5, 5, 1])
    head = HeadOptions(scale=2.0, softcap=3.0, temperature=0.7, workspace_bytes=11 * 5 * 8 * 2)
    leaf = hidden.clone().requires_grad_()
    found = reference.token_statistics(leaf, linear.weight, None, targets, None, head)
    wanted = torch.autograd.grad(found["entropy"].square().sum(), (leaf, linear.weight))
    for in_chunks in (True, False):
        logps, values = token_statistics(leaf, forward, targets, STATISTICS, head=head, in_chunks=in_chunks)
        torch.testing.assert_close(logps, reference.token_logps(leaf, linear.weight, None, targets, None, head))
        torch.testing.assert_close(values, found)
        got = torch.autograd.grad(values["entropy"].square().sum(), (leaf, linear.weight))
        torch.testing.assert_close(got, wanted)

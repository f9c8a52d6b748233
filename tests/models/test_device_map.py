"""Models that accelerate has spread over devices: on one CPU, with layers on disk and hooks around what it moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from clha_fast.hf import CLHAConfig, CLHATrainer, Scorer, UnsupportedHeadError, score
from tests.support.adapters import TOKENIZER, attach, base, collate, compare, eager_loss, lora_config, stir
from tests.support.tiny import make_rows

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def loaded(folder: Path, offloaded: tuple[str, ...] = ("model.layers.1",), tied: bool = False) -> nn.Module:
    """From a folder, with these parts on disk."""
    base(tied).save_pretrained(folder / "model")
    places = {part: "disk" if part in offloaded else "cpu" for part in PARTS}
    return AutoModelForCausalLM.from_pretrained(folder / "model", device_map=places, offload_folder=folder / "disk")


def moving(*hooks: ModelHook) -> Callable[[Path], nn.Module]:
    def make(folder: Path) -> nn.Module:
        model = base()
        add_hook_to_module(model.lm_head, hooks[0] if len(hooks) == 1 else SequentialHook(*hooks))
        return model

    return make


def spread(folder: Path, tied: bool = False) -> nn.Module:
    return accelerate.dispatch_model(base(tied), {"": "cpu"}, force_hooks=True)


def with_lora(folder: Path, targets: list[str]) -> nn.Module:
    return stir(peft.get_peft_model(spread(folder), lora_config(targets)))


MOVED: dict[str, Callable[[Path], nn.Module]] = {
    "dispatch_model": spread,
    "dispatch_model, tied": lambda folder: spread(folder, tied=True),
    "one hook": moving(AlignDevicesHook("cpu")),
    "one hook that moves back": moving(AlignDevicesHook("cpu", io_same_device=True)),
    "two hooks": moving(AlignDevicesHook("cpu"), AlignDevicesHook("cpu", io_same_device=True)),
    "LoRA on the body": lambda folder: with_lora(folder, ["q_proj"]),
    "LoRA on the head": lambda folder: with_lora(folder, ["lm_head"]),
}


def state(model: nn.Module) -> list[Any]:
    return [(name, list(vars(part).items())) for name, part in model.named_modules() if "lm_head" in name]


@pytest.mark.parametrize("name", MOVED)
def test_loss_and_gradients_are_those_of_the_models_own_logits(name: str, tmp_path: Path) -> None:
    model = MOVED[name](tmp_path)
    before = [(part, sorted(keys for keys, _ in values)) for part, values in state(model)]
    assert compare(model.train()).right
    assert [(part, sorted(keys for keys, _ in values)) for part, values in state(model)] == before
    assert compare(model).right


def wanted(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return logps.gather(2, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("offloaded", [("model.layers.1",), ("model.layers.0", "model.layers.1", "model.norm")])
def test_scores_with_layers_on_disk(offloaded: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    model, batch = loaded(tmp_path, offloaded, tied), collate()
    own = wanted(model, batch.input_ids, batch.attention_mask)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    found = score(model, batch.input_ids, labels, attention_mask=batch.attention_mask)
    torch.testing.assert_close(found.logps[:, 1:], own.where(found.scored[:, 1:], 0.0), atol=2e-6, rtol=1e-5)
    with Scorer(model) as scorer:
        assert torch.equal(scorer(batch.input_ids, labels, attention_mask=batch.attention_mask).logps, found.logps)
    with torch.no_grad(), attach(model):
        assert model(**batch.as_dict()).loss.item() == pytest.approx(eager_loss(model, batch).item(), rel=2e-6)
    assert torch.equal(wanted(model, batch.input_ids, batch.attention_mask), own)


def test_what_moves_the_input_still_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of the head goes through accelerate's hook, whose output's device the model behind it counts on."""
    model, batch = base(), collate()
    hook, seen = AlignDevicesHook("cpu", io_same_device=True), []
    add_hook_to_module(model.lm_head, hook)
    for name in ("pre_forward", "post_forward"):
        own = getattr(hook, name)
        monkeypatch.setattr(hook, name, lambda *args, name=name, own=own: (seen.append(name), own(*args))[1])
    with attach(model):
        assert seen == ["pre_forward", "post_forward"]
        model(**batch.as_dict()).loss.backward()
        model(**batch.model_inputs())
        assert seen == ["pre_forward", "post_forward"] * 3
    score(model, batch.input_ids, batch.input_ids, gradient=True).logps.sum().backward()
    assert seen == ["pre_forward", "post_forward"] * 5


def test_attached_before_it_is_spread() -> None:
    model, batch = base(), collate()
    attached = attach(model)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    wanted = eager_loss(model, batch)
    wanted.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = model(**batch.as_dict()).loss
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], atol=2e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="got another one over it; undo that first"):
        attached.detach()


class Doubling(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


class Frozen(AlignDevicesHook):
    no_grad = True


def replaced(folder: Path) -> nn.Module:
    """Somebody's forward below accelerate's."""
    model = base()
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * own(hidden)
    add_hook_to_module(model.lm_head, AlignDevicesHook("cpu"))
    return model


DISK = r"accelerate has offloaded.*; load the model with a device_map that keeps its embeddings on a device"
REFUSED: dict[str, tuple[Callable[[Path], nn.Module], str]] = {
    "the head on disk": (lambda folder: loaded(folder, ("lm_head",)), DISK),
    "the embeddings on disk": (lambda folder: loaded(folder, ("model.embed_tokens",)), DISK),
    "cpu_offload": (lambda folder: accelerate.cpu_offload(base(), torch.device("cpu")), DISK),
    "disk_offload": (lambda folder: accelerate.disk_offload(base(), folder / "disk"), DISK),
    "a hook that changes logits": (moving(Doubling()), r"accelerate's Doubling stands .*remove_hook_from_module"),
    "one of two does": (moving(AlignDevicesHook("cpu"), Doubling()), r"accelerate's Doubling stands around"),
    "a hook without gradients": (moving(Frozen("cpu")), r"accelerate's Frozen stands around its forward"),
    "a forward below": (replaced, "its forward has been replaced on the instance"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    model, ids = make(tmp_path), collate().input_ids
    own = model(input_ids=ids).logits
    for use in (attach, lambda given: score(given, ids, ids)):
        with pytest.raises(UnsupportedHeadError, match=message):
            use(model)
    assert torch.equal(model(input_ids=ids).logits, own)


def test_a_trainer_takes_a_reference_with_layers_on_disk(tmp_path: Path) -> None:
    settings = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    args = CLHAConfig(output_dir=str(tmp_path / "out"), objective="dpo", max_steps=1, **settings)
    losses = []
    for reference in (loaded(tmp_path), base()):
        kinds = {"train_dataset": make_rows(4), "processing_class": TOKENIZER, "ref_model": reference}
        trainer = CLHATrainer(stir(base()), args, **kinds)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(0.6931, abs=1e-3)

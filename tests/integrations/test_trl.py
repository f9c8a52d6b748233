"""TRL's trainers with this library's head in them: equal to TRL's own where that is right, right where it is not."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

trl = pytest.importorskip("trl", reason="TRL is not installed")
if tuple(int(part) for part in trl.__version__.split(".")[:2]) < (1, 15):
    pytest.skip(f"written for TRL 1.15 and newer, got {trl.__version__}", allow_module_level=True)

import clha_fast  # noqa: E402
from clha_fast.hf import UnsupportedHeadError  # noqa: E402
from clha_fast.integrations.trl import FusedHeadMixin, use_clha  # noqa: E402
from tests.support import trl_cases as cases  # noqa: E402
from tests.support.trl_cases import TOKENIZER, batch_of, make, measure, model_of, quiet, step  # noqa: E402

# The others run with `-m slow`, and in the table of docs/integrations.md.
QUICK = {("DPO", "gemma2"), ("GRPO, entropy bonus", "cohere"), ("SimPO", "gemma2"), ("SFT", "llama with LoRA")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow)
        for name in cases.CASES
        for kind in cases.KINDS
    ],
)
def test_equal_to_its_own_head(name: str, kind: str) -> None:
    got = measure(name, kind)
    assert got.right, got


def test_detaching_puts_its_own_forward_back(tmp_path: Path) -> None:
    with quiet():
        trainer = make("DPO", "llama", str(tmp_path), ours=False)
        before = [vars(model)["forward"] for model in (trainer.model, trainer.ref_model)]
        with use_clha(trainer) as attached:
            assert len(attached.infos) == 2
            with pytest.raises(ValueError, match="expected TRL's fused head on LlamaForCausalLM, got another forward"):
                use_clha(trainer)
        attached.detach()
        assert [vars(model)["forward"] for model in (trainer.model, trainer.ref_model)] == before
        assert "forward" not in vars(trainer.model.lm_head)
        trainer.train()


def test_detaching_under_a_wrapper_of_the_forward(tmp_path: Path) -> None:
    """accelerate wraps the forward for mixed precision when training begins, the reference's before that."""
    with quiet():
        theirs, ours = (make("DPO", "llama", str(tmp_path), False, bf16=True) for _ in range(2))
        inputs = batch_of(theirs)
        attached = use_clha(ours)
        with theirs.compute_loss_context_manager():
            expected, expected_grads = step(theirs, inputs)
            got, grads = step(ours, inputs)
        assert abs(got - expected) < 2e-3
        assert cases.distance(grads, expected_grads) < 2e-2
        ours.train()
        attached.detach()
        ids = inputs["input_ids"]
        found = ours.model(input_ids=ids, labels=ids, fused_lm_head=True)
        assert found.log_probs.shape == (ids.shape[0], ids.shape[1] - 1)


def test_a_head_that_an_adapter_trains_gives_place_to_the_first_one_as_reference() -> None:
    got = measure("DPO", "llama with LoRA, head saved")
    assert got.right, got


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "SFT"])
def test_compiled_steps_are_the_eager_ones(name: str, tmp_path: Path) -> None:
    """TRL's own head without a compiler, this library's under `torch_compile`: losses and weights after two steps."""
    found = []
    for ours in (False, True):
        torch.compiler.reset()
        compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if ours else {}
        with quiet():
            trainer = make(name, "llama", str(tmp_path), False, **compiled)
            if ours:
                use_clha(trainer)
            cases.seed()
            trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found.append((losses, torch.cat([w.detach().flatten() for w in trainer.model.parameters()])))
    (theirs, weights), (losses, compiled_weights) = found
    assert len(losses) == 2
    assert losses == pytest.approx(theirs, rel=1e-6)
    assert float((compiled_weights - weights).norm() / weights.norm()) < 1e-6


def test_gradient_checkpointing(tmp_path: Path) -> None:
    with quiet():
        trainer = make("DPO", "llama", str(tmp_path), False, gradient_checkpointing=True)
        inputs = batch_of(trainer)
        expected = step(trainer, inputs)
        use_clha(trainer)
        got = step(trainer, inputs)
    assert abs(got[0] - expected[0]) <= cases.LOSS
    assert cases.distance(got[1], expected[1]) <= cases.GRADIENTS


def test_a_mixture_of_experts_adds_its_own_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    monkeypatch.setitem(cases.KINDS_OF, "mixtral", {**config, "router_aux_loss_coef": 0.5})
    got = measure("SFT", "mixtral")
    assert got.right, got
    got = measure("DPO", "mixtral")
    assert got.right, got


@pytest.mark.parametrize("kind", ["modernbert-decoder", "recurrent_gemma"])
def test_right_where_configuration_names_mislead(kind: str, tmp_path: Path) -> None:
    """What these do to their logits is not under the names that TRL looks at."""
    sizes: dict[str, Any] = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "pad_token_id": 2}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "lru_width": 32, "attention_window_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    with quiet():
        args = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[], max_steps=1)
        trainer = trl.SFTTrainer(model, args=args, train_dataset=cases.plain(), processing_class=TOKENIZER)
    inputs = batch_of(trainer)
    model.eval()
    ids, mask, labels = (inputs[name][:, :20] for name in ("input_ids", "attention_mask", "labels"))
    given = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        logits = model(**given).logits[:, :-1].double()
        chosen = logits.log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        expected = torch.where(labels[:, 1:] == -100, 0.0, chosen)
        theirs = model(**given, labels=labels, fused_lm_head=True)
        use_clha(trainer)
        ours = model(**given, labels=labels, fused_lm_head=True)
    assert (ours.log_probs - expected).abs().max() < 1e-5
    assert (theirs.log_probs - expected).abs().max() > 0.01


def test_every_field_that_a_trainer_may_ask_for() -> None:
    from trl.trainer.utils import add_fused_lm_head

    from clha_fast.integrations.trl import _Head, _settings

    model: Any = model_of("gemma2")
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    add_fused_lm_head(model, temperature=0.7, outputs=outputs)
    ids = torch.randint(3, len(TOKENIZER), (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    for given in ({"labels": labels}, {"shift_labels": labels}, {"labels": labels, "num_items_in_batch": 5}):
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **given}
        expected = model(**inputs, fused_lm_head=True)
        head = _Head(model, _settings(model), "auto", None)
        got = model(**inputs, fused_lm_head=True)
        assert torch.equal(model(**inputs).logits, head._below(**inputs).logits)
        head.take_off()
        assert list(got) == list(expected)
        for name, value in expected.items():
            assert got[name].dtype == value.dtype, name
            torch.testing.assert_close(got[name], value, rtol=2e-6, atol=2e-5)
    with use_head(model), pytest.raises(ValueError, match="input_ids: expected token ids as a keyword"):
        model(inputs_embeds=model.get_input_embeddings()(ids), labels=labels, fused_lm_head=True)
    with use_head(model), pytest.raises(ValueError, match="labels: expected labels or shift_labels"):
        model(input_ids=ids, fused_lm_head=True)


class use_head:
    def __init__(self, model: Any) -> None:
        from clha_fast.integrations.trl import _Head, _settings

        self.head = _Head(model, _settings(model), "auto", None)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self.head.take_off()


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet():
        trainer = make("GRPO", "llama", str(tmp_path), False, cast_lm_head_to_fp32=True)
        with pytest.raises(ValueError, match="cast_lm_head_to_fp32: expected False, got True"):
            use_clha(trainer)
        with pytest.raises(ValueError, match="got CPOTrainer; CPOTrainer and ORPOTrainer take FusedHeadMixin"):
            use_clha(make("CPO", "llama", str(tmp_path), False))
        with pytest.raises(ValueError, match="backend"):
            use_clha(trainer, backend="cuda")  # type: ignore[arg-type]
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.14.2")
        with pytest.raises(
            ImportError, match=r"trl: expected 1\.15 or newer, whose trainers call one fused head, got 1"
        ):
            use_clha(trainer)
        with pytest.raises(ImportError, match="trl: expected 1"):
            make("CPO", "llama", str(tmp_path), True)


def supervised(folder: Path, kind: Any = trl.SFTTrainer, adapter: Any = None, **settings: Any) -> Any:
    args = trl.SFTConfig(output_dir=str(folder), bf16=False, use_cpu=True, report_to=[], max_steps=1, **settings)
    given: dict[str, Any] = {"train_dataset": cases.plain(), "processing_class": TOKENIZER, "peft_config": adapter}
    return kind(model_of("llama"), args=args, **given)


def test_a_loss_that_is_made_of_logits_is_refused(tmp_path: Path) -> None:
    class OwnLoss(trl.SFTTrainer):  # as TRL's GKD and GOLD
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
            return model(input_ids=inputs["input_ids"]).logits.logsumexp(-1).mean()

    with quiet():
        trainer = supervised(tmp_path, label_smoothing_factor=0.1)
        with pytest.raises(ValueError, match=r"label_smoothing_factor: expected 0, got 0\.1 \(SFTTrainer then makes"):
            use_clha(trainer)
        use_clha(supervised(tmp_path, label_smoothing_factor=0.1, loss_type="dft"))  # which takes no notice of it
        trainer = supervised(tmp_path)
        trainer.compute_loss_func = max
        with pytest.raises(ValueError, match="compute_loss_func: expected None, got <built-in function max>"):
            use_clha(trainer)
        trainer = supervised(tmp_path, OwnLoss)
        with use_clha(trainer), pytest.raises(RuntimeError, match="got a step of OwnLoss without"):
            trainer.train()
        trainer.train()


def test_prompt_tuning_is_refused(tmp_path: Path) -> None:
    adapter = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with quiet(), pytest.raises(ValueError, match="got prompt tuning, which gives embeddings"):
        use_clha(supervised(tmp_path, adapter=adapter))


def test_a_refusal_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    with quiet():
        trainer = make("DPO", "llama", str(tmp_path), False)
        before = [vars(model)["forward"] for model in (trainer.model, trainer.ref_model)]
        with pytest.raises(ValueError, match="workspace_bytes"):
            use_clha(trainer, workspace_bytes=-1)
        trainer.ref_model.lm_head.register_forward_hook(lambda module, args, output: output.sin())
        with pytest.raises(UnsupportedHeadError):
            use_clha(trainer)
        assert [vars(model)["forward"] for model in (trainer.model, trainer.ref_model)] == before


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SFT", {"gradient_accumulation_steps": 2}),  # of one token mean
        ("DPO", {"gradient_accumulation_steps": 2}),
        ("SFT", {"padding_free": True, "max_length": None}),
        ("SFT", {"packing": True, "max_length": 32}),
        ("SFT", {"loss_type": "dft"}),
        ("DPO", {"precompute_ref_log_probs": True}),
    ],
)
def test_equal_with_settings(name: str, settings: dict[str, Any]) -> None:
    got = measure(name, "llama", **settings)
    assert got.right, got


@pytest.mark.parametrize("name", ["DPO", "SimPO"])
def test_equal_under_liger(name: str) -> None:
    """Its kernels need a GPU, its forward does not: TRL keeps it off the first, transformers puts it on the second."""
    pytest.importorskip("liger_kernel", reason="Liger is not installed")
    off = dict.fromkeys(("rope", "rms_norm", "swiglu"), False)
    got = measure(name, "llama", use_liger_kernel=True, liger_kernel_config=off)
    assert got.right, got


def test_after_training_under_mixed_precision(tmp_path: Path) -> None:
    """accelerate's forward stands on the model by then."""
    with quiet():
        trainer = make("DPO", "llama", str(tmp_path), False, bf16=True)
        trainer.train()
        inputs = batch_of(trainer)
        with trainer.compute_loss_context_manager():
            expected = step(trainer, inputs)
            with use_clha(trainer):
                got = step(trainer, inputs)
    assert abs(got[0] - expected[0]) < 2e-3
    assert cases.distance(got[1], expected[1]) < 2e-2


def test_a_model_that_is_attached_too(tmp_path: Path) -> None:
    with quiet():
        trainer = make("DPO", "llama", str(tmp_path), False)
        inputs = batch_of(trainer)
        expected = step(trainer, inputs)
        with clha_fast.attach(trainer.model), pytest.raises(ValueError, match="got another forward"):
            use_clha(trainer)
        use_clha(trainer)
        got = step(trainer, inputs)
    assert abs(got[0] - expected[0]) <= cases.LOSS
    assert cases.distance(got[1], expected[1]) <= cases.GRADIENTS


@pytest.mark.parametrize("name", ["SimPO", "ORPO"])
def test_the_mixin_evaluates(name: str, tmp_path: Path) -> None:
    losses = []
    with quiet():
        for ours in (False, True):
            trainer = make(name, "llama", str(tmp_path), ours, eval_strategy="no")
            assert isinstance(trainer, FusedHeadMixin) == ours
            losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_mixin_goes_before_its_trainer(tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOTrainer

    with pytest.raises(TypeError, match="Behind: expected FusedHeadMixin before CPOTrainer, got it behind"):

        class Behind(CPOTrainer, FusedHeadMixin): ...

    class Other(FusedHeadMixin, trl.SFTTrainer): ...

    with pytest.raises(TypeError, match="Other: expected FusedHeadMixin before CPOTrainer or ORPOTrainer"):
        supervised(tmp_path, Other)


@pytest.mark.parametrize("where", ["saved", "adapted"])
def test_the_mixin_with_a_head_that_an_adapter_trains(where: str) -> None:
    got = measure("CPO", f"llama with LoRA, head {where}")
    assert got.right, got


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_our_trainer_on_its_data_and_names(loss_type: str, tmp_path: Path) -> None:
    """Two responses: the same losses and margins in every step, from the same configuration's names."""
    from clha_fast.hf import CLHAConfig, CLHATrainer

    common: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "seed": 7}
    common |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "learning_rate": 1e-3, "disable_tqdm": True}
    common |= {"bf16": False, "loss_type": [loss_type], "beta": 0.3, "disable_dropout": True, "max_grad_norm": 1.0}
    common |= {"lr_scheduler_type": "constant", "warmup_steps": 0, "gradient_checkpointing": False}
    logs = []
    with quiet():
        for trainer_class, config in ((trl.DPOTrainer, trl.DPOConfig), (CLHATrainer, CLHAConfig)):
            args = config(output_dir=str(tmp_path), **common)
            models = [model_of("llama") for _ in range(2)]
            cases.stir(models[0])
            trainer = trainer_class(
                models[0], args=args, ref_model=models[1], train_dataset=cases.pairs(), processing_class=TOKENIZER
            )
            trainer.train()
            logs.append(trainer.state.log_history[:3])
    for theirs, ours in zip(*logs, strict=True):
        # Sums of some hundred nats a response in float32, by another order of additions.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6, abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)

"""A checkpoint's weights come back whole, also those that transformers writes under other names than the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, TrainerCallback

from clha_fast.training.config import CLHAConfig
from clha_fast.training.restoring import load_renamed
from clha_fast.training.rollout import RolloutConfig, RolloutTrainer
from clha_fast.training.trainer import CLHATrainer
from tests.support.power_cuts import weights
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, tie_word_embeddings=True
    ),
}


def mixture(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MIXTURES[kind])


def ranked(folder: Path, kind: str, **changes: Any) -> CLHATrainer:
    args = CLHAConfig(str(folder), **common(**changes))
    return CLHATrainer(mixture(kind), args, make_rows(6), make_rows(2, seed=5), processing_class=TOKENIZER)


def rollouts(folder: Path, kind: str, **changes: Any) -> RolloutTrainer:
    args = RolloutConfig(str(folder), max_completion_length=3, **common(**changes))
    reward: Any = lambda records, answers: [[float(text.count("e")) for text in texts] for texts in answers]  # noqa: E731
    rows: Any = [{"prompt": row["prompt"]} for row in make_rows(6)]
    return RolloutTrainer(mixture(kind), args, reward, rows, rows[:2], TOKENIZER)


def common(**changes: Any) -> dict[str, Any]:
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    own = {"max_steps": 3, "save_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    return {**quiet, **own, **changes}


@pytest.mark.parametrize(("make", "kind"), [(ranked, "mixtral"), (ranked, "qwen2_moe"), (rollouts, "mixtral")])
def test_a_mixture_of_experts_is_resumed_with_its_experts(make: Any, kind: str, tmp_path: Path) -> None:
    whole = make(tmp_path, kind)
    whole.train()
    rest = make(tmp_path / "rest", kind)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, found = weights(whole.model), weights(rest.model)
    experts = [name for name in expected if "experts" in name]
    assert any(not torch.equal(expected[name], weights(mixture(kind))[name]) for name in experts)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_best_model_has_its_experts(tmp_path: Path) -> None:
    best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 0.5,
    }
    ours = ranked(tmp_path, "mixtral", **best)
    ours.train()
    assert ours.restored_step is not None
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{ours.restored_step}")
    for name, tensor in weights(ours.model).items():
        assert torch.equal(tensor, saved.state_dict()[name]), name


class Cutting(TrainerCallback):
    """Takes the experts of the first layer out of every checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "model.safetensors"
        whole = load_file(file)
        save_file({name: t for name, t in whole.items() if "layers.0" not in name or "experts" not in name}, file)


def test_errors_name_what_has_weights_loaded(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    ours = ranked(tmp_path, "mixtral", **best)
    ours.add_callback(Cutting())
    with pytest.raises(ValueError, match=r"^load_best_model_at_end: expected all weights of MixtralForCausalLM"):
        ours.train()
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: expected all weights of MixtralForCausalLM"):
        ranked(tmp_path, "mixtral").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_weights_that_are_nowhere(tmp_path: Path) -> None:
    model = make_model(len(TOKENIZER))
    assert not load_renamed(model, tmp_path, ["lm_head.weight"], "x"), "it shares the embedding's"
    lacking = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=lacking)
    missing = [name for name in model.state_dict() if "layers.1.mlp" in name]
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: expected all weights of LlamaForCausalLM, .* 3 of"):
        load_renamed(model, tmp_path, missing, "resume_from_checkpoint")


@pytest.mark.parametrize("kind", MIXTURES)
def test_modules_that_were_put_beside_stay(kind: str, tmp_path: Path) -> None:
    saved, model, other = mixture(kind), mixture(kind), mixture(kind)
    saved.value = torch.nn.Linear(2, 2)
    model.value, other.late = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    saved.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(found.get(name, torch.zeros_like(weight)))
    assert load_renamed(model, tmp_path, [name for name in model.state_dict() if name not in found], "x")
    expected = weights(saved)
    assert [name for name, tensor in weights(model).items() if not torch.equal(tensor, expected[name])] == []
    with pytest.raises(ValueError, match=r"without 2 of them \(late\.bias, \.\.\.\)$"):
        load_renamed(other, tmp_path, [name for name in other.state_dict() if name not in found], "x")

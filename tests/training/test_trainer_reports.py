"""What CLHATrainer shows for itself (samples, model card, predictions), and what Trainer's own services get from it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, TrainerCallback

from clha_fast.batching.collator import RankedCollator
from clha_fast.objectives.clha import CLHAOptions
from clha_fast.training import datasets as training_datasets
from clha_fast.training import samples
from clha_fast.training.card import CARD_FILE, MARK, model_card
from clha_fast.training.config import CLHAConfig
from clha_fast.training.samples import SAMPLES_FILE
from clha_fast.training.trainer import CLHATrainer
from tests.support.chat_templates import MESSAGES, SHAPES, chat_tokenizer
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import EVAL_SEED, TOKENIZER, collate, config, eager_loss, trainer


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SAMPLES_FILE).read_text("utf-8").splitlines()]


# ---- samples ----


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_samples_change_nothing_in_training(tmp_path: Path, temperature: float) -> None:
    """Dropout everywhere, so a random state that moved would show."""
    losses, weights = [], []
    for count in (0, 3):
        model = make_model(len(TOKENIZER), attention_dropout=0.2)
        ours = trainer(
            tmp_path / str(count),
            model,
            eval_samples=count,
            eval_sample_tokens=6,
            eval_sample_temperature=temperature,
            eval_strategy="steps",
            eval_steps=1,
            logging_steps=1,
        )
        ours.train()
        losses.append([line["loss"] for line in ours.state.log_history if "loss" in line])
        weights.append(model.state_dict())
    assert losses[0] == losses[1]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    assert not (tmp_path / "0" / SAMPLES_FILE).exists()
    found = lines_of(tmp_path / "3")
    assert [(line["step"], line["index"]) for line in found] == [(step, k) for step in (1, 2, 3, 4) for k in range(3)]


def test_samples_of_several_sets(tmp_path: Path) -> None:
    """Each is evaluated by its name; a step's samples are of the first."""
    sets = {"near": make_rows(4, seed=EVAL_SEED), "far": make_rows(4, seed=EVAL_SEED + 1)}
    args = config(tmp_path, eval_samples=2, eval_sample_tokens=5)
    model = make_model(len(TOKENIZER))
    ours = CLHATrainer(model, args, train_dataset=make_rows(4), eval_dataset=sets, processing_class=TOKENIZER)
    measured = ours.evaluate()
    assert {"eval_near_loss", "eval_far_loss"} <= measured.keys()
    assert [line["prompt"] for line in lines_of(tmp_path)] == [row["prompt"] for row in sets["near"][:2]]


@pytest.mark.parametrize("order", [("own", "other", "own"), ("other", "own", "own"), ("other", "third", "own")])
def test_samples_are_of_the_set_that_is_evaluated(tmp_path: Path, order: tuple[str, ...]) -> None:
    ours = trainer(tmp_path, eval_samples=2, eval_sample_tokens=1)
    sets = {"own": make_rows(2, seed=EVAL_SEED), "other": make_rows(3, seed=20), "third": make_rows(1, seed=21)}
    for step, name in enumerate(order):
        ours.state.global_step = step
        ours.evaluate(None if name == "own" else sets[name])
    expected = [(step, row["prompt"]) for step, name in enumerate(order) for row in sets[name][:2]]
    assert [(line["step"], line["prompt"]) for line in lines_of(tmp_path)] == expected


def test_samples_are_what_the_model_writes(tmp_path: Path) -> None:
    ours = trainer(tmp_path, eval_samples=2, eval_sample_tokens=5)
    ours.model.train()
    ours.evaluate()
    ours.evaluate()  # the same step: nothing new
    assert ours.model.training is False, "as evaluation leaves it"
    found = lines_of(tmp_path)
    assert len(found) == 2
    for line, row in zip(found, make_rows(8, seed=EVAL_SEED), strict=False):
        ids = TOKENIZER(row["prompt"], return_tensors="pt")["input_ids"]
        assert line["prompt"] == row["prompt"], "without BOS"
        wanted: list[int] = []
        for _ in range(5):
            with torch.no_grad():
                wanted.append(
                    int(ours.model(torch.cat([ids, torch.tensor([wanted], dtype=ids.dtype)], 1)).logits[0, -1].argmax())
                )
            if wanted[-1] == TOKENIZER.eos_token_id:
                break
        assert line["completion"] == TOKENIZER.decode(wanted, skip_special_tokens=True)
        assert line["tokens"] == len(wanted)
        assert line["finished"] == (wanted[-1] == TOKENIZER.eos_token_id)


def test_samples_stop_at_the_end_of_a_response(tmp_path: Path) -> None:
    """A head that always says EOS."""
    ours = trainer(tmp_path, make_model(len(TOKENIZER), tie_word_embeddings=False))
    head = ours.model.lm_head = torch.nn.Linear(32, len(TOKENIZER))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(TOKENIZER.eos_token_id), len(TOKENIZER)))
    ends = samples.closing_tokens([{"completion_ids": [[5, 0], [5, 6]]}], TOKENIZER, ours.model)
    assert ends == [0, 1], "EOS, and what closes a response if it is a special token"
    random = torch.random.get_rng_state()
    answers = samples.generate(ours.model, [[0, 5, 7]], TOKENIZER, ends, torch.device("cpu"), 4, 0.0)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert answers == [[TOKENIZER.eos_token_id]]
    line = samples.describe(3, [[0, 5, 7]], answers, ends, TOKENIZER)[0]
    assert (line["completion"], line["tokens"], line["finished"]) == ("", 1, True)


def test_samples_end_with_the_model_s_positions(tmp_path: Path) -> None:
    """Learned positions are rows of an embedding: the one past the last would end training (on a GPU, the process)."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=1, n_head=2, n_positions=8))
    prompts = [list(range(5, 5 + size)) for size in (3, 7, 8, 9)]
    answers = samples.generate(model, prompts, TOKENIZER, [1], torch.device("cpu"), 6)
    assert [len(answer) for answer in answers] == [5, 1, 0, 0]
    assert [len(answer) for answer in samples.generate(model, prompts[:1], TOKENIZER, [1], torch.device("cpu"), 2)] == [
        2
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_samples_show_a_chat_with_its_marks(name: str) -> None:
    """Without them "user" and "assistant" would read as words of the prompt; a text stands alone, behind a BOS too."""
    shape = SHAPES[name]
    tokenizer = chat_tokenizer(shape)
    collator = RankedCollator(tokenizer)
    bos = [tokenizer.bos_token_id] if shape.has_bos else []
    for prompt, shown in ((list(MESSAGES), shape.prompt), ("Why is the sky blue?", "Why is the sky blue?")):
        ids = collator.tokenize_record({"prompt": prompt, "completions": ["Hi"]})["prompt_ids"]
        ids = bos + ids if isinstance(prompt, str) and ids[:1] != bos else ids
        (line,) = samples.describe(0, [ids], [[]], [tokenizer.eos_token_id], tokenizer)
        assert line["prompt"] == shown


def test_samples_of_a_resumed_run_are_written_once(tmp_path: Path) -> None:
    for step in (0, 5, 10, 5):
        samples.write(str(tmp_path), [{"step": step, "completion": "ä"}])
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 5]
    assert os.listdir(tmp_path) == [SAMPLES_FILE]


def test_samples_need_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_samples: expected 0, or an evaluation dataset with prompt_ids"):
        samples.first_prompts([{"text": "a"}], 1, len)
    rows = make_rows(3)
    ours = trainer(tmp_path)
    want = [ours.eval_collator.tokenize_record(row) for row in rows]
    assert samples.first_prompts({"one": rows, "two": []}, 5, ours.eval_collator) == want
    assert samples.first_prompts((row for row in rows), 2, ours.eval_collator) == want[:2]
    for name, value in (("eval_samples", -1), ("eval_sample_tokens", 0), ("eval_sample_temperature", math.nan)):
        with pytest.raises(ValueError, match=f"{name}: expected a number of at least"):
            config(tmp_path, **{name: value})


# ---- model card ----


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_card_says_what_was_trained(tmp_path: Path) -> None:
    model = make_model(len(TOKENIZER))
    model.config._name_or_path = "somebody/tiny-llama"
    ours = trainer(tmp_path / "my-model", model, preset="paper", margin=1.25, max_steps=2)
    ours.dataset_names = ["TRAIN.jsonl", "somebody/ranked"]
    ours.train()
    metrics = ours.evaluate()
    ours.save_model()
    text = (tmp_path / "my-model" / CARD_FILE).read_text("utf-8")
    data = front_matter(text)
    assert data["tags"] == ["clha", "preference-ranking"]
    assert data["base_model"] == "somebody/tiny-llama"
    assert data["datasets"] == ["somebody/ranked"], "a file is no dataset of the Hub"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert "TRAIN.jsonl, somebody/ranked" in text
    for row in ("| margin | 1.25 |", "| reduction | sum |", "| preset | paper |", "| seed | 42 |", "arXiv:2403.16649"):
        assert row in text, row
    assert f"| Kendall's tau | {metrics['eval_kendall_tau']:.4g} |" in text
    assert f"- torch {torch.__version__}" in text
    assert ModelCard.load(tmp_path / "my-model" / CARD_FILE).data.to_dict()["base_model"] == "somebody/tiny-llama"


def test_card_by_hand_and_somebody_elses(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.create_model_card(tags="mine", model_name="named", dataset="a/b", license="mit", language="en")
    text = (tmp_path / CARD_FILE).read_text("utf-8")
    data = front_matter(text)
    assert data["tags"] == ["clha", "preference-ranking", "mine"]
    assert (data["license"], data["language"], data["datasets"]) == ("mit", "en", ["a/b"])
    assert "base_model" not in data
    assert "# named" in text
    ours.create_model_card(model_name="again")  # its own card may be written again
    assert "# again" in (tmp_path / CARD_FILE).read_text("utf-8")
    edited = (tmp_path / CARD_FILE).read_text("utf-8").replace(MARK, "").replace("# again", "# edited")
    (tmp_path / CARD_FILE).write_text(edited)
    ours.create_model_card()
    ours.save_model()
    assert (tmp_path / CARD_FILE).read_text("utf-8") == edited


def test_card_without_metrics(tmp_path: Path) -> None:
    text = model_card("x", CLHAOptions(), config(tmp_path), [{"loss": 1.0, "step": 1}])
    assert "Held out" not in text
    assert front_matter(text)["model_name"] == "x"
    nan = [{"eval_rank_loss": 1.0, "eval_rewards/accuracies": math.nan, "step": 7}]
    assert "| ranking accuracy (kept pairs) | - |" in model_card("x", CLHAOptions(), config(tmp_path), nan)


# ---- Trainer's own services ----


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.evaluations.append(dict(metrics))


def test_callbacks_get_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = trainer(tmp_path, logging_strategy="epoch", eval_strategy="epoch", max_steps=-1, num_train_epochs=2)
    recorder = Recorder()
    ours.add_callback(recorder)
    ours.train()
    training = [line for line in recorder.logs if "loss" in line]
    assert [line["epoch"] for line in training] == [1.0, 2.0]
    assert all({"rewards/accuracies", "rank_loss", "num_tokens"} <= line.keys() for line in training)
    assert len(recorder.evaluations) == 2
    assert all({"eval_loss", "eval_kendall_tau", "eval_runtime"} <= line.keys() for line in recorder.evaluations)
    assert "it/s" not in capsys.readouterr().err, "disable_tqdm"


class Noise(TrainerCallback):
    """Destroys the model after every step from one on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            torch.manual_seed(3)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()


def test_best_model_and_early_stopping(tmp_path: Path) -> None:
    rows = make_rows(12)
    ours = CLHATrainer(
        make_model(len(TOKENIZER)),
        config(
            tmp_path,
            margin=0.3,
            max_steps=60,
            learning_rate=1e-2,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=10,
            save_steps=10,
            load_best_model_at_end=True,
            metric_for_best_model="eval_rewards/accuracies",
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=TOKENIZER,
        callbacks=[EarlyStoppingCallback(2), Noise(21)],
    )
    ours.train()
    assert ours.state.global_step < 60
    assert ours.args.greater_is_better
    accuracies = {
        line["step"]: line["eval_rewards/accuracies"] for line in ours.state.log_history if "eval_loss" in line
    }
    assert ours.state.best_metric == max(accuracies.values()) > accuracies[30]
    again = ours.evaluate()
    assert again["eval_rewards/accuracies"] == ours.state.best_metric, "the best weights are back"


def test_predict_is_evaluation_on_other_rows(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    rows = make_rows(5, seed=9)
    output = ours.predict(rows)
    assert output.predictions is None
    assert output.label_ids is None
    whole = collate(rows, ours.loss_options, drop_inert=False)
    _, sums = eager_loss(ours.model.eval(), whole, ours.loss_options)
    assert collate(rows, ours.loss_options).num_inert > 0, "training's collator would drop some of these"
    assert output.metrics["test_kendall_tau"] == pytest.approx(float(sums[10] - sums[11]) / float(sums[9]))
    assert output.metrics["test_rewards/accuracies"] == pytest.approx(float(sums[4] / sums[2]))
    assert output.metrics["test_num_tokens"] == whole.targets.numel()
    evaluated = ours.evaluate(rows)
    for name in ("loss", "rewards/margins", "kendall_tau"):
        assert evaluated[f"eval_{name}"] == output.metrics[f"test_{name}"]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ours = trainer(tmp_path, report_to="tensorboard", eval_samples=1, eval_strategy="steps", eval_steps=2, max_steps=2)
    ours.train()
    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert {"train/rank_loss", "train/rewards/accuracies", "eval/kendall_tau"} <= set(tags["scalars"])
    assert "eval/samples/text_summary" in tags["tensors"]


@pytest.mark.parametrize(
    ("rewards", "changes", "words"),
    [
        ([1.0, 0.5, -1.5], {}, "reward_margin=3 with noise_rule='abs' drops all pairs"),
        (
            [-5.0, 1.0, 0.0],
            {"noise_rule": "signed", "reward_floor": -9.0},
            "reward_margin=3 with noise_rule='signed' drops all pairs",
        ),
        ([1.0], {"sft_factor": "one"}, "every prompt has one response"),
        ([1.0, 0.5, -2.5], {}, None),
        ([0.0, 5.0, 1.0], {"noise_rule": "signed"}, None),
        ([1.0, 0.5, -1.5], {"noise_rule": "none"}, None),
        ([1.0, 0.5, -1.5], {"preset": "sft_only"}, None),
        (None, {}, None),
    ],
)
def test_a_margin_that_drops_every_pair_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rewards: list[float] | None,
    changes: dict[str, Any],
    words: str | None,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(training_datasets.logger, "warning", said.append)
    row = {"prompt": "say", "completions": [f"word {k}" for k in range(len(rewards or "two"))], "rewards": rewards}
    args = CLHAConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **changes)
    made = CLHATrainer(make_model(len(TOKENIZER)), args, train_dataset=[row] * 2, processing_class=TOKENIZER)
    # What is said is what the loss does.
    kept = made.compute_loss(made.model, made.data_collator([made.train_dataset[0]]), return_outputs=True)[1]["metrics"]
    share = kept.as_dict()["kept_pair_share"]
    if words is None:
        assert said == []
        assert share > 0 or "preset" in changes
    else:
        assert len(said) == 1
        assert words in said[0]
        assert not share > 0

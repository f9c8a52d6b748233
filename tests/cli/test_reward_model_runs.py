"""`clha-fast reward-model train`: what it learns, says and leaves; its folder is what `clha-fast score` takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BartConfig, BartForSequenceClassification

from clha_fast.cli import main as cli
from clha_fast.data import read_records
from clha_fast.data.split import half_of, prompt_key
from clha_fast.evaluation.plots import can_plot
from clha_fast.experiments.reward_run import RewardRun, RewardRunOptions
from clha_fast.experiments.run import RunOptions
from clha_fast.files import file_hash
from clha_fast.rewards.reward_model import REWARD_FILE, load_reward_model
from clha_fast.rewards.scoring import score_file
from tests.support.command_line import one_sentence
from tests.support.preferences import SETTINGS, keyword_rows, reward_command
from tests.support.reward_models import TOKENIZER, alone, bert, llama, plain_ids, write
from tests.support.tiny import make_model

pytest.importorskip("scipy")
NO_MODEL: dict[str, Any] = {"model_config": None, "build_tokenizer": None}


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / REWARD_FILE).read_text())
    return found


@pytest.mark.drawn
def test_a_word_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base knows nothing of it; length and prompt say nothing; the held-out prompts are new."""
    changes = {"max_steps": 100, "per_device_train_batch_size": 8, "logging_steps": 20}
    assert cli.main(reward_command(tmp_path, rows=keyword_rows(120), **changes)) == 0
    out = capsys.readouterr().out
    found = described(tmp_path)
    low, high = found["interval"]
    assert 0.75 < low <= found["accuracy"] <= high
    assert 0.3 < found["before"]["accuracy"] < 0.7
    assert 0.3 < found["longer_wins"]["accuracy"] < 0.7
    assert found["prompts"] + found["train_prompts"] == 120
    assert found["train_file"] == file_hash(str(tmp_path / "ranked.jsonl"))
    assert (found["seed"], found["half"], found["pairs_by"], found["max_length"]) == (42, None, "rank", 64)
    before, after = (out.index(text) for text in ("held out before training: accuracy 0.", "step 100/100"))
    assert before < after < out.index("longer response wins")
    for name, accuracy in (
        ("before", found["before"]),
        ("after", found),
        ("longer response wins", found["longer_wins"]),
    ):
        row = next(line for line in out.splitlines() if line.startswith(f"{name}  "))
        assert f"{accuracy['accuracy']:.4g}" in row
        assert "{:.3f} to {:.3f}".format(*accuracy["interval"]) in row
    assert "cannot be told from guessing" not in out

    page = tmp_path / "run" / "report.html"
    assert f"report          {page}\n" in out
    text = page.read_text(encoding="utf-8")
    assert f'<th scope="row">after</th><td>{found["accuracy"]:.4g}</td>' in text
    assert "bootstrap over prompts" in text
    assert ">per_device_train_batch_size<" not in text, "the default"
    assert ">logging_steps</dt><dd>20.0</dd>" in text, "which is a share of the steps below 1"
    assert "Answers to held-out prompts" not in text
    if can_plot():
        assert "margin, reward of the better less the worse" in text

    # What the trainer found is what `score` finds, from the folder alone.
    words = ["score", str(tmp_path / "ranked.jsonl"), str(tmp_path / "scored.jsonl")]
    assert cli.main([*words, "--reward-model", str(tmp_path / "run")]) == 0
    scored = read_records(tmp_path / "scored.jsonl")
    options = RewardRunOptions(
        train_file=str(tmp_path / "ranked.jsonl"),
        eval_fraction=0.3,
        model=str(tmp_path / "run"),
    )
    again = RewardRun(options, {"output_dir": str(tmp_path / "again"), "use_cpu": True}).prepare()
    again.evaluate_before()
    assert again.before["accuracy"] == found["accuracy"]
    keys = {prompt_key(record) for record in again.held_out}
    right = pairs = 0
    for record in scored:
        if prompt_key(record) in keys:
            assert record.rewards is not None
            pairs += len(record.rewards) * (len(record.rewards) - 1) // 2
            right += sum(better > worse for k, better in enumerate(record.rewards) for worse in record.rewards[k + 1 :])
    assert right / pairs == found["accuracy"]


def test_the_folder_is_a_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(reward_command(tmp_path, max_length=20)) == 0
    out = capsys.readouterr().out
    assert "lengths   at most 20 tokens, padded with <pad>" in out
    assert "cut to max_length: " in out
    reward_model = load_reward_model(str(tmp_path / "run"))
    assert reward_model.model.config.pad_token_id == reward_model.tokenizer.pad_token_id == 2
    assert reward_model.default_max_length == 20
    assert reward_model.blank is described(tmp_path)["responses_begin_with_blank"] is False
    source = write(tmp_path / "new.jsonl", [{"prompt": "the cat", "completions": ["joy", "rain fell on a mat"]}])
    batched = score_file(source, tmp_path / "a.jsonl", reward_model, progress=False).records[0].rewards
    single = score_file(source, tmp_path / "b.jsonl", reward_model, batch_size=1, progress=False).records[0].rewards
    assert batched == pytest.approx(single, rel=1e-5)
    tokenizer = reward_model.tokenizer
    own = [0, *tokenizer("the cat", add_special_tokens=False)["input_ids"]]
    joy = [*own, *tokenizer("joy", add_special_tokens=False)["input_ids"], 1]
    assert batched is not None
    assert batched[0] == pytest.approx(alone(reward_model.model, joy), rel=1e-5)


def test_resumed_is_uninterrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """gpt2 has dropout; the checkpoint of step 6 is inside an epoch of 7."""
    assert cli.main(reward_command(tmp_path)) == 0
    run, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(run, whole)
    shutil.rmtree(run / "checkpoint-8")
    for name in ("model.safetensors", REWARD_FILE):
        (run / name).unlink()
    capsys.readouterr()
    torch.manual_seed(1234)
    assert cli.main(reward_command(tmp_path, "--resume")) == 0
    assert f"{run}, resumed from {run}/checkpoint-6" in capsys.readouterr().out
    for name in ("model.safetensors", REWARD_FILE, "config.json", "tokenizer.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert cli.main(reward_command(tmp_path, "--resume", learning_rate=1e-3)) == 2
    assert "learning_rate was 0.003, is 0.001" in one_sentence(capsys)


def test_halves_share_no_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "ranked.jsonl", keyword_rows(40))
    whole = read_records(tmp_path / "ranked.jsonl")
    seen = []
    for half, seed in ((0, 1), (1, 2)):
        options = RewardRunOptions(
            train_file=str(tmp_path / "ranked.jsonl"),
            half=half,
            eval_fraction=0.3,
            **{k: SETTINGS[k] for k in NO_MODEL},
        )
        run = RewardRun(options, {"output_dir": str(tmp_path / f"run{half}"), "seed": seed, "use_cpu": True})
        run.split(*run.read())
        seen.append({prompt_key(record) for record in [*run.train_records, *run.held_out]})
        assert seen[-1] == {prompt_key(record) for record in half_of(whole, half)}
        assert run.held_out
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 40
    assert cli.main(reward_command(tmp_path, "--half", "1", "--max_steps", "1")) == 0
    assert "half      1 of the prompts of" in capsys.readouterr().out
    assert described(tmp_path)["half"] == 1
    assert cli.main(reward_command(tmp_path, "--half", "2", "--overwrite")) == 2
    assert "half: expected 0 or 1, got 2" in one_sentence(capsys)


def test_pairs_by_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = keyword_rows(20)
    for row in rows:
        row["rewards"] = [float(k) for k in range(len(row["completions"]))]  # the last one best
    rows[0]["rewards"] = [1.0] * len(rows[0]["rewards"])
    assert cli.main(reward_command(tmp_path, rows=rows, max_steps=1)) == 0
    out = capsys.readouterr().out
    assert "(100%) against their rewards (rank_by_reward orders by these)" in out
    assert "1 prompts without a pair" in out
    assert cli.main(reward_command(tmp_path, "--rank_by_reward", "--overwrite", max_steps=1)) == 0
    out = capsys.readouterr().out
    assert "pairs by reward" in out
    assert "against their rewards" not in out
    assert described(tmp_path)["pairs_by"] == "reward"


def test_a_prompt_that_is_repeated_makes_nothing_surer(tmp_path: Path) -> None:
    """Held-out records that stand there once, or five times: the same figures, of as many prompts."""
    rows, found = keyword_rows(12, seed=3), []
    for times in (1, 5):
        folder = tmp_path / str(times)
        folder.mkdir()
        write(folder / "held.jsonl", [row for row in rows for _ in range(times)])
        changes = {"max_steps": 1, "eval_file": str(folder / "held.jsonl"), "eval_fraction": 0}
        assert cli.main(reward_command(folder, rows=keyword_rows(8), **changes)) == 0
        found.append(described(folder))
    once, often = found
    assert often["pairs"] == 5 * once["pairs"]
    assert often["prompts"] == once["prompts"] == 12
    for pick in (lambda side: side, lambda side: side["longer_wins"], lambda side: side["before"]):
        assert pick(often)["accuracy"] == pytest.approx(pick(once)["accuracy"])
        assert pick(often)["interval"] == pytest.approx(pick(once)["interval"])


def test_no_held_out_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(reward_command(tmp_path, eval_fraction=0, max_steps=2)) == 0
    assert "no held-out set: not evaluated" in capsys.readouterr().out
    found = described(tmp_path)
    assert (found["accuracy"], found["interval"], found["prompts"], found["train_prompts"]) == (None, None, 0, 40)
    load_reward_model(str(tmp_path / "run"))


def test_guessing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A held-out file in which nothing decides, and one prompt of training."""
    rows = [
        {"prompt": f"ask {k}", "completions": ["joy on a mat", "rain on a mat"][:: 1 - 2 * (k % 2)]} for k in range(12)
    ]
    first = {"prompt": keyword_rows(1)[0]["prompt"], "completions": ["joy", "rain"]}
    held_out = write(tmp_path / "held_out.jsonl", [*rows, first])
    flags = ["--eval_file", str(held_out), "--max_steps", "2"]
    assert cli.main(reward_command(tmp_path, *flags, eval_fraction=None)) == 0
    out = capsys.readouterr().out
    assert "The interval includes 0.5: on these prompts the reward model cannot be told from guessing." in out
    assert (
        "1 held-out prompts stand in the training file too, so their figures are not of new prompts; clha-fast pr"
        in out
    )
    assert described(tmp_path)["eval_file"] == file_hash(str(held_out))


def language_model(folder: Path) -> None:
    make_model(len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


def test_bases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A language model gets a new head, drawn from the seed; a classifier goes on with its own; encoders too."""
    base = tmp_path / "base"
    language_model(base)
    weights = []
    for seed in (1, 1, 2):
        flags = ["--model", str(base), "--overwrite", "--seed", str(seed), "--max_steps", "0"]
        assert cli.main(reward_command(tmp_path, *flags, **NO_MODEL, num_train_epochs=0)) == 0
        weights.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").state_dict())
        size = sum(tensor.numel() for tensor in weights[-1].values())
        said = f"LlamaForSequenceClassification, {size:,} parameters; new weights: score.weight"
        assert said in capsys.readouterr().out
    assert torch.equal(weights[0]["score.weight"], weights[1]["score.weight"])
    assert not torch.equal(weights[0]["score.weight"], weights[2]["score.weight"])
    assert torch.equal(
        weights[0]["model.embed_tokens.weight"], make_model(len(TOKENIZER)).get_input_embeddings().weight
    )

    classifier = tmp_path / "classifier"
    llama(pad_token_id=1).save_pretrained(classifier)
    TOKENIZER.save_pretrained(classifier)
    assert cli.main(reward_command(tmp_path, "--model", str(classifier), "--overwrite", **NO_MODEL, max_steps=1)) == 0
    out = capsys.readouterr().out
    assert "new weights" not in out
    assert "padded with </s>, the end of a response: rewards are read at the token before it" in out

    encoder = tmp_path / "encoder"
    bert().save_pretrained(encoder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.sep_token, tokenizer.eos_token = "</s>", None
    tokenizer.save_pretrained(encoder)
    assert cli.main(reward_command(tmp_path, "--model", str(encoder), "--overwrite", **NO_MODEL, max_steps=1)) == 0
    assert "BertForSequenceClassification" in capsys.readouterr().out
    found = load_reward_model(str(tmp_path / "run"))
    assert found.tokenizer.eos_token == "</s>"
    source = write(tmp_path / "one.jsonl", [{"prompt": "the cat", "completions": ["sat"]}])
    rewards = score_file(source, tmp_path / "one_out.jsonl", found, progress=False).records[0].rewards
    assert rewards == pytest.approx([alone(found.model, plain_ids("the cat", "sat"))], abs=1e-5)


def test_an_adapter_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    language_model(tmp_path / "base")
    flags = [
        "--model",
        str(tmp_path / "base"),
        "--peft_config.r",
        "4",
        "--peft_config.target_modules",
        "[q_proj, v_proj]",
    ]
    words = reward_command(tmp_path, *flags, **NO_MODEL, max_steps=6, learning_rate=1e-2)
    assert cli.main(words) == 0
    trained = 2 * 4 * (32 + 32 + 32 + 16) + 32  # two layers, rank 4, queries 32 to 32, values 32 to 16; the new head
    assert f" ({trained} of them trained); new weights: score.weight" in capsys.readouterr().out
    found = described(tmp_path)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model.safetensors" in files
    assert "adapter_config.json" not in files
    merged = load_reward_model(str(tmp_path / "run")).model.state_dict()
    plain = make_model(len(TOKENIZER)).state_dict()
    name = "model.layers.0.self_attn.{}_proj.weight"
    assert torch.equal(merged[name.format("k")], plain[name.format("k")])
    assert not torch.equal(merged[name.format("q")], plain[name.format("q")])
    options = RewardRunOptions(
        train_file=str(tmp_path / "ranked.jsonl"), eval_fraction=0.3, model=str(tmp_path / "run")
    )
    again = RewardRun(options, {"output_dir": str(tmp_path / "again"), "use_cpu": True}).prepare()
    again.evaluate_before()
    assert again.before["accuracy"] == found["accuracy"]
    assert cli.main([*words, "--overwrite", "--peft_config.task_type", "CAUSAL_LM"]) == 2
    assert "peft_config.task_type: expected SEQ_CLS for a reward model, got 'CAUSAL_LM'" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["shared", "packed", "auto"])
def test_an_adapter_is_merged_in_joined_rows(tmp_path: Path, layout: str) -> None:
    """What was found of the adapter beside its model is found of the merged one, in every layout."""
    pytest.importorskip("peft")
    language_model(tmp_path / "base")
    adapter = ["--peft_config.r", "2", "--peft_config.target_modules", "[q_proj]"]
    flags = ["--model", str(tmp_path / "base"), *adapter, "--layout", layout]
    assert cli.main(reward_command(tmp_path, *flags, **NO_MODEL, max_steps=2, learning_rate=1e-2)) == 0
    found = described(tmp_path)
    assert "model.safetensors" in {path.name for path in (tmp_path / "run").iterdir()}
    options = RewardRunOptions(
        train_file=str(tmp_path / "ranked.jsonl"), eval_fraction=0.3, model=str(tmp_path / "run")
    )
    again = RewardRun(options, {"output_dir": str(tmp_path / "again"), "use_cpu": True}).prepare()
    again.evaluate_before()
    assert again.before["accuracy"] == found["accuracy"]


def test_bases_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*flags: str, **changes: Any) -> str:
        assert cli.main(reward_command(tmp_path, *flags, **changes)) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.splitlines()[-1]  # behind a bar of weights that are loaded

    bart = BartConfig(vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, num_labels=1)
    BartForSequenceClassification(bart).save_pretrained(tmp_path / "bart")
    llama(num_labels=3).save_pretrained(tmp_path / "labels")
    llama(vocab_size=290).save_pretrained(tmp_path / "small")
    for name in ("bart", "labels", "small"):
        TOKENIZER.save_pretrained(tmp_path / name)
    language_model(tmp_path / "base")
    weights = tmp_path / "base" / "config.json"
    weights.write_text(weights.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    expected = {
        "bart": "model: expected a decoder or an encoder, which reads a response as one row, got",
        "labels": "model: expected a classifier with one label to go on with, got",
        "small": "tokenizer: expected at most the model's 290 tokens, got 300",
        "base": "model: expected weights for every parameter of the body of LlamaForSequenceClassification, got",
    }
    for name, message in expected.items():
        assert message in refused("--model", str(tmp_path / name), **NO_MODEL)
    kind = "model_config.model_type"
    assert f"{kind}: expected a decoder or an encoder" in refused(model_config={"model_type": "bart"})
    assert f"{kind}: expected a type that has a sequence" in refused(model_config={"model_type": "mamba"})
    assert "unknown option 'margin'" in refused("--margin", "3")
    assert "here it is" not in refused("--beta", "3")  # another command's hint
    rows = [{"prompt": "a", "completions": ["joy"]}, {"prompt": "b", "completions": ["joy", "joy"]}]
    assert "expected a prompt with two different responses" in refused(rows=rows, eval_fraction=0)


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reward-model"]) == 2
    assert "usage: clha-fast reward-model COMMAND" in capsys.readouterr().out
    assert cli.main(["reward-model", "--help"]) == 0
    assert cli.main(["reward-model", "train", "--help"]) == 0
    assert "--half 0|1" in capsys.readouterr().out
    assert cli.main(["reward-model", "score"]) == 2
    assert "expected a command of reward-model (train), got 'score'" in one_sentence(capsys)


def test_every_option_of_a_run_is_used_or_not_there() -> None:
    """A new field of `RunOptions` becomes an option here, too: decide what a reward model does with it."""
    known = """train_file eval_file eval_fraction format columns rank_by_reward skip_bad_records model model_config
    tokenizer build_tokenizer peft_config dtype attn_implementation resume overwrite"""
    assert set(RunOptions.__dataclass_fields__) == set(known.split())


def test_shared_rows_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training says its rows; the folder scores the same in them as row by row."""
    # GPT-2 drops out, and shared rows share a draw.
    model = {**SETTINGS["model_config"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    found = []
    for layout in ("padded", "shared"):
        folder = tmp_path / layout
        folder.mkdir()
        assert cli.main(reward_command(folder, "--layout", layout, model_config=model)) == 0
        assert ("shared rows" in capsys.readouterr().out) == (layout == "shared")
        found.append(described(folder))
    assert found[0]["accuracy"] == found[1]["accuracy"]
    path, source = str(tmp_path / "shared" / "run"), str(tmp_path / "shared" / "ranked.jsonl")
    for layout in ("padded", "shared"):
        words = ["score", "--reward-model", path, "--layout", layout, source, str(tmp_path / f"{layout}.jsonl")]
        assert cli.main(words) == 0
        assert (", shared rows" in capsys.readouterr().out) == (layout == "shared")
    padded, shared = (read_records(str(tmp_path / f"{layout}.jsonl")) for layout in ("padded", "shared"))
    assert len(padded) == 40
    for one, other in zip(shared, padded, strict=True):
        assert one.rewards == pytest.approx(other.rewards, rel=1e-4, abs=1e-5)

"""Adapters merged into their base: the same logits, whole folders, tied heads parted, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from clha_fast.cli import main as cli
from clha_fast.generation.prompts import trained_lead, trained_prefix
from clha_fast.models.loading import load_classifier
from clha_fast.objectives import CLHAOptions, DPOOptions
from clha_fast.training import card
from clha_fast.training.config import CLHAConfig
from clha_fast.training.merging import merge_adapter
from tests.support.adapters import BODY, lora_config, stir
from tests.support.reward_models import TOKENIZER, spread, write
from tests.support.tiny import make_model

IDS = torch.tensor([[0, 40, 41, 42, 43], [0, 60, 61, 45, 7]])


def save(folder: Path, config: Any, tied: bool, tokenizer: bool = True) -> Tensor:
    """A base and an adapter on it that is not fresh, in `folder`; the adapter's logits."""
    model = spread(make_model(len(TOKENIZER), tie_word_embeddings=tied))
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = stir(peft.get_peft_model(base, config)).eval()
        adapted.save_pretrained(folder / "adapter")
    if tokenizer:
        TOKENIZER.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return torch.as_tensor(adapted(input_ids=IDS).logits)


CONFIGS = {
    "body": lora_config(BODY),
    "head": lora_config([*BODY, "lm_head"]),
    "dora": lora_config(["q_proj", "lm_head"], use_dora=True),
    "a head of its own": lora_config(["q_proj"], modules_to_save=["lm_head"]),
    "embedding": lora_config(["q_proj", "embed_tokens"]),
    "tokens": lora_config(BODY, trainable_token_indices=[40, 61]),
    "tokens of the head": lora_config(BODY, trainable_token_indices={"lm_head": [40, 61]}),
    "tokens of both": lora_config(BODY, trainable_token_indices={"embed_tokens": [40, 61], "lm_head": [40, 7]}),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_logits_are_the_adapters(tmp_path: Path, name: str, tied: bool) -> None:
    expected = save(tmp_path, CONFIGS[name], tied)
    found = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        got = merged(input_ids=IDS).logits
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    parted = tied and name not in ("body", "ia3", "tokens")
    assert found.untied == parted
    assert merged.config.tie_word_embeddings == (tied and not parted)
    assert merged.generation_config.repetition_penalty == 1.3
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == TOKENIZER.get_vocab()
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("tokens", [[40, 61], {"embed_tokens": [7]}], ids=["a list", "by layer"])
def test_a_tied_head_that_is_trained_twice_is_refused(tmp_path: Path, tokens: Any) -> None:
    """peft leaves the tokens' part in such a model, whose logits are others; of two weights it merges both."""
    save(tmp_path, lora_config(["q_proj", "lm_head"], trainable_token_indices=tokens), tied=True)
    with pytest.raises(ValueError, match=r"^adapter: expected a tied head that is trained in one way, got trainable"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_gives_a_model_that_answers_and_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, CONFIGS["head"], tied=True, tokenizer=False)
    (tmp_path / "base").rename(tmp_path / "moved")
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    assert cli.main(["merge", adapter, out]) == 2
    assert f"model: expected a folder that holds one, or a name on the Hub, got '{tmp_path / 'base'}'" in (
        capsys.readouterr().err
    )
    run = {"settings": {"objective": {"name": "coh", "good_marker": "Good:"}}, "data": {}}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(run))
    assert cli.main(["merge", adapter, out, "--model", str(tmp_path / "moved")]) == 0
    said = capsys.readouterr().out
    assert f"adapter       {adapter}: LORA\n" in said
    assert "merged        " in said
    assert "which shared a weight, have one each now" in said
    rows = str(write(tmp_path / "in.jsonl", [{"prompt": "say", "completions": ["a cat", "a dog ran"]}]))
    assert cli.main(["rank", out, rows, str(tmp_path / "ranked"), "--device", "cpu"]) == 0
    words = ("--max-new-tokens", "4", "--device", "cpu")
    assert cli.main(["generate", out, rows, str(tmp_path / "answers"), *words]) == 0
    assert "every answer begins with 'Good:' (the model was trained behind it)" in capsys.readouterr().out
    shutil.copytree(tmp_path / "moved", tmp_path / "base")
    TOKENIZER.save_pretrained(adapter)  # as a run leaves it
    assert cli.main(["rank", adapter, rows, str(tmp_path / "own"), "--device", "cpu"]) == 0
    own, merged = (json.loads((tmp_path / name).read_text()) for name in ("own", "ranked"))
    assert own["order"] == merged["order"]
    assert own["mean_logps"] == pytest.approx(merged["mean_logps"], rel=1e-4)


@pytest.mark.parametrize("lead", [None, "", "<think>\n"])
@pytest.mark.parametrize("objective", ["clha", "coh"])
def test_in_python_the_folder_is_the_command_s(tmp_path: Path, lead: str | None, objective: str) -> None:
    save(tmp_path, CONFIGS["body"], tied=False)
    adapter = tmp_path / "adapter"
    (adapter / "README.md").write_text(given_card(CLHAOptions(), None))
    (adapter / "run.json").write_text(json.dumps({"settings": {"objective": objective}, "data": {}, "lead": lead}))
    wholes = [tmp_path / name / "whole" for name in ("command", "python")]
    for whole in wholes:
        whole.parent.mkdir()
    assert cli.main(["merge", str(adapter), str(wholes[0])]) == 0
    assert not merge_adapter(adapter, wholes[1]).uncarded
    files = [{path.name: path.read_bytes() for path in whole.iterdir()} for whole in wholes]
    assert files[0] == files[1]
    assert "README.md" in files[1]
    assert [trained_prefix(whole) for whole in (adapter, wholes[1])] == [trained_prefix(wholes[0])] * 2
    assert trained_lead(wholes[1]) == lead


def given_card(options: Any, base_model: str | None, tags: tuple[str, ...] = ()) -> str:
    log = [{"eval_rank_loss": 0.25, "eval_kendall_tau": 0.7531, "step": 3}]
    settings = CLHAConfig(use_cpu=True)
    text = card.model_card("run", options, settings, log, base_model=base_model, tags=tags, library="peft")
    assert "0.7531" in text
    return text


@pytest.mark.parametrize(
    ("options", "base_model", "config"),
    [(CLHAOptions(), "Qwen/Qwen2.5-0.5B", "body"), (DPOOptions(beta=0.2), None, "ia3")],
    ids=["of the Hub", "of a folder"],
)
def test_the_card_goes_along(tmp_path: Path, options: Any, base_model: str | None, config: str) -> None:
    save(tmp_path, CONFIGS[config], tied=False)
    adapter, out = tmp_path / "adapter", tmp_path / "whole"
    kind = str(CONFIGS[config].peft_type.value)
    before = given_card(options, base_model, ("peft", kind.lower(), f"base_model:adapter:{base_model}", "mine"))
    (adapter / "README.md").write_text(before)
    assert cli.main(["merge", str(adapter), str(out)]) == 0
    text = (out / "README.md").read_text()
    old, new = ModelCard(before).data.to_dict(), ModelCard(text).data.to_dict()
    changed = {"library_name": "transformers", "model_name": "whole", "tags": [options.name, card.TAG, "mine"]}
    assert new == {**old, **changed, **({"base_model_relation": "finetune"} if base_model else {})}
    said = f"# whole\n\nAn adapter ({kind}), merged into its base model. Figures are those of the adapter, before that."
    body = before.split("---\n", 2)[2].replace("# run", said, 1)
    assert text.split("---\n", 2)[2] == body
    assert card.may_write(str(out)), "it is as the adapter's, to be written again"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# Mine\n\nfree of front matter\n", "---\nlibrary_name: transformers\n---\n# Mine\n\nfree of front matter\n"),
        (
            "---\nbase_model: a/b\nlibrary_name: peft\nbase_model_relation: adapter\ntags: peft\n---\n# run\n",
            "---\nbase_model: a/b\nlibrary_name: transformers\nbase_model_relation: finetune\n---\n# run\n",
        ),
        (
            "---\nbase_model: BASE\nmodel_name: run\n---\n# run",
            "---\nmodel_name: run\nlibrary_name: transformers\n---\n# run",
        ),
        (
            "---\ntags: mine\nbase_model: [BASE, a/b, a/b]\nlanguage: en\ndatasets: c/d\nlicense: null\n---\n",
            "---\ntags:\n- mine\nbase_model:\n- a/b\nlanguage: en\ndatasets: c/d\nlibrary_name: transformers\n"
            "base_model_relation: finetune\n---\n",
        ),
        (
            "\ufeff---\ntags: [b, LORA, lora, b]\nbase_model:\n- BASE\nlanguage: [no, de]\nmetrics: bleu\n---\n",
            "---\ntags:\n- b\n- LORA\nlanguage:\n- 'no'\n- de\nmetrics: bleu\nlibrary_name: transformers\n---\n",
        ),
        (
            "---\ntags: base_model:adapter:a/b\nmodel-index:\n- name: x\n  results: []\n---\n",
            "---\nmodel-index:\n- name: x\n  results: []\nlibrary_name: transformers\n---\n",
        ),
        (None, None),
    ],
    ids=["plain", "peft's", "a folder's", "strings", "lists", "results", "none"],
)
def test_somebody_elses_card_stays_his(tmp_path: Path, before: str | None, after: str | None) -> None:
    save(tmp_path, CONFIGS["body"], tied=False)
    (tmp_path / "adapter" / "README.md").unlink()
    if before is not None:
        (tmp_path / "adapter" / "README.md").write_text(before.replace("BASE", str(tmp_path / "base")))
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "README.md"
    assert (path.read_text() if path.exists() else None) == after


@pytest.mark.parametrize("content", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"---\n1: 2\n---\n", b"\xff\xfe"])
def test_a_damaged_card_is_said(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, CONFIGS["body"], tied=False)
    path = tmp_path / "adapter" / "README.md"
    path.write_bytes(content)
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    assert f"note          no model card was written: {path}: expected " in capsys.readouterr().out
    assert not (tmp_path / "out" / "README.md").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_is_refused(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["body"], tied=False)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    for folder, said in {
        tmp_path: "one without adapter_config.json$",
        tmp_path / "base": "a whole model, which needs no",
    }.items():
        with pytest.raises(
            ValueError, match=rf"adapter: expected a folder that holds an adapter .*, got {folder}, {said}"
        ):
            merge_adapter(folder, out)
    with pytest.raises(ValueError, match="no such folder"):
        merge_adapter(tmp_path / "none", out)
    with pytest.raises(FileExistsError, match="exists already; expected a new folder"):
        merge_adapter(adapter, tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="expected a folder in one that exists"):
        merge_adapter(adapter, tmp_path / "none" / "out")
    with pytest.raises(ValueError, match="dtype: expected one of auto, float32"):
        merge_adapter(adapter, out, dtype="float8")
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    shutil.rmtree(adapter)
    save(tmp_path, virtual, tied=False)
    with pytest.raises(ValueError, match="adapter: expected one that changes weights, got PROMPT_TUNING"):
        merge_adapter(adapter, out)
    (adapter / "adapter_config.json").write_text('{"peft_type": "NONE_OF_THEM"}')
    with pytest.raises(ValueError, match="adapter: expected a configuration of peft's"):
        merge_adapter(adapter, out)
    assert not out.exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["body"], tied=False)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="adapter: could not be merged"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM", None])
def test_a_classifier_to_train_names_what_merges_its_adapter(tmp_path: Path, task: str | None) -> None:
    """The command merges those of language models, and refuses the others."""
    config = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected a whole model, .* merge it \(.*peft's merge_and_unload\)") as said:
        load_classifier(str(tmp_path))
    with pytest.raises(ValueError, match="model") as refused:
        merge_adapter(str(tmp_path), str(tmp_path / "whole"))
    assert ("clha-fast merge" in str(said.value)) == ("of a causal language model" not in str(refused.value))

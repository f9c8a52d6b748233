"""A checkpoint that lacks weights is refused by name, and a mistyped path at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedModel

from clha_fast.cli import main as cli
from clha_fast.models.loading import load_model, load_tokenizer
from tests.support.command_line import command
from tests.support.tiny import make_model, make_tokenizer

TOKENIZER = make_tokenizer()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=1, n_head=2, n_positions=64))


def saved(folder: Path, model: PreTrainedModel, renames: dict[str, str | None], name: str = "model") -> Path:
    """A model's folder whose weights have other names; None leaves one out."""
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    path = folder / f"{name}.safetensors"
    weights = {renames.get(key, key): value for key, value in load_file(path).items()}
    save_file({key: value for key, value in weights.items() if key is not None}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "renames", "names"),
    [
        ("llama", {"lm_head.weight": None}, "lm_head.weight"),
        (
            "llama",
            {"model.norm.weight": "model.last_norm.weight"},
            "model.norm.weight, and with unused ones (model.last",
        ),
        ("gpt2", {"transformer.h.0.mlp.c_fc.bias": None}, "transformer.h.0.mlp.c_fc.bias;"),
        ("gpt2", {"transformer.wte.weight": "embedding"}, "transformer.wte.weight"),
    ],
)
def test_missing_and_renamed_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, renames: dict[str, str | None], names: str
) -> None:
    model = gpt2() if kind == "gpt2" else make_model(len(TOKENIZER), tie_word_embeddings=False)
    folder = saved(tmp_path / "model", model, renames)
    words = command(tmp_path, "--model", str(folder), model_config=None, build_tokenizer=None)
    assert cli.main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # bars of files stand before it
    assert "model: expected weights for every parameter of " in said
    assert names in said
    assert "save_pretrained(FOLDER)" in said
    assert not (tmp_path / "run").exists()


def test_a_tied_head_is_not_missing_and_spare_weights_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path, make_model(len(TOKENIZER)), {})
    path = folder / "model.safetensors"
    with caplog.at_level("WARNING"):
        load_model(str(folder))
        assert not caplog.text
        save_file({**load_file(path), "value_head.bias": torch.zeros(1)}, path, metadata={"format": "pt"})
        load_model(str(folder))
    assert "does not use: value_head.bias" in caplog.text


def test_missing_weights_of_an_adapter_and_of_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base", make_model(len(TOKENIZER)), {})
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load_model(str(base)), config)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    assert any(weight.requires_grad for weight in load_model(str(folder)).parameters())
    saved(folder, adapted, {key: key.replace("lora_A", "lora_a")}, "adapter_model")
    with pytest.raises(
        ValueError, match=r"^model: expected weights for every parameter of the \S*LORA adapter.*lora_A"
    ):
        load_model(str(folder))
    adapted.save_pretrained(folder)
    saved(base, load_model(str(base)), {"model.norm.weight": None})
    with pytest.raises(ValueError, match=r"^model: .* got \S*base without model.norm.weight"):
        load_model(str(folder))


def test_weights_of_another_shape(tmp_path: Path) -> None:
    folder = saved(tmp_path, make_model(len(TOKENIZER)), {})
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.norm.weight": torch.zeros(7)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^model: .* \(a weight in its files has another shape than its config.json"):
        load_model(str(folder))


def test_a_mistyped_path_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama-small").mkdir(parents=True)
    (tmp_path / "weights.bin").touch()
    start = time.monotonic()
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"there is no such folder; did you mean 'llama-small'\?"):
            load("models/llama-smal")
        with pytest.raises(ValueError, match=r"which is a file$"):
            load("weights.bin")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["gpt22", "some/model", "x" * 200, "-a-", "a..b/c"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_name_that_cannot_be_had(name: str, load: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a real request: nobody listens there, and of the last three it can be seen that they are no names."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nowhere")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    with pytest.raises(ValueError, match=r"^\w+: expected .* which is no folder here, and the Hub gives none \(.+\)$"):
        load(name)


@pytest.mark.parametrize("error", [TypeError("a mistake"), AttributeError("another"), KeyError("a third")])
def test_mistakes_of_our_own_are_not_the_hubs(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from clha_fast.models import loading

    def wrong(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loading, "get_hf_file_metadata", wrong)
    with pytest.raises(type(error)):
        loading.check_reachable("model", "gpt22")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from clha_fast.models import loading

    asked: list[str] = []

    def refuse(url: str, **settings: object) -> None:
        asked.append(url)
        raise ConnectionError("connection refused. Try again later")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nowhere")
    monkeypatch.setattr(loading, "get_hf_file_metadata", refuse)
    with pytest.raises(ValueError, match=r"^model: .*'gpt22', which is no folder here, .* \(connection refused\)$"):
        load_model("gpt22")
    assert len(asked) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_is_no_language_model(tmp_path: Path, tied: bool) -> None:
    """Its head would be random, or its embedding; and saving that is no way out."""
    config = GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=1)
    config.tie_word_embeddings = tied
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got .*, a reward model; give the language"):
        load_model(str(tmp_path))

"""`clha-fast plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import shlex

import pytest
from transformers import LlamaConfig, TrainingArguments

from clha_fast.cli.main import main
from clha_fast.cli.options import collect
from clha_fast.cli.values import OptionError
from clha_fast.planning.plan import offloads


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    ).save_pretrained(folder)
    return str(folder)


def test_text(model, capsys):
    """A folder with a configuration alone is enough."""
    assert main(["plan", "--model", model, "--tokens", "64", "--candidates", "4", "--memory", "80"]) == 0
    text = capsys.readouterr().out
    assert "1 x 4 candidates of 16 tokens behind prompts of 16: 64 scored tokens; padded: 4 x 32 tokens run" in text
    assert "fits in 80 GiB" in text
    assert "layer checkpoints" in text


def test_texts_beyond_the_model_s_positions_are_said(model, capsys):
    """2048 of them; a row of several texts may be longer."""
    for prompt, said in ((2032, 0), (2033, 1)):
        words = ["--response", "16", "--prompt", str(prompt), "--layout", "shared"]
        assert main(["plan", "--model", model, *words]) == 0
        assert capsys.readouterr().out.count("texts of 2,049 tokens are beyond the model's 2,048 positions") == said


def test_json_and_the_way_out(model, capsys):
    words = ["--tokens=256", "--candidates=4", "--prompt", "128", "--backend", "torch", "--dtype", "float32"]
    assert main(["plan", "--model", model, *words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["load"]["response"], first["load"]["tokens"], first["scored_tokens"]) == (64, 4 * 192, 256)
    parts = first["bytes"]
    fixed = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert parts["total"] == fixed + parts["kept"] + max(parts["layer"], parts["head"])
    memory = parts["total"] * 0.7 / 2**30
    assert main(["plan", "--model", model, *words, "--json", f"--memory={memory}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["with"]["fits"]) == (False, True)
    assert found["with"]["options"] == ["--layout shared"]
    assert main(["plan", "--model", model, *words, "--json", f"--memory={memory}", "--layout", "shared"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == found["with"]["bytes"]
    assert main(["plan", "--model", model, *words, "--memory=0.001"]) == 0
    assert "still" in capsys.readouterr().out


def test_auto_is_what_training_would_count(model, capsys):
    """Shared rows where they leave nine tenths of the tokens: 4 x (P + R) and P + 4 R of a prompt with 4 responses."""
    words = ["plan", "--model", model, "--candidates", "4", "--response", "90", "--json"]
    for prompt, layout in ((13, "padded"), (14, "shared")):  # 4 (90 + P) 0.9 = P + 360 at P = 13.8
        loads = []
        for asked in ("auto", layout):
            assert main([*words, "--prompt", str(prompt), "--layout", asked]) == 0
            loads.append(json.loads(capsys.readouterr().out)["load"])
        assert loads[0] == loads[1]
        assert loads[0]["layout"] == layout


def test_offload_that_train_would_not_know(model, monkeypatch, capsys):
    monkeypatch.delitem(TrainingArguments.__dataclass_fields__, "activation_checkpointing_kwargs", raising=False)
    for flag in ("--offload", "--activation_checkpointing_kwargs.offload=true"):
        assert main(["plan", "--model", model, "--response", "16", flag]) == 2
        assert "offload: expected False with transformers " in capsys.readouterr().err


@pytest.mark.skipif(not offloads(), reason="an older release")
@pytest.mark.parametrize("recomputes", ["gradient_checkpointing", "activation_checkpointing"])
def test_train_s_names(model, recomputes, capsys):
    """Options that mean the same, with either name."""
    here = "--prompt 24 --response 16 --prompts 2 --checkpointing --offload --optimizer adamw_8bit --lora-rank 4"
    there = (
        "--max_prompt_length 24 --max_completion_length 16 --per_device_train_batch_size=2 --optim adamw_bnb_8bit "
        f"--{recomputes} true --activation_checkpointing_kwargs.offload true "
        "--peft_config.r 4 --peft_config.target_modules=all-linear"
    )
    found = []
    for words in (here, there):
        assert main(["plan", "--model", model, *words.split(), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    first, second = found
    assert (first["switches"].pop("lora_rank"), second["switches"].pop("adapter")) == (4, "LORA")
    assert (second["switches"].pop("lora_rank"), first["switches"].pop("adapter")) == (None, None)
    assert first == second
    adapter = "--peft_config.r 4 --peft_config.target_modules all-linear"
    assert first["train"][-2:] == [adapter, "--optim adamw_8bit"]
    assert main(["plan", "--model", model, "--response", "16", "--no-checkpointing", "--json"]) == 0
    assert main(["plan", "--model", model, "--response", "16", f"--{recomputes}", "false", "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out.replace("}\n{", "},\n{").join("[]"))[0]["switches"]["checkpointing"] is False
    )


def test_the_loss_s_backend_is_said(model, capsys):
    assert main(["plan", "--model", model, "--response", "16"]) == 0
    text = capsys.readouterr().out
    assert "the loss (workspace)" in text
    assert "the loss: as auto takes it on a GPU with room for it" in text
    assert main(["plan", "--model", model, "--response", "16", "--memory", "0.1", "--workspace_mb", "1"]) == 0
    text = capsys.readouterr().out
    assert "the loss (workspace)" in text
    assert "as auto takes it" not in text
    few, many = ("--response", "16"), ("--response", "64", "--prompts", "4")
    for size, backend in ((few, "workspace"), (many, "triton")):
        assert main(["plan", "--model", model, *size, "--memory", "0.01"]) == 0
        assert f"the loss ({backend})" in capsys.readouterr().out


def test_a_reward_model(model, capsys):
    assert main(["plan", "--model", model, "--response", "16", "--reward-model"]) == 0
    text = capsys.readouterr().out
    assert "a reward model" in text
    assert "the loss  " in text


QUANTISED = {
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, 8 bits": {"load_in_8bit": True, "load_in_4bit": False},
    "gptq, 3 bits": {"quant_method": "gptq", "bits": 3, "group_size": 128},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
}


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_that_are_quantised_in_their_files_are_said(tmp_path, capsys):
    """The counts are those of the dequantised model, of a base model as well."""
    LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=100).save_pretrained(tmp_path)
    adapter = tmp_path / "adapter"
    pytest.importorskip("peft").LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=str(tmp_path), target_modules=["q_proj"]
    ).save_pretrained(adapter)
    plain = []
    for said in (None, *QUANTISED):
        found = []
        if said is not None:
            rewrite(tmp_path, quantization_config=QUANTISED[said])
        for model, whose in ((tmp_path, "the model's"), (adapter, "the base model's")):
            assert main(["plan", "--model", str(model), "--response", "4"]) == 0
            text = capsys.readouterr().out
            assert text.count(f"{whose} files hold quantised weights ({said}), ") == (said is not None)
            assert text.count("quantised weights") == (said is not None)
            assert main(["plan", "--model", str(model), "--response", "4", "--json"]) == 0
            found.append(json.loads(capsys.readouterr().out))
            assert found[-1].pop("quantised") == said
        plain = plain or found
        assert found == plain


def test_a_frozen_reference_is_said_not_to_be_counted(model, capsys):
    assert main(["plan", "--model", model, "--response", "4"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not counted: ")
    assert "the frozen model of an objective with a reference" in last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--tokens: expected the scored tokens of a micro-batch, or --response, got neither"),
        (["--tokens", "63"], "--tokens: expected a positive multiple of 4 candidates, got 63"),
        (["--tokens", "64", "--response", "5"], "expected a positive multiple of 4 candidates of 5 tokens, got 64"),
        (["--tokens", "64", "--memory", "0"], "--memory: expected a positive number of GiB, got 0.0"),
        (["--response", "4", "--offload", "--no-checkpointing"], "--offload: expected gradient checkpointing"),
        (["--response", "4", "--lora-rank", "0"], "--lora-rank: expected a positive whole number, got 0"),
        (["--response", "4", "--tiled-mlp", "0"], "--tiled-mlp: expected True, False or a positive number"),
        (["--response", "-4"], "--response: expected a positive whole number, got -4"),
        (["--response", "4", "--peft_config.r"], "--peft-config.r: expected a value, got none"),
        (["--response", "4", "--peft_config.q", "4"], "peft_config: unknown key 'q'"),
        (["--response", "4", "--peft_config.r", "4", "--lora-rank", "4"], "--lora-rank: expected one of it and"),
        (["--response=4", "--model_init_kwargs.hidden_act", "relu"], "counted in --dtype, whole, and the model as its"),
        (["--response=4", "--model-init-kwargs.torch-dtype=auto"], "got --model_init_kwargs.torch_dtype; a folder"),
        (["--response", "4", "--workspace-mb", "0"], "--workspace-mb: expected a positive number of MiB, got 0"),
        (["--response", "4", "--reward-model", "--backend", "torch"], "--backend: expected none for a reward model"),
        (["--response", "4", "--reward-model", "--tiled-mlp"], "--tiled-mlp: expected none for a reward model"),
    ],
)
def test_refused_in_one_sentence(model, words, message, capsys):
    assert main(["plan", "--model", model, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("size", ["12.5", "1e3", "many"])
def test_the_workspace_is_what_train_takes_for_one(model, size, capsys):
    words = ["--workspace_mb", size]
    with pytest.raises(OptionError, match="--workspace_mb: expected a whole number"):
        collect(words)
    with pytest.raises(SystemExit):
        main(["plan", "--model", model, "--response", "4", *words])
    assert f"--workspace-mb: invalid int value: '{size}'" in capsys.readouterr().err


def test_a_misspelled_option(model, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--model", model, "--max_compleption_length", "4"])
    assert "did you mean '--max-completion-length'?" in capsys.readouterr().err


def test_no_such_model(capsys, tmp_path):
    assert main(["plan", "--model", str(tmp_path / "none"), "--response", "4"]) == 2
    assert "model: expected a folder that holds one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), ["--dtype bfloat16", "--gradient_checkpointing true"]),
        (("--prompts", "2"), ["--dtype bfloat16", "--gradient_checkpointing true", "--per_device_train_batch_size 2"]),
        (
            ("--dtype", "float32", "--no-checkpointing", "--layout", "shared", "--tiled-mlp", "--lora-rank", "4"),
            [
                "--layout shared",
                "--tiled_mlp true",
                "--peft_config.r 4 --peft_config.target_modules all-linear",
            ],
        ),
        (("--dtype", "float16", "--no-checkpointing"), ["--dtype float16"]),
        (("--dtype", "float32"), ["--gradient_checkpointing true"]),
        (("--dtype", "float32", "--gradient_checkpointing", "false"), []),
        (
            ("--dtype", "float32", "--offload"),
            ["--activation_checkpointing true", "--activation_checkpointing_kwargs.offload true"],
        ),
        (("--reward-model",), ["--dtype bfloat16", "--gradient_checkpointing true"]),
        (
            (
                "--dtype",
                "float32",
                "--no-checkpointing",
                "--optimizer",
                "sgd",
                "--backend",
                "torch",
                "--workspace-mb",
                "8",
            ),
            ["--optim sgd", "--backend torch", "--workspace_mb 8"],
        ),
        (("--dtype", "float32", "--no-checkpointing", "--workspace_mb", "2000000"), ["--workspace_mb 2000000"]),
        (
            (
                *("--dtype", "float32", "--no-checkpointing", "--sequence-parallel-size", "2"),
                *("--peft_config.r", "4", "--peft_config.target_modules", "[q_proj, v_proj]"),
            ),
            [
                """--peft_config.r 4 --peft_config.target_modules '["q_proj", "v_proj"]'""",
                "--sequence_parallel_size 2",
            ],
        ),
    ],
)
def test_what_train_needs_for_what_is_counted(model, words, options, capsys):
    """Its defaults are `RunOptions`' float32 and transformers' no checkpointing and 8 prompts."""
    if "--offload" in words and not offloads():
        pytest.skip("an older release")
    told = ["plan", "--model", model, "--response", "16", *(() if "--prompts" in words else ("--prompts", "8")), *words]
    assert main([*told, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"] == options
    collect(shlex.split(" ".join(options)))  # as train reads them
    assert main(told) == 0
    assert (f"counted is training with {' '.join(options)}: " in capsys.readouterr().out) == bool(options)


def test_what_makes_it_fit_in_the_words_of_train(model, capsys):
    told = ["plan", "--model", model, "--response", "64", "--candidates", "8", "--prompt", "256", "--memory"]
    assert main([*told, "1", "--json"]) == 0
    memory = str((json.loads(capsys.readouterr().out)["bytes"]["total"] - 1) / 2**30)
    assert main([*told, memory, "--json"]) == 0
    way = json.loads(capsys.readouterr().out)["with"]
    assert way["fits"]
    assert way["options"] == ["--layout shared"]
    assert way["train"][2:] == ["--per_device_train_batch_size 1", "--layout shared"]
    assert main([*told, memory]) == 0
    assert f"; in training {' '.join(way['train'])}" in capsys.readouterr().out

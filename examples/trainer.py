"""transformers' Trainer, as `CLHATrainer`: it brings the loss, global normalisation, evaluation and metrics along.

    python examples/trainer.py --steps 20
    python examples/trainer.py --model FOLDER --data ranked.jsonl --learning-rate 1e-5

A plain `Trainer` takes an attached model too: `clha_fast.attach(model, options)`, `RankedCollator` as its
`data_collator`, a `RankedDataset`, and `remove_unused_columns=False`.
"""

import argparse
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clha_fast.data import read_records
from clha_fast.hf import CLHAConfig, CLHATrainer
from clha_fast.models.loading import build_model, build_tokenizer, texts_of

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def main(steps: int, output_dir: str, model_path: str | None, data: str | None, learning_rate: float) -> None:
    path = data or str(files("clha_fast.demo") / "ranked_demo.jsonl")
    records = read_records(path)[:40]
    if model_path:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    else:
        tokenizer = build_tokenizer(texts_of(records), vocab_size=1024)
        model = build_model({**TINY, "num_attention_heads": 4, "num_key_value_heads": 2}, tokenizer, seed=0)
    args = CLHAConfig(
        output_dir=output_dir,
        preset="published",
        normalizer="global",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    held_out = len(records) // 5
    trainer = CLHATrainer(
        model,
        args,
        train_dataset=records[held_out:],
        eval_dataset=records[:held_out],
        processing_class=tokenizer,
    )
    trainer.train()
    for line in trainer.state.log_history:
        if "loss" in line:
            print(f"step {line['step']} loss {line['loss']:.3f} accuracy {line['rewards/accuracies']:.2f}")
    print({name: round(value, 3) for name, value in trainer.evaluate().items() if "logps" in name or "tau" in name})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output-dir", default="example-run")
    parser.add_argument("--model", help="folder or name of a causal language model; a tiny one with random weights")
    parser.add_argument("--data", help="ranked responses, of which the first 40 records are used; the bundled ones")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    given = parser.parse_args()
    main(given.steps, given.output_dir, given.model, given.data, given.learning_rate)

"""What `test_trainer.test_two_processes_are_one` starts under torch.distributed.run; holds no test."""

from __future__ import annotations

import json
import os
import sys

from tiny import make_model, make_rows, make_tokenizer

from clha_fast.hf.config import CLHAConfig
from clha_fast.hf.trainer import CLHATrainer


def main(folder: str, out: str) -> None:
    world = int(os.environ["WORLD_SIZE"])
    tokenizer = make_tokenizer()
    args = CLHAConfig(
        output_dir=folder,
        use_cpu=True,
        ddp_backend="gloo",
        max_steps=4,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=2,
        normalizer="global",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="steps",
        save_steps=2,
        logging_steps=2,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = CLHATrainer(
        make_model(len(tokenizer)),
        args,
        train_dataset=make_rows(16),
        eval_dataset=make_rows(7, seed=5),  # 7: the last round of batches is filled up
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        keep = ("loss", "rank_loss", "rewards/accuracies", "num_tokens", "inert_candidates", "grad_norm")
        lines = [{k: line[k] for k in keep} for line in trainer.state.log_history if "loss" in line]
        skip = ("runtime", "per_second", "epoch", "preparation")
        result = {
            "weights": [p.detach().double().norm().item() for p in trainer.model.parameters()],
            "eval": {k: v for k, v in metrics.items() if not any(word in k for word in skip)},
            "logs": lines,
            "checkpoints": sorted(name for name in os.listdir(folder) if name.startswith("checkpoint")),
        }
        with open(out, "w", encoding="utf-8") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

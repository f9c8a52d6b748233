"""What a resumed run throws away of a stream is trained on, and measured, nowhere; the order of a stream is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.stream import RankedStream
from clha_fast.training.trainer import CLHATrainer
from tests.support.power_cuts import CutAfter, PowerCut, weights
from tests.support.tiny import make_model, make_rows, make_tokenizer
from tests.support.trainers import config
from tests.training.test_loading import Rows, stream_of

TOKENIZER = make_tokenizer()
COLLATOR = RankedCollator(TOKENIZER, max_length=40)


class Reads(TrainerCallback):
    """Reads the training data once more, from their beginning, after every step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.read: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = next(iter(self.trainer.get_train_dataloader()))
        self.read.append((state.global_step, first["input_ids"].tolist()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeat", [False, True], ids=["ends", "endless"])
def test_whoever_else_reads_the_stream_has_its_own_records(tmp_path: Path, repeat: bool, workers: int) -> None:
    """The evaluation of a stream with an end, a callback's loader."""

    def run(name: str, cut: int | None = None) -> tuple[CLHATrainer, Reads]:
        stream, reads = RankedStream(Rows(make_rows(13)), COLLATOR, repeat=repeat), Reads()
        evaluated: dict[str, Any] = {} if repeat else {"eval_strategy": "steps", "eval_steps": 2}
        ours = CLHATrainer(
            make_model(len(TOKENIZER)),
            config(
                tmp_path / name,
                save_strategy="steps",
                save_steps=2,
                max_steps=3,
                dataloader_num_workers=workers,
                **evaluated,
            ),
            data_collator=COLLATOR,
            train_dataset=stream,
            eval_dataset=None if repeat else stream,
            processing_class=TOKENIZER,
            callbacks=[reads] if cut is None else [CutAfter(cut)],
        )
        reads.trainer = ours
        return ours, reads

    whole, read = run("whole")
    whole.train()
    with pytest.raises(PowerCut):
        run("half", cut=2)[0].train()
    rest, again = run("half")
    rest.train(resume_from_checkpoint=True)
    assert again.read == read.read[2:]
    if not repeat:
        assert rest.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    for name, tensor in weights(rest.model).items():
        assert torch.equal(tensor, weights(whole.model)[name]), name


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("shards", [2, 3])
def test_loader_workers_are_in_passes_of_their_own(shards: int, epoch: int) -> None:
    """`datasets` keeps the epoch, which orders a pass, in memory that all workers share: one set it for the others."""
    source = stream_of(make_rows(8), shards).shuffle(seed=3, buffer_size=4)
    stream = RankedStream(source, COLLATOR, repeat=True)
    stream.set_epoch(epoch)
    loader = iter(DataLoader(stream, batch_size=2, num_workers=2, collate_fn=len))
    assert [next(loader) for _ in range(12)] == [2] * 12
    assert source.epoch == epoch

"""What the model writes to held-out prompts, from evaluation to evaluation."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from clha_fast.batching.collator import RankedCollator
from clha_fast.files import write_text
from clha_fast.generation.decoding import Decoding
from clha_fast.generation.prompts import closing_tokens
from clha_fast.models.positions import positions_of

__all__ = ["SAMPLES_FILE", "closing_tokens", "describe", "first_prompts", "forget", "generate", "write"]

SAMPLES_FILE = "samples.jsonl"


def first_prompts(dataset: Any, count: int, collator: Any) -> list[Mapping[str, Any]]:
    """The first `count` examples of an evaluation dataset (of the first one of a dictionary), tokenised.

    Raises:
        ValueError: the examples are not tokenised and `collator` cannot do it.
    """
    if isinstance(dataset, Mapping):
        dataset = next(iter(dataset.values()))
    sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    examples = (
        [dataset[k] for k in range(min(count, len(dataset)))] if sized else list(itertools.islice(iter(dataset), count))
    )
    found = []
    for example in examples:
        if not (isinstance(example, Mapping) and "prompt_ids" in example):
            if not isinstance(collator, RankedCollator):
                raise ValueError(
                    "eval_samples: expected 0, or an evaluation dataset with prompt_ids, where a data_collator of "
                    f"another kind is given, got {type(collator).__name__}"
                )
            example = collator.tokenize_record(example)
        masks = example.get("completion_mask")
        if masks is not None:
            # Of chains, what stands before the first scored token begins the answer that is asked for.
            marker = list(example["completion_ids"][0])[: list(masks[0]).index(1)]
            example = {**example, "prompt_ids": [*example["prompt_ids"], *marker]}
        found.append(example)
    return found


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    device: torch.device,
    max_new_tokens: int,
    temperature: float = 0.0,
    decoding: Decoding | None = None,
) -> list[list[int]]:
    """The new tokens for each prompt; greedy at temperature 0. Leaves training mode and random state as they were.

    Prompts run one by one, so padding plays no part. An answer ends where the model has no position left: past the
    last one an embedding of positions would stop training. Where the weights are spread over processes, all must call
    with the same prompts.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    decoding = Decoding() if decoding is None else decoding
    positions = positions_of(model)
    training = model.training
    found: list[list[int]] = []
    model.eval()
    try:
        for number, prompt in enumerate(prompts):
            room = max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))
            if room < 1:
                found.append([])
                continue
            found += decoding.answer(
                model,
                [prompt],
                ends=ends,
                pad=pad,
                max_new_tokens=room,
                temperature=temperature,
                seeds=[number],  # the same at every evaluation
                device=device,
            )
    finally:
        model.train(training)
    return found


def describe(
    step: int,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    ends: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """One line of the file for each prompt: step, index, prompt, completion, tokens, finished (it ended by itself).

    A completion is without special tokens. A prompt has those of a chat template, whose words alone would be taken for
    the prompt's own; a BOS in front of a text is left out.
    """
    # What decoding leaves out: of a template's marks most have no name, and are not among `all_special_ids`.
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    lines = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = tokenizer.decode(list(answer), skip_special_tokens=True)
        lines.append(
            {
                "step": step,
                "index": index,
                "prompt": tokenizer.decode(list(prompt), skip_special_tokens=special.isdisjoint(prompt[1:])),
                "completion": text,
                "tokens": len(answer),
                "finished": bool(answer) and answer[-1] in ends,
            }
        )
    return lines


def write(folder: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Put `lines` behind those of earlier steps; later ones, of a run that was resumed from before them, go.

    Raises:
        OSError: the file cannot be written; what was there is intact.
    """
    os.makedirs(folder, exist_ok=True)
    new = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    _replace(folder, [*_until(folder, lines[0]["step"] - 1), *new])


def forget(folder: str, step: int) -> None:
    """Training begins behind `step`: lines of later ones are of a training that is no part of it, and go.

    Raises:
        OSError: as `write`.
    """
    path = os.path.join(folder, SAMPLES_FILE)
    if not os.path.isfile(path):
        return
    kept = _until(folder, step)
    if kept:
        _replace(folder, kept)
    else:
        os.unlink(path)


def _until(folder: str, step: int) -> list[str]:
    path = os.path.join(folder, SAMPLES_FILE)
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [line for line in file if json.loads(line)["step"] <= step]


def _replace(folder: str, lines: Sequence[str]) -> None:
    write_text(os.path.join(folder, SAMPLES_FILE), "".join(lines))

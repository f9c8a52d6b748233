"""Where a trainer takes the reference log-probabilities from that its objective compares with."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from clha_fast.batching.signals import signals_of
from clha_fast.batching.stream import RankedStream
from clha_fast.data.containers import table_rows
from clha_fast.data.records import RankedRecord, shorten
from clha_fast.files import write_json
from clha_fast.models.adapters import changed_by_adapter, is_adapted, trained_beside_adapter
from clha_fast.models.frozen import FrozenModel
from clha_fast.models.init_kwargs import load_like
from clha_fast.models.layouts import RowLayouts
from clha_fast.models.loading import fingerprint, load_tokenizer
from clha_fast.models.sequence_parallel import SequenceParallel
from clha_fast.objectives import Objective
from clha_fast.objectives.ranked import RankedBatch
from clha_fast.training.config import CLHAConfig
from clha_fast.types import RankingInputs

logger = logging.get_logger(__name__)

SIGNAL = "reference_logps"
# What a checkpoint says of the model that its run compares with.
REFERENCE_FILE = "reference.json"
_PRECOMPUTE = "or clha-fast score --policy MODEL SRC DST writes them into the records, for reference='file'"
_TEXTS = {
    "file": "the records' reference_logps",
    "adapter": "the model with its adapter switched off",
    "copy": "a frozen copy of the model as it is at the start",
}


class Reference:
    """The reference of one run.

    Args:
        model, ref_model, peft_config: of the trainer.
        datasets: what will be trained and evaluated on, as they were given, the first one first; none where a collator
            of somebody else's makes the batches.

    Attributes:
        kind: "file", "adapter", "copy", "model" (one that was given or loaded), or None where there is none.
        text: what it is, for people. frozen: says the log-probabilities where the batches do not bring them.

    Raises:
        ValueError: a reference that the objective does not read, two of them, or one that there is not.
    """

    def __init__(
        self,
        args: CLHAConfig,
        objective: Objective,
        model: nn.Module,
        ref_model: nn.Module | None,
        peft_config: Any,
        datasets: list[Any],
    ) -> None:
        self.frozen: FrozenModel | None = None
        self._args = args
        adapted = peft_config is not None or is_adapted(model)
        self.kind = self._kind(objective, ref_model, adapted, datasets)
        why = ""
        if self.kind == "adapter" and args.reference is None:
            why = changed_by_adapter(model, peft_config)
            if why:
                self.kind = "copy"
                why = f", not with {_TEXTS['adapter']}, for {why}"
        self.text = _TEXTS.get(self.kind or "", str(args.reference))
        if ref_model is not None:
            self.text = f"the {type(ref_model).__name__} given as ref_model"
        if self.kind == "file" and args.temperature != 1:
            raise ValueError(
                f"temperature: expected 1 with {SIGNAL} of the records, which are those at 1, got {args.temperature}; "
                "reference='copy' (or 'adapter') computes them at any"
            )
        if self.kind is not None and args.reference is None and ref_model is None:
            say = logger.warning if self.kind == "copy" else logger.info
            more = "; it takes the weights' memory once more" if self.kind == "copy" else ""
            say(f"reference: the objective {objective.name!r} compares with {self.text}{why}{more}")

    def _kind(
        self, objective: Objective, ref_model: nn.Module | None, adapted: bool, datasets: list[Any]
    ) -> str | None:
        asked = self._args.reference
        if ref_model is not None:
            if not isinstance(ref_model, nn.Module):
                raise ValueError(
                    f"ref_model: expected a model, got {shorten(ref_model)}; reference= takes the name of one"
                )
            if asked is not None:
                raise ValueError(f"ref_model: expected None beside reference={asked!r}, got a model")
            if SIGNAL not in signals_of(objective):
                raise ValueError(
                    f"ref_model: expected None with the objective {objective.name!r}, which reads no reference "
                    "log-probabilities, got a model"
                )
            return "model"
        if asked is not None:
            if asked == "file" and datasets:
                found = next(filter(None, map(_reference_in, datasets)), None)
                if not found:
                    raise ValueError(
                        f"reference: expected records with {SIGNAL} for 'file', got none in the first one; 'copy' "
                        f"computes them, {_PRECOMPUTE}"
                    )
                if not _serves(found, objective):
                    raise ValueError(
                        f"reference: expected adapter, copy or a model with the objective {objective.name!r}, which "
                        "compares token by token, got 'file', whose records have sums over responses"
                    )
            if asked == "adapter" and not adapted:
                raise ValueError(
                    "reference: expected a model with an adapter of peft's for 'adapter' (peft_config adds one), got "
                    "one without; 'copy' takes a frozen copy of it"
                )
            return asked if asked in _TEXTS else "model"
        if SIGNAL not in signals_of(objective):
            return None
        if _serves(_reference_in(next(iter(datasets), None)), objective):
            return "file"
        if SIGNAL not in objective.needs:
            return None
        return "adapter" if adapted else "copy"

    @property
    def computed(self) -> bool:
        """Whether a model says them, so that batches need not bring them."""
        return self.kind in ("adapter", "copy", "model")

    def carried(self, objective: Objective) -> tuple[str, ...]:
        """The signals that batches bring."""
        return tuple(name for name in signals_of(objective) if name != SIGNAL or not self.computed)

    def take(self, model: nn.Module, ref_model: nn.Module | None, tokenizer: Any) -> nn.Module | None:
        """The frozen model, before `model` is changed in any way; None where there is none of its own.

        Raises:
            ValueError: `model` is spread over processes; a model that cannot be loaded, or has another tokenizer.
        """
        if not self.computed:
            return None
        self._check_whole([part for part in (model, ref_model) if part is not None])
        if ref_model is model:
            raise ValueError(
                "ref_model: expected another model than the one that trains, got the same; reference='copy' takes a "
                "frozen copy of it"
            )
        if self.kind == "copy":
            return copy.deepcopy(model).requires_grad_(False)
        if self.kind == "adapter":
            return None
        if ref_model is not None:
            return ref_model
        path: Any = self._args.reference
        _check_tokenizer(path, tokenizer)
        loaded: nn.Module = load_like(model, path, "reference")
        return loaded.requires_grad_(False)

    def _check_whole(self, models: Iterable[nn.Module]) -> None:
        parameters = [parameter for model in models for parameter in model.parameters()]
        how = None
        if self._args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            how = "FSDP"
        elif is_deepspeed_zero3_enabled() or any(hasattr(parameter, "ds_id") for parameter in parameters):
            how = "DeepSpeed ZeRO-3"
        elif any(isinstance(parameter, DTensor) for parameter in parameters):
            how = "a model that is spread over processes (DTensor weights)"
        if how is not None:
            raise ValueError(
                f"reference: expected 'file' under {how}, where no process holds a whole model to run, got "
                f"{self.kind!r}; clha-fast score --policy MODEL SRC DST writes reference_logps into the records"
            )

    def hold(
        self, model: nn.Module, own: nn.Module | None, budget: int | None, sequence: SequenceParallel | None = None
    ) -> None:
        """Makes `frozen`: of `own`, which `take` gave, or of `model` without its adapter, which it has by now.

        Args:
            sequence: the processes over which the tokens of rows are spread.

        Raises:
            ValueError: weights that train act with the adapter switched off, too.
        """
        if not self.computed:
            return
        if own is None:
            beside = trained_beside_adapter(model) if is_adapted(model) else []
            if beside:
                raise ValueError(
                    f"reference: expected nothing to train beside the adapter for 'adapter', got {beside[0]}"
                    f"{f' and {len(beside) - 1} more' if len(beside) > 1 else ''}, which would change the reference; "
                    "reference='copy' takes a frozen copy of the model"
                )
        backend: Any = self._args.backend
        whose, off = (model, True) if own is None else (own, False)
        self.frozen = FrozenModel(whose, backend, self._args.temperature, budget, off, sequence)

    @property
    def layouts(self) -> list[RowLayouts]:
        """What probes the model that is frozen; none where there is none."""
        return [] if self.frozen is None else [self.frozen.layouts]

    @property
    def own_model(self) -> nn.Module | None:
        """The model that is frozen, where it is another one than the one that trains."""
        return None if self.frozen is None or self.kind == "adapter" else self.frozen.model

    def write(self, folder: str) -> None:
        """What `check` looks for, into a checkpoint."""
        own: Any = self.own_model
        if self.computed:
            told = {"kind": self.kind, "fingerprint": None if own is None else fingerprint(own)}
            write_json(os.path.join(folder, REFERENCE_FILE), told)

    def check(self, checkpoint: str) -> None:
        """Whether the run that `checkpoint` is from compared with the same model.

        Raises:
            ValueError: it did not: as when a copy was taken of weights that had been trained by then.
        """
        own: Any = self.own_model
        path = os.path.join(checkpoint, REFERENCE_FILE)
        if not self.computed or not os.path.isfile(path):
            return
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        if before.get("fingerprint") != (None if own is None else fingerprint(own)):
            kind = before.get("kind")
            given = "the same reference model" if kind == "model" else "the model that this run started from"
            if "adapter" in (self.kind, kind) and kind != "model":
                given = f"reference={kind!r} and {given}"
            raise ValueError(
                f"resume_from_checkpoint: expected the reference that {checkpoint} was trained with, got another one; "
                f"give the trainer {given}, not the checkpoint's"
            )


def _check_tokenizer(path: str, tokenizer: Any) -> None:
    """ValueError where the folder has a tokenizer whose tokens mean something else."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    if os.path.isfile(os.path.join(path, "tokenizer_config.json")):
        other = load_tokenizer(path, "reference")
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"reference: expected a model with the tokenizer of the one that trains, got {path}, whose tokens are "
                "others"
            )


def _reference_in(dataset: Any) -> Any:
    """The reference log-probabilities in the first example of a dataset, whatever it is; None for none."""
    if isinstance(dataset, RankedStream):
        dataset = dataset.source
    if isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset):
        sized: Any = dataset
        first = sized[0] if len(sized) else None
    elif isinstance(dataset, (str, os.PathLike, Iterator)) or not hasattr(dataset, "__iter__"):
        return None  # refused, or left alone, where datasets are made of them
    else:
        first = next(table_rows(dataset), None)
    if isinstance(first, RankedRecord):
        return first.signals.get(SIGNAL)
    return first.get(SIGNAL) if isinstance(first, Mapping) else None


def _serves(values: Any, objective: Objective) -> bool:
    """Whether there are any that the objective can compare with: tried on sums of responses, where they are that."""
    if not values:
        return False
    if hasattr(values[0], "__len__"):  # of tokens
        return True
    numbers = torch.arange(5, dtype=torch.float64)
    given = RankingInputs(
        torch.tensor([2, 3]),
        torch.tensor([2]),
        rewards=torch.tensor([1.0, 0.0]),
        **{name: -numbers[:2] if name == SIGNAL else numbers for name in signals_of(objective)},
    )
    try:
        RankedBatch(objective, given, torch.ones(5, dtype=torch.bool), torch.float64).rank(0, 1, -numbers)
    except ValueError:
        return False
    return True

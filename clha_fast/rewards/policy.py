"""Reference log-probabilities for ranked responses: those of a frozen language model, computed once and kept."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clha_fast.batching.batch import CandidateFeature, pack_candidates
from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.segments import check_layout
from clha_fast.batching.signals import token_checksum
from clha_fast.data.readers import Source
from clha_fast.data.records import RankedRecord
from clha_fast.files import check_destination
from clha_fast.models.frozen import FrozenModel
from clha_fast.models.loading import DTYPES, check_vocabulary, find_device, fingerprint, load_model, load_tokenizer
from clha_fast.models.positions import positions_of
from clha_fast.processes import ALONE, Processes
from clha_fast.rewards.run import Row, ScoringRun, as_records, families

_SIGNALS = ("reference_logps", "reference_tokens")


class Policy:
    """A causal language model that says what log-probabilities responses have.

    Args:
        model: on its device; put into evaluation mode. tokenizer: of the model that will train.
        layout: of the rows that run, `padded`, `packed`, `shared` (the responses of a record behind one prompt) or
            `auto`, as `clha_fast.attach` has it.

    Attributes:
        layout: what that came to.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
        UnsupportedHeadError: the model's head cannot be read, see `models.measure`.
        UnsupportedLayoutError: the model does not compute such rows as it computes each response alone.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, layout: str = "padded") -> None:
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self._frozen = FrozenModel(model)
        self.layout = self._frozen.layouts.settle(layout)

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for, None when its configuration names no limit."""
        return positions_of(self.model)

    def sums(self, rows: Sequence[Row]) -> Tensor:
        """float64 [len(rows)] nats, on the CPU: log-probability of each response behind its prompt, without the logits.

        The batch and the way through the model are those of training. Neighbours with one prompt share it where the
        layout does.
        """
        features: list[CandidateFeature] = [
            {
                "prompt_ids": same[0].prompt,
                "completion_ids": [row.response for row in same],
                "rewards": None,
                "sft_index": 0,
                "source": f"row {number}",
            }
            for number, same in enumerate(families(rows, self.layout))
        ]
        pad = self.tokenizer.pad_token_id
        batch = pack_candidates(
            features,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            drop_inert=False,
            layout=self.layout,
        )
        logps = self._frozen(batch.to(self.model.device)).double().cpu()
        return torch.stack([part.sum() for part in logps.split(batch.candidate_lengths.tolist())])


def load_policy(
    path: str, *, device: str = "auto", dtype: str = "float32", layout: str = "padded", option: str = "policy"
) -> Policy:
    """The causal language model of a local folder or of a name on the Hub, with its tokenizer.

    Args:
        device: "auto" takes the accelerator that torch sees, else the CPU; or a torch device such as "cuda:1".
        dtype: of the weights, float32 as in training unless told; "auto" is the checkpoint's own.
        layout: as `Policy`. option: what errors call it.

    Raises:
        ValueError: nothing there to load, weights that are missing, an unknown device or dtype; as `Policy`.
    """
    check_layout(layout, "auto")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    place = find_device(device)
    path = os.fspath(path)
    tokenizer = load_tokenizer(path, option)
    model: Any = load_model(path, dtype if dtype == "auto" else getattr(torch, dtype), option=option)
    try:
        model.to(place)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"device: {path} does not fit in the memory of {place} as {model.dtype}") from error
    return Policy(model, tokenizer, layout)


@dataclass(frozen=True)
class PolicyResult:
    """What a run of scoring with a policy gave.

    Attributes:
        records: the source's records in its order, with `reference_logps` and `reference_tokens`.
        candidates: responses in all. tokens: of them all, those that are scored. resumed: responses (the same ones of a
            record count once) that an earlier run had left.
        truncated: records of which something was cut. replaced: records that had `reference_logps` before.
    """

    records: list[RankedRecord]
    candidates: int
    tokens: int
    resumed: int
    truncated: int
    replaced: int

    @property
    def mean_logp(self) -> float:
        """Nats a token, over all tokens."""
        return sum(sum(record.signals["reference_logps"]) for record in self.records) / self.tokens


def score_policy(
    source: Source | Sequence[RankedRecord],
    destination: str | os.PathLike[str],
    policy: Policy,
    *,
    format: str = "auto",
    columns: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    processes: Processes = ALONE,
) -> PolicyResult:
    """Write every record of `source` to `destination` with `reference_logps`, as canonical JSON Lines.

    These are the summed log-probabilities, nats, of the responses' scored tokens under `policy`, at temperature 1: what
    a frozen copy of it says in training. Rewards stay as they are. `reference_tokens`, written beside them, tell the
    tokens that were summed over from others: training with another tokenizer, template or limit is refused.

    Interruption, resuming and batches are those of `scoring.score_file`.

    Args:
        source: records, or as `clha_fast.data.iter_records`, with `format` and `columns`.
        batch_size: responses in a forward pass.
        max_length, max_prompt_length, max_completion_length: tokens; give training the same. None is no limit.
        resume, overwrite, progress, processes: as `scoring.score_file`.

    Raises:
        ValueError: a row that is longer than the model's positions; as `scoring.score_file`.
        RecordError, OSError, ScoringError, ScoringInterrupted: as there.
    """
    check_destination(destination, resume=resume, overwrite=overwrite)
    records = as_records(source, format, columns)
    limits = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
    }
    run = PolicyRun(records, policy, batch_size, limits, progress and not processes.rank)
    scored: list[RankedRecord] = []

    def finish(sums: dict[int, float]) -> list[dict[str, Any]]:
        scored.extend(run.with_reference(sums))
        return [record.as_dict() for record in scored]

    options = {"resume": resume, "overwrite": overwrite, "progress": progress}
    resumed = run.write(os.fspath(destination), finish, processes=processes, **options)
    replaced = sum("reference_logps" in record.signals for record in records)
    tokens = sum(len(run.rows[index].response) for indices in run.rows_of for index in indices)
    return PolicyResult(scored, sum(map(len, run.rows_of)), tokens, resumed, run.truncated, replaced)


class PolicyRun(ScoringRun):
    """`ScoringRun` by a language model: the score of a response is its summed log-probability."""

    key = "reference_logps"
    scorer = "policy"

    def __init__(
        self,
        records: list[RankedRecord],
        policy: Policy,
        batch_size: int,
        limits: dict[str, int | None],
        progress: bool,
        answer_prefix: str = "",
    ) -> None:
        self.policy, self.limits, self.answer_prefix = policy, limits, answer_prefix
        # What a record brings of an earlier policy's is replaced, and not held to these tokens.
        collator = RankedCollator(policy.tokenizer, signals=(), **dict[str, Any](limits))
        super().__init__(records, policy.model, collator, batch_size, progress, policy.layout)
        positions, longest = policy.max_positions, max((len(row.tokens) for row in self.rows), default=0)
        if positions is not None and longest > positions:
            raise ValueError(
                f"max_length: expected rows of at most the {positions:,} positions of {type(policy.model).__name__}, "
                f"got up to {longest:,} tokens; max_length={positions} cuts them, here as in training"
            )

    def settings(self) -> dict[str, Any]:
        return {**self.limits, **({"answer_prefix": self.answer_prefix} if self.answer_prefix else {})}

    def fingerprint(self) -> str:
        return fingerprint(self.policy.model)

    def forward(self, rows: Sequence[Row]) -> Tensor:
        return self.policy.sums(rows)

    def with_reference(self, sums: dict[int, float]) -> list[RankedRecord]:
        """The records, with sums by position of the row."""
        out = []
        for record, indices in zip(self.records, self.rows_of, strict=True):
            rows = [self.rows[index] for index in indices]
            values = (
                tuple(sums[index] for index in indices),
                tuple(token_checksum(row.prompt, row.response) for row in rows),
            )
            signals = {**record.signals, **dict(zip(_SIGNALS, values, strict=True))}
            out.append(dataclasses.replace(record, signals=signals))
        return out

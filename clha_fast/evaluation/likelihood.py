"""What a model's log-probabilities say of held-out answers: likelihood of the best, order of all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from clha_fast.batching.batch import CandidateFeature, pack_candidates
from clha_fast.batching.collator import RankedCollator
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.evaluation.intervals import import_scipy
from clha_fast.layout import Layout, accumulate
from clha_fast.models.attach import attach
from clha_fast.models.positions import positions_of
from clha_fast.objectives.pairs import COMPARED, Pairs, pair_blocks, wins
from clha_fast.objectives.sft import SFTOptions

COLUMNS = (
    *("nll", "nll_tokens", "pairs", "kept", "kept_correct"),
    *("ordered", "correct", "concordance", "tau"),
)


def candidate_scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[RankedRecord],
    *,
    batch_size: int = 8,
    max_prompt_length: int | None = 384,
    max_length: int | None = None,
    answer_prefix: str = "",
    backend: Any = "auto",
    layout: str = "padded",
    progress: bool = False,
    notes: list[str] | None = None,
    cut: list[bool] | None = None,
) -> tuple[list[list[float]], list[list[int]]]:
    """(s_i of Eq. 3, nats a token; |y_i|, tokens) of every response of every record.

    The loss's own road: tokens as in training, the fused head, no logits; no candidate is left out as inert.

    Args:
        model: on its device; evaluation mode is set.
        batch_size: rows of a forward pass; a record with more responses makes a pass of its own.
        max_prompt_length, max_length: as `RankedCollator`; max_length None is the model's positions.
        answer_prefix: what the model's answers begin with (Chain of Hindsight's marker); read, not scored. A response
            follows after a blank.
        backend, layout: as `clha_fast.attach`.
        notes: gets sentences about what the limits have cut, and which rows `auto` has taken.
        cut: gets for each record whether the limits have cut its prompt or a response.

    Raises:
        ValueError, UnsupportedHeadError, UnsupportedLayoutError, BackendError: as `RankedCollator.tokenize_record` and
            `clha_fast.attach`; a log-probability that is not finite.
    """
    objective = SFTOptions()  # any objective has the scores
    limit = positions_of(model) if max_length is None else max_length
    collator = RankedCollator(tokenizer, objective, limit, max_prompt_length, drop_inert=False)
    features: list[CandidateFeature] = []
    prompts = responses = shared = 0
    for record in records:
        feature, prompt_cut, own_cut = collator.tokenize_behind(record, answer_prefix)
        prompts, responses = prompts + prompt_cut, responses + own_cut
        if cut is not None:
            cut.append(bool(prompt_cut or own_cut))
        features.append({**feature, "rewards": None})  # not needed, and not all records may have them
    scores: list[list[float]] = [[] for _ in records]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.eval()
    bar = logging.tqdm(total=len(records), desc="Log-probabilities", unit=" prompts", disable=not progress)
    batches = _batches(features, batch_size)
    with bar, attach(model, objective, backend=backend, layout=layout) as attached, torch.no_grad():
        for numbers in batches:
            batch = pack_candidates(
                [features[number] for number in numbers],
                pad_token_id=int(pad),
                objective=objective,
                drop_inert=False,
                layout=attached.layout,
            ).to(model.device)
            shared += batch.segments is not None
            found = model(**batch.as_dict()).metrics.scores.tolist()
            for number in numbers:
                completions = features[number]["completion_ids"]
                own, found = found[: len(completions)], found[len(completions) :]
                # The same response twice is a tie: apart, padding could part their scores by a last bit.
                first: dict[tuple[int, ...], float] = {}
                scores[number] = [
                    first.setdefault(tuple(ids), score) for ids, score in zip(completions, own, strict=True)
                ]
            bar.update(len(numbers))
    for record, own in zip(records, scores, strict=True):
        if not all(map(math.isfinite, own)):
            expected = "finite log-probabilities of its responses"
            raise RecordError.of(record.source, "model", expected, own)
    if notes is not None and prompts + responses:
        limits = {"max_length": limit, "max_prompt_length": max_prompt_length}
        most = ", ".join(f"{name} {value:,}" for name, value in limits.items() if value is not None)
        notes.append(
            f"likelihood and ranking: {prompts:,} of {len(records):,} prompts and {responses:,} responses were cut "
            f"({most})"
        )
    if notes is not None and layout == "auto":
        notes.append(f"likelihood and ranking: auto took shared rows for {shared:,} of {len(batches):,} batches")
    return scores, [[len(ids) for ids in feature["completion_ids"]] for feature in features]


def _batches(features: Sequence[CandidateFeature], rows: int) -> list[list[int]]:
    """Records of like length together, the longest first, at most `rows` responses each where a record allows it."""

    def longest(number: int) -> int:
        feature = features[number]
        return len(feature["prompt_ids"]) + max(map(len, feature["completion_ids"]))

    batches: list[list[int]] = []
    held = 0
    for number in sorted(range(len(features)), key=longest, reverse=True):
        size = len(features[number]["completion_ids"])
        if not batches or held + size > rows:
            batches.append([])
            held = 0
        batches[-1].append(number)
        held += size
    return batches


def likelihood_values(
    records: Sequence[RankedRecord],
    scores: Sequence[Sequence[float]],
    tokens: Sequence[Sequence[int]],
    *,
    noise_rule: str = "abs",
    reward_margin: float = 3.0,
) -> dict[str, list[float | None]]:
    """What every prompt adds to the figures of `COLUMNS`, by name.

    nll / nll_tokens: -S and |y| of the first response, the best. pairs, kept: all pairs, and those that the noise rule
    keeps. kept_correct: kept pairs whose better-ranked response has the higher score. ordered: pairs with an order (by
    reward where there are rewards, equal ones have none; else by rank). correct: those that the scores have likewise.
    Equal scores are half right in both.
    concordance: those less the opposite ones, so that its sum over that of `ordered` is the trainer's tau. tau:
    Kendall's of the prompt alone (scipy's tau-b), None where it is undefined.

    Args:
        scores, tokens: from `candidate_scores`. noise_rule, reward_margin: as `CLHAOptions`.
    """
    found: dict[str, list[float | None]] = {name: [None] * len(records) for name in COLUMNS}
    for rewarded in (False, True):
        numbers = [k for k, record in enumerate(records) if (record.rewards is not None) == rewarded]
        if numbers:
            counts = _pair_counts(
                [records[k] for k in numbers], [scores[k] for k in numbers], noise_rule, reward_margin
            )
            for name, values in counts.items():
                for number, value in zip(numbers, values, strict=True):
                    found[name][number] = value
    kendall = import_scipy().kendalltau
    for number, (record, own) in enumerate(zip(records, scores, strict=True)):
        found["nll"][number] = -own[0] * tokens[number][0]
        found["nll_tokens"][number] = float(tokens[number][0])
        order = [-float(rank) for rank in range(len(own))]
        if record.rewards is not None:  # what only float64 keeps apart is a tie, as in the counts of pairs
            order = torch.tensor(record.rewards, dtype=COMPARED).tolist()
        if len(set(order)) > 1 and len(set(own)) > 1:
            tau = float(kendall(order, own).statistic)
            found["tau"][number] = None if math.isnan(tau) else tau
    return found


def _pair_counts(
    records: Sequence[RankedRecord], scores: Sequence[Sequence[float]], noise_rule: str, reward_margin: float
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for block in pair_blocks(zip(records, scores, strict=True), lambda both: len(both[1])):
        some, own = [record for record, _ in block], [values for _, values in block]
        for name, counts in _counts_of_block(some, own, noise_rule, reward_margin).items():
            found[name] += counts
    return found


def _counts_of_block(
    records: Sequence[RankedRecord], scores: Sequence[Sequence[float]], noise_rule: str, reward_margin: float
) -> dict[str, list[float]]:
    sizes = torch.tensor([len(own) for own in scores])
    layout = Layout.whole(sizes)
    rewards = None
    if records[0].rewards is not None:
        rewards = torch.tensor([value for record in records for value in record.rewards or ()], dtype=torch.float32)
    pairs = Pairs.of(layout, rewards)
    flat = torch.tensor([value for own in scores for value in own], dtype=torch.float64)
    lead = torch.sign(flat[pairs.i] - flat[pairs.j])
    kept, agreement = pairs.kept(noise_rule, reward_margin), pairs.order * lead

    def per_prompt(values: Tensor) -> list[float]:
        sums = torch.zeros(len(records), dtype=torch.float64)
        accumulate(sums, layout.prompt[pairs.i], values.to(torch.float64))
        found: list[float] = sums.tolist()
        return found

    return {
        "pairs": per_prompt(torch.ones_like(lead)),
        "kept": per_prompt(kept),
        "kept_correct": per_prompt(torch.where(kept, wins(lead), 0.0)),
        "ordered": per_prompt(pairs.order != 0),
        "correct": per_prompt(torch.where(pairs.order != 0, wins(agreement), 0.0)),
        "concordance": per_prompt(agreement),
    }

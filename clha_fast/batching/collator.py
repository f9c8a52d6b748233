"""Ranked records, tokenised once and collated into batches of candidates."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from clha_fast.batching.batch import CandidateFeature, check_features, inert_mask, pack_candidates
from clha_fast.batching.chat import render_chat
from clha_fast.batching.dates import date_hint
from clha_fast.batching.encoding import Encoder
from clha_fast.batching.endings import Endings
from clha_fast.batching.segments import check_layout
from clha_fast.batching.signals import PER_CANDIDATE, signals_of, token_checksum
from clha_fast.batching.workers import Example, as_record, is_table, tokenise_all, tokenise_table
from clha_fast.data.chains import record_chains
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.data.rendering import render_prompt
from clha_fast.objectives import Objective, as_objective
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.options import count
from clha_fast.types import SIGNALS

__all__ = ["RankedCollator", "RankedDataset", "inert_mask"]

logger = logging.get_logger(__name__)

# A prompt is not cut below this part of max_length (one in so many) for its responses' sake.
_PROMPT_SHARE = 4
# Of a prompt with its longest response, of either: what decides which tokens a record has.
LIMITS = ("max_length", "max_prompt_length", "max_completion_length")


class RankedCollator:
    """Turns ranked records into the dictionary of a `CandidateBatch`.

    Prompt and responses are tokenised apart and concatenated: no token crosses the boundary, the prompt's tokens
    are those that generation begins with, and every candidate follows the same ones. A response's tokens are those
    it has in the middle of a text, or directly behind the special token that ends the prompt: tokenizers that put a
    blank in front of a text put none in front of a response.

    A text prompt keeps the special tokens that the tokenizer puts in front (BOS), once, and a response is closed by
    EOS, unless a special token ends it: texts that a chat template has rendered beforehand bring both along.
    Messages go through the tokenizer's chat template, which writes BOS itself, and a response is closed by the
    template's own end of turn (`batching.chat.render_chat`), by EOS where the template has none. What closes a
    response is scored with it, once, unless the response was truncated.

    Truncation, the same for all candidates of a prompt and whether or not some are dropped: responses are cut
    on the right to `max_completion_length` (EOS counts); the prompt is cut on the left, behind its BOS, to
    `max_prompt_length` and to what the longest response leaves of `max_length`, but for that not below a quarter
    of `max_length`, nor to less than one token of its own; what is still too long is cut from the responses.

    For an objective with `markers` the candidates of a record are chains of its answers (`data.chains.record_chains`),
    without rewards: each is one assistant turn, its parts are tokenised apart like prompt and response, and the tokens
    of answers and of what closes the turn are scored, those of markers not. `max_completion_length` is that of each of
    its answers (with what closes the turn, of the last); what `max_length` cuts is cut from the chain's end.

    Args:
        tokenizer: a transformers tokenizer with an EOS token. Padding uses its PAD token, else EOS (padding
            is masked).
        options: the loss's options, which decide what is inert and whether answers become chains.
        max_length: tokens of prompt and response together. max_prompt_length, max_completion_length: of
            either. None is no limit.
        drop_inert: leave inert candidates out of the model's batch (see `clha_fast.batching.batch.inert_mask`).
        pad_to_multiple_of: rows are padded to a multiple of it.
        signals: those of the records that batches carry, names of `types.SIGNALS`; None is those that the loss reads.
            That others are left out is said once.
        layout: of the rows, as `clha_fast.batching.batch.pack_candidates` has it: `padded`, `packed`, `shared`
            or `auto`, which counts each batch.

    Raises:
        ValueError: the tokenizer has no EOS token, or is mistral-common's; a limit is not a positive integer; an
            unknown signal or layout.
    """

    # Whether responses are a model's own words: none is refused for what it says, as `render_chat` has it.
    _sampled: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: Objective = PUBLISHED,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
        drop_inert: bool = True,
        pad_to_multiple_of: int | None = None,
        signals: Sequence[str] | None = None,
        layout: str = "padded",
    ) -> None:
        check_layout(layout, "auto")
        self.layout = layout
        if not hasattr(tokenizer, "eos_token_id"):
            raise ValueError(f"tokenizer: expected a transformers tokenizer, got {tokenizer!r}")
        if type(tokenizer).__name__ == "MistralCommonBackend":  # its chat template and its tokens cannot be looked at
            raise ValueError(
                "tokenizer: expected one of transformers' own, got mistral-common's MistralCommonBackend; load it with "
                "PreTrainedTokenizerFast.from_pretrained, or give the model's folder"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer: expected one with an EOS token, which closes every response, got none; "
                "set tokenizer.eos_token"
            )
        limits = {
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            "max_completion_length": max_completion_length,
            "pad_to_multiple_of": pad_to_multiple_of,
        }
        for name, value in limits.items():
            limits[name] = None if value is None else count(name, value, "a positive integer or None")
        self.max_length = limits["max_length"]
        self.max_prompt_length = limits["max_prompt_length"]
        self.max_completion_length = limits["max_completion_length"]
        self.pad_to_multiple_of = limits["pad_to_multiple_of"]
        self.tokenizer = tokenizer
        self.options = as_objective(options)
        self.drop_inert = drop_inert
        for name in signals or ():
            if name not in SIGNALS:
                raise ValueError(f"signals: expected names among {', '.join(SIGNALS)}, got {name!r}")
        self.signals = signals_of(self.options) if signals is None else tuple(signals)
        self.said: set[str] = set()  # signals that were left out, and that this was said of

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """`CandidateBatch.as_dict()` of the examples: records, rows in a known format, or tokenised features.

        Where examples at the end only fill the batch up (`RankedStream`), "num_fill" says how many.

        Raises:
            ValueError: as `tokenize_record` and `clha_fast.batching.batch.pack_candidates`.
        """
        features = []
        for number, example in enumerate(examples):
            if not isinstance(example, RankedRecord) and "completion_ids" in example:
                feature = cast(CandidateFeature, example)
                self.say_left_out(name for name in SIGNALS if feature.get(name) is not None)
            else:
                record = as_record(example, f"record {number} of the batch")
                self.say_left_out(record.signals)
                feature = self.tokenize_record(record)
            features.append(feature)
        pad = self.tokenizer.pad_token_id
        fill = sum("fill" in feature for feature in features)
        batch = pack_candidates(
            features,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            objective=self.options,
            drop_inert=self.drop_inert,
            pad_to_multiple_of=self.pad_to_multiple_of,
            signals=self.signals,
            layout=self.layout,
        ).as_dict()
        return {**batch, "num_fill": fill} if fill else batch

    def say_left_out(self, names: Iterable[str]) -> None:
        """Warn of signals among `names` that batches do not carry, each once."""
        for name in set(names) & set(SIGNALS) - set(self.signals) - self.said:
            self.said.add(name)
            why = f"the objective {self.options.label!r} does not read them"
            if name in signals_of(self.options):
                why = "they come from elsewhere"
            logger.warning(f"records: their {name} are left out, for {why}")

    def tokenize_record(self, record: Example) -> CandidateFeature:
        """The truncated token lists of a record, neither padded nor dropped: for `Dataset.map` or a cache.

        Raises:
            RecordError: a row in no known format, or a bad one; a chat template that refuses the messages or breaks
                the boundary between prompt and response; a response without tokens; a prompt without tokens where
                the tokenizer puts no BOS (the first response token needs a row to read); a limit that leaves the
                prompt no token of its own.
        """
        feature, _, _ = self.tokenize_counted(as_record(record, "record"))
        return feature

    def tokenize_counted(self, record: RankedRecord) -> tuple[CandidateFeature, int, int]:
        """(`tokenize_record`'s result, 1 when a limit cut the prompt and otherwise 0, the number of responses cut)."""
        eos = self.tokenizer.eos_token_id
        chains = None if self.options.markers is None else self._chains(record, self.options.markers)
        prompt, prefix_length, responses, closed, before = self._texts(record, chains)
        if chains is None:
            found = [[ids] for ids in self._encoder.continuing(responses, record.source, before)]
        else:
            found = self._encode_chains(responses, chains, record.source, before)
        whole_lengths, completions, masks = [], [], []
        for number, parts in enumerate(found):
            ids = parts[-1]
            if not self._sampled and (not ids or ids == [eos]):
                expected = "a response with at least one token"
                raise RecordError.of(record.source, f"completions[{number}]", expected, record.completions[number])
            ended = closed or (ids and (ids[-1] == eos or ids[-1] in self._endings.special))
            parts[-1] = ids if ended else [*ids, eos]
            whole_lengths.append(sum(map(len, parts)))
            # Answers and markers take turns, an answer is the last: each answer has the limit to itself.
            scored = [(len(parts) - place) % 2 for place in range(len(parts))]
            kept = [
                part[: self.max_completion_length] if answer else part
                for part, answer in zip(parts, scored, strict=True)
            ]
            completions.append([token for part in kept for token in part])
            masks.append([answer for part, answer in zip(kept, scored, strict=True) for _ in part])

        needed = prefix_length + (len(prompt) > prefix_length)
        limit = len(prompt) if self.max_prompt_length is None else self.max_prompt_length
        self._check_limit("max_prompt_length", limit, needed, record.source)
        if self.max_length is not None:
            self._check_limit("max_length", self.max_length, needed + 1, record.source)
            left = self.max_length - max(map(len, completions))
            # One long response would leave nothing of the prompt, for all of them.
            limit = min(limit, max(left, self.max_length // _PROMPT_SHARE, needed))
        prompt_cut = len(prompt) > limit
        if prompt_cut:
            prompt = prompt[:prefix_length] + prompt[len(prompt) - (limit - prefix_length) :]
        if self.max_length is not None:
            completions = [ids[: self.max_length - len(prompt)] for ids in completions]
        feature: CandidateFeature = {
            "prompt_ids": prompt,
            "completion_ids": completions,
            "rewards": None if record.rewards is None or chains else list(record.rewards),
            "sft_index": 0 if chains else record.sft_index,
            "source": record.source,
        }
        if chains is not None:
            cut_masks = [mask[: len(ids)] for ids, mask in zip(completions, masks, strict=True)]
            self._check_scored(cut_masks, masks, record.source)
            feature["completion_mask"] = cut_masks
        self._add_signals(feature, record)
        cut = sum(len(ids) < length for ids, length in zip(completions, whole_lengths, strict=True))
        return feature, int(prompt_cut), cut

    def _add_signals(self, feature: CandidateFeature, record: RankedRecord) -> None:
        """What the record knows of its responses, held to the tokens that these have here."""
        for name in self.signals:
            if name in record.signals:
                feature[name] = list(record.signals[name])  # type: ignore[literal-required]
        if "reference_logps" not in self.signals or "reference_tokens" not in record.signals:
            return
        prompt = feature["prompt_ids"]
        for number, (ids, told) in enumerate(
            zip(feature["completion_ids"], record.signals["reference_tokens"], strict=True)
        ):
            if token_checksum(prompt, ids) != told:
                hint = "" if isinstance(record.prompt, str) else date_hint(self.tokenizer)
                raise RecordError(
                    f"{record.source}: reference_logps[{number}]: expected the sum over the {len(prompt)} prompt and "
                    f"{len(ids)} response tokens that there are here, got one over other tokens; score the file again "
                    "with this tokenizer and chat template and the same max_length, max_prompt_length and "
                    "max_completion_length (clha-fast score --policy), or take another reference"
                    + (f"; {hint}" if hint else ""),
                    source=record.source,
                    field="reference_logps",
                )

    def _chains(self, record: RankedRecord, markers: tuple[str, str]) -> list[tuple[str, ...]]:
        """The record's chains; an answer inside one has no end of turn."""
        if len(record.completions) > 2:
            logger.warning_once(
                f"{self.options.name}: chains are made of the best and the worst answer of a record; the ones between "
                "train nothing"
            )
        for number in {0, len(record.completions) - 1}:
            if not self._endings.opened(record.completions[number]).strip():
                expected = "a response with at least one token"
                raise RecordError.of(record.source, f"completions[{number}]", expected, record.completions[number])
        chains = record_chains(record, markers)
        return [(chain[0], self._endings.opened(chain[1]), *chain[2:]) if len(chain) > 2 else chain for chain in chains]

    def _texts(
        self, record: RankedRecord, chains: Sequence[tuple[str, ...]] | None
    ) -> tuple[list[int], int, Sequence[str], bool, str]:
        """The prompt's tokens, how many of them are special ones in front, the responses, whether those are closed.

        Last is the special token directly before the responses where their own depend on it, else "".
        """
        completions = record.completions if chains is None else tuple("".join(chain) for chain in chains)
        if isinstance(record.prompt, str) or not getattr(self.tokenizer, "chat_template", None):
            text, _ = render_prompt(record.prompt, self.tokenizer, record.source, record.template)
            own = self._encoder.encode([text])[0]
            prefix = self._encoder.prefix(text, own)
            if own[: len(prefix)] == prefix:  # rendered beforehand: the text brings BOS along
                own = own[len(prefix) :]
            responses: Sequence[str] = [self._endings.closed(completion) for completion in completions]
            closed = False
        else:
            chat = render_chat(
                record.prompt,
                completions,
                self.tokenizer,
                record.source,
                record.template,
                "completions" if chains is None else "chains",
                self._sampled,
            )
            text, responses, closed = chat.prompt, chat.responses, chat.closed
            own = self._encoder.encode([text])[0]
            prefix = own[:1] if own[:1] == [self.tokenizer.bos_token_id] else []
            own = own[len(prefix) :]
        if not prefix and not own:
            expected = "at least one token (the tokenizer puts no BOS in front)"
            raise RecordError.of(record.source, "prompt", expected, text)
        return prefix + own, len(prefix), responses, closed, self._encoder.mark_before(text, prefix + own)

    def tokenize_beginning(self, record: RankedRecord, text: str) -> list[int]:
        """Tokens of a text that an answer to the record's prompt begins with; nothing closes it.

        It stands where a response stands: behind the blanks that a chat template puts there.

        Raises:
            RecordError: the chat template changes the text.
        """
        if not isinstance(record.prompt, str) and getattr(self.tokenizer, "chat_template", None):
            chat = render_chat(record.prompt, [text], self.tokenizer, record.source, record.template)
            before, (turn,) = chat.prompt, chat.responses
            at = turn.find(text.strip())
            if at < 0:
                raise RecordError.of(record.source, "prompt", f"a chat template that keeps the text {text!r}", turn)
            text = turn[:at] + text.lstrip()
        else:
            before, _ = render_prompt(record.prompt, self.tokenizer, record.source, record.template)
        own = self._encoder.encode([before])[0]
        mark = self._encoder.mark_before(before, own or self._encoder.prefix(before, own))
        return self._encoder.continuing([text], record.source, mark)[0]

    def tokenize_behind(self, record: RankedRecord, prefix: str) -> tuple[CandidateFeature, int, int]:
        """As `tokenize_counted`, with a text between prompt and responses, on the prompt's side: read, not scored.

        A response follows after a blank, its own or one that is put there.

        Raises:
            RecordError: a response without a token of its own behind it, as `tokenize_counted`.
        """
        if not prefix:
            return self.tokenize_counted(record)
        begun = tuple(f"{prefix}{'' if text[0].isspace() else ' '}{text}" for text in record.completions)
        own, longer = self.tokenize_beginning(record, prefix), copy.copy(self)
        if self.max_completion_length is not None:  # that of the response alone
            longer.max_completion_length = self.max_completion_length + len(own)
        feature, prompt_cut, cut = longer.tokenize_counted(dataclasses.replace(record, completions=begun))
        for number, ids in enumerate(feature["completion_ids"]):
            if list(ids[: len(own)]) != own or len(ids) == len(own):
                expected = f"a response with tokens of its own behind {prefix!r}"
                raise RecordError.of(record.source, f"completions[{number}]", expected, record.completions[number])
        behind = [list(ids[len(own) :]) for ids in feature["completion_ids"]]
        return {**feature, "prompt_ids": [*feature["prompt_ids"], *own], "completion_ids": behind}, prompt_cut, cut

    @functools.cached_property
    def _endings(self) -> Endings:
        return Endings(self.tokenizer)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    def _encode_chains(
        self, texts: Sequence[str], chains: Sequence[tuple[str, ...]], source: str, mark: str
    ) -> list[list[list[int]]]:
        """Tokens of each chain's parts as it was rendered, markers and answers in turn."""
        firsts: list[str] = []
        parts: list[str] = []
        for number, (text, chain) in enumerate(zip(texts, chains, strict=True)):
            before = "".join(chain[:-1])
            at = text.find(before)
            if at < 0:
                raise RecordError.of(source, f"chains[{number}]", "a chat template that writes it as it is", text)
            # A template may begin the turn with a blank, and closes it behind the last answer.
            firsts.append(text[:at] + chain[0])
            parts += [*chain[1:-1], text[at + len(before) :]]
        starts = self._encoder.continuing(firsts, source, mark)
        encoded = iter(self._encoder.continuing(parts, source, ""))
        return [
            [start, *itertools.islice(encoded, len(chain) - 1)] for start, chain in zip(starts, chains, strict=True)
        ]

    def _check_scored(self, masks: Sequence[Sequence[int]], whole: Sequence[Sequence[int]], source: str) -> None:
        for mask, before in zip(masks, whole, strict=True):
            if not any(mask):
                expected = f"room for the {before.index(1)} tokens of a chain's marker and an answer"
                raise RecordError.of(source, "max_length", expected, self.max_length)

    @staticmethod
    def _check_limit(name: str, limit: int, needed: int, source: str) -> None:
        if limit < needed:
            raise RecordError.of(source, name, f"at least {needed} tokens for this prompt", limit)


class RankedDataset(torch.utils.data.Dataset[CandidateFeature]):
    """Records tokenised once, at construction, so that an epoch only pads.

    Args:
        records: ranked records or rows in a known format, in a list, a `datasets.Dataset` or any other iterable.
        collator: tokenises and truncates; give the same one to the data loader.
        progress: show a bar; None shows it for more than 2000 records (tables of `datasets` always show their own).
        num_proc: processes that tokenise; None and 1 are this one. The result does not depend on it.
        skipped: None raises the first error; a list collects them, and their records are left out.

    Attributes:
        lengths: tokens of every prompt's longest row, for samplers that group by length.
        skipped: the errors of records left out; the list given as `skipped`, or an empty one.
        cut_prompts, cut_completions: how many the collator's limits have shortened. limits: these, by name.

    Raises:
        ValueError: no record; a bad `num_proc`.
        RecordError: as `RankedCollator.tokenize_record`; one that has rewards, or a signal, unlike most, or lacks them.
    """

    def __init__(
        self,
        records: Iterable[Example],
        collator: RankedCollator,
        progress: bool | None = None,
        num_proc: int | None = None,
        skipped: list[RecordError] | None = None,
    ) -> None:
        self.skipped: list[RecordError] = [] if skipped is None else skipped
        optional = [name for name in collator.signals if name in PER_CANDIDATE]
        if collator.options.markers is not None:
            optional.append("completion_mask")
        found = (
            tokenise_table(records, collator.tokenize_counted, num_proc, skipped, optional)
            if is_table(records)
            else tokenise_all(records, collator.tokenize_counted, num_proc, skipped, progress)
        )
        collator.say_left_out(found.signals)
        self._features: Sequence[CandidateFeature] = found.features
        self.cut_prompts, self.cut_completions = found.cut_prompts, found.cut_completions
        if not len(self._features):
            why = f" (all {len(self.skipped):,} are bad, the first: {self.skipped[0]})" if self.skipped else ""
            raise RecordError(f"records: expected at least one, got none{why}")
        check_features(self._features)
        self.limits = {name: getattr(collator, name) for name in LIMITS}
        self.lengths = [len(f["prompt_ids"]) + max(map(len, f["completion_ids"])) for f in self._features]

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> CandidateFeature:
        return self._features[index]

"""Answers that are drawn from the distributions of the model's own forward, which is tried on the first of them.

transformers decodes by code of its own (a cache, positions counted from a mask, padding on the left). Where that and
the plain forward of a text disagree, what answers is not the policy whose log-probabilities are trained or measured.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LogitsProcessor

from clha_fast.errors import out_of_memory
from clha_fast.generation.tokens import decoder_of, generate_tokens
from clha_fast.models.adapters import base_model
from clha_fast.models.float32 import in_float32
from clha_fast.models.rounding import rounding_of

logger = logging.getLogger("clha_fast")

# Of an answer the last so many tokens are compared, of each one's distribution so many of the likeliest.
_TOKENS, _LIKELIEST = 64, 32
# Tiny models of every type that decode rightly are off by up to 1.5 eps in bfloat16 (recurrent layers, which otherwise
# take tokens one by one) and by 7e-5 in float32, whose sums part by more than its eps; those that do not by 0.01 to 1,
# or by 2e-3 where a short convolution alone reads padding.
_EPS, _FLOOR = 3.0, 5e-4
_LEAST = -50.0  # nats; a masked word has minus infinity, or the least number there is


@dataclass
class Tried:
    """What was found: whether to use the cache; tokens of the longest row that was compared, and of its new ones."""

    use_cache: bool = True
    longest: int = 0
    new: int = 0


class Decoding:
    """Answers prompts as `tokens.generate_tokens`, and compares the first answers with the model's own forward.

    The distributions that tokens were drawn from, before temperature, are held against those of the plain forward of
    prompt and answer, each row alone: the first time for prompts alone and for padded ones, and when rows or answers
    have become twice as long. The error is the mean over tokens of the root mean square difference of the likeliest
    log-probabilities, relative to the largest of their logits (at least 1); up to three times
    `models.rounding.rounding_of`, or 5e-4, it is rounding. Beyond, the model goes on without its cache where that is
    right, which is said once.

    Args:
        setting: what the number of prompts in a batch is called.
        trained: whether the answers train the model, so that other ones than its own are refused, and not only said.

    Attributes:
        tried: by whether prompts were padded.
    """

    def __init__(self, setting: str = "batch_size", trained: bool = False) -> None:
        self._setting, self._trained = setting, trained
        self.tried: dict[bool, Tried] = {}
        self._said: set[bool] = set()  # by whether the cache is used all the same

    def answer(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        pad: int,
        shown: bool = False,
        **settings: Any,
    ) -> list[list[int]]:
        """The new tokens of each prompt; arguments as `generate_tokens`.

        Args:
            shown: whether somebody has read the answers already, which are then not made anew.

        Raises:
            ValueError: padding is read as text; answers that train are not the model's own with the cache or without.
        """
        tried = self.tried.setdefault(len(set(map(len, prompts))) > 1, Tried())
        asked = {"max_new_tokens": max_new_tokens, "pad": pad, **settings}
        if max(map(len, prompts)) + max_new_tokens <= 2 * tried.longest and max_new_tokens <= 2 * tried.new:
            return generate_tokens(model, prompts, **asked, use_cache=tried.use_cache)
        sizes = list(map(len, prompts))
        some = sorted({0, len(prompts) - 1, sizes.index(max(sizes)), sizes.index(min(sizes))})
        drawn = _Drawn(some)
        answers = generate_tokens(model, prompts, **asked, use_cache=tried.use_cache, drawn_from=drawn)
        longest, new = max(sizes[row] + len(answers[row]) for row in some), max(len(answers[row]) for row in some)
        if longest <= 2 * tried.longest and new <= 2 * tried.new:
            return answers
        trial = _Trial(model, pad, new, settings.get("device") or model.device)
        error = max(trial.error_of(prompts[row], answers[row], drawn, row) for row in some)
        rows = [prompts[row] for row in some]
        right = error <= trial.bound or trial.right_in_float32(rows, [answers[row] for row in some], tried.use_cache)
        if not right:
            tried.use_cache = self._choose(trial, rows, error, len(prompts))
        tried.longest, tried.new = max(longest, tried.longest), max(new, tried.new)
        if right or tried.use_cache or shown:
            return answers
        return generate_tokens(model, prompts, **asked, use_cache=False)

    def _choose(self, trial: _Trial, rows: list[Sequence[int]], error: float, size: int) -> bool:
        name, moved = trial.name, f"logits move by {error:.2g} of their size"
        if trial.right(rows, use_cache=False):
            self._say(
                False,
                f"model: {name} answers without its cache, which takes longer the longer an answer is: with it, the "
                f"distributions that tokens are drawn from are not those of its own forward ({moved}{trial.unseen})",
            )
            return False
        if len(set(map(len, rows))) > 1 and any(
            all(trial.right([row], use_cache=cache) for row in rows) for cache in (True, False)
        ):
            raise ValueError(
                f"{self._setting}: expected 1 for {name}, which reads padding as text (a prompt's {moved} beside a "
                f"longer one{trial.unseen}), got {size}"
            )
        if self._trained:
            raise ValueError(
                "model: expected one whose answers are drawn from the distributions of its own forward, which trains "
                f"on them, got {name} ({moved}, with its cache and without{trial.unseen})"
            )
        self._say(
            True,
            f"model: {name} draws answers from other distributions than its own forward gives for them ({moved}, with "
            f"its cache and without{trial.unseen}): they are not what its log-probabilities speak of",
        )
        return True

    def _say(self, use_cache: bool, text: str) -> None:
        if use_cache not in self._said:
            self._said.add(use_cache)
            logger.warning(text)


class _Trial:
    """A model's decoding of `count` tokens beside its own forward of them; `bound` is final after a first error.

    `unseen` is what to say where memory was short for a look in float32.
    """

    unseen = ""

    def __init__(self, model: Any, pad: int, count: int, device: torch.device) -> None:
        self.model, self.pad, self.count, self.device = model, pad, count, device
        self.name = type(base_model(decoder_of(model))).__name__
        self.bound = _FLOOR
        self._see_rounding()

    def right(self, rows: Sequence[Sequence[int]], use_cache: bool) -> bool:
        """Whether these rows are right, decoded side by side to their full length."""
        answers, error = self._decode(rows, use_cache)
        return error <= self.bound or self.right_in_float32(rows, answers, use_cache)

    def right_in_float32(self, rows: Sequence[Sequence[int]], answers: Sequence[list[int]], use_cache: bool) -> bool:
        """Whether rows in 16 bits are wrong by their rounding alone: the same tokens are right in float32.

        Where two experts of a mixture are nearly equal, rounding chooses between them, and moves a token and what
        follows it by more than its eps.
        """
        quantised = getattr(self.model.config, "quantization_config", None) is not None
        offloaded = any(weight.is_meta for weight in self.model.parameters())
        if self.bound <= _FLOOR or quantised or offloaded or (dist.is_available() and dist.is_initialized()):
            return False
        try:
            with in_float32(self.model, self.device):
                with torch.autocast(self.device.type, enabled=False):
                    bound = max(_FLOOR, _EPS * rounding_of(self.model))  # of TF32, where that is allowed
                return self._decode(rows, use_cache, answers)[1] <= bound
        except Exception as error:  # kernels that take 16 bits alone raise errors of every kind
            if out_of_memory(error):
                self.unseen = (
                    "; whether it is their rounding alone was not seen: float32 beside them did not fit memory"
                )
            return False

    def _decode(
        self, rows: Sequence[Sequence[int]], use_cache: bool, answers: Sequence[list[int]] | None = None
    ) -> tuple[list[list[int]], float]:
        """What is drawn, or these `answers`; and the error of the worst row."""
        drawn = _Drawn(range(len(rows)), answers)
        found = generate_tokens(
            self.model,
            rows,
            ends=(),
            pad=self.pad,
            max_new_tokens=self.count,
            temperature=1.0,
            seeds=range(len(rows)),
            device=self.device,
            use_cache=use_cache,
            drawn_from=drawn,
        )
        if answers is not None:
            found = [row[: len(answer)] for row, answer in zip(found, answers, strict=True)]
        return found, max(
            self.error_of(row, answer, drawn, number)
            for number, (row, answer) in enumerate(zip(rows, found, strict=True))
        )

    def error_of(self, prompt: Sequence[int], answer: Sequence[int], drawn: _Drawn, number: int) -> float:
        """The error of an answer, which is row `number` of those drawn; 0 where the model's own logits are NaN."""
        # Behind one that is written, models that look for padding go on otherwise.
        end = answer.index(self.pad) + 1 if self.pad in answer else len(answer)
        count = min(end, _TOKENS)
        logits = self._logits([*prompt, *answer[:end]], count)
        if logits.isnan().any():  # has an error of its own
            return 0.0
        chosen, values, logps = drawn.row(number, end - count, end)
        own = logits.log_softmax(-1).gather(-1, chosen).clamp(min=_LEAST)
        size = torch.where(logps > _LEAST, values.abs(), 0).amax(-1).clamp(min=1)
        return float(((logps.clamp(min=_LEAST) - own).square().mean(-1).sqrt() / size).mean())

    def _logits(self, row: Sequence[int], count: int) -> Tensor:
        """float32 [count, V]: of the model's own forward, what the last tokens of `row` are drawn from."""
        ids = torch.tensor([list(row)], device=self.device)
        inner: Any = decoder_of(self.model)
        takes = inspect.signature(base_model(inner).forward).parameters
        kept = {"logits_to_keep": count + 1} if "logits_to_keep" in takes else {}
        # A trainer's autocast may be within the model's forward alone. What is compiled already may call no new hook.
        seeing = inner.get_input_embeddings().register_forward_pre_hook(self._see_rounding)
        try:
            with torch.no_grad():
                logits = inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kept).logits
        finally:
            seeing.remove()
        return torch.as_tensor(logits[0, -count - 1 : -1]).float()

    def _see_rounding(self, *_: Any) -> None:
        self.bound = max(self.bound, _EPS * rounding_of(self.model))


class _Drawn(LogitsProcessor):
    """Keeps the likeliest of what the tokens of some rows are drawn from, before anything changes it.

    Args:
        answers: what these rows go on with, whatever is drawn.
    """

    def __init__(self, rows: Sequence[int], answers: Sequence[list[int]] | None = None) -> None:
        self._rows, self._answers = list(rows), answers
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        some = scores[self._rows]
        values, chosen = some.topk(min(_LIKELIEST, some.shape[-1]))
        self._steps.append((chosen, values, some.logsumexp(-1, keepdim=True)))
        if self._answers is None:
            return scores
        step, forced = len(self._steps) - 1, torch.full_like(scores, -torch.inf)
        for number, answer in zip(self._rows, self._answers, strict=True):
            forced[number, answer[min(step, len(answer) - 1)]] = 0
        return forced

    def row(self, number: int, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """[end - start, likeliest] of one row's steps: tokens, and float32 logits and log-probabilities."""
        place = self._rows.index(number)
        steps = [[part[place] for part in step] for step in self._steps[start:end]]
        chosen, values, total = map(torch.stack, zip(*steps, strict=True))
        return chosen, values, values - total

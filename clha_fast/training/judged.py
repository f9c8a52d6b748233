"""What a reward has to be before advantages are made of it, and what was judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clha_fast.batching.batch import CandidateFeature
from clha_fast.data.prompts import Prompted
from clha_fast.training import samples


def checked_rewards(
    given: Any, records: Sequence[Prompted], texts: Sequence[Sequence[str]], step: int
) -> list[list[float]]:
    """A number for each of the answers `texts` to each of `records`, as a reward function has given them.

    Raises:
        ValueError: rewards of another number than the answers', or one that is no finite number, which is named with
            its answer and prompt, and with the `step` they were sampled at.
    """
    try:
        rewards = [[float(value) for value in own] for own in given]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward: expected {len(texts)} lists of {len(texts[0])} numbers, one an answer, got {given!r:.100}"
        ) from error
    if list(map(len, rewards)) != list(map(len, texts)):
        raise ValueError(
            f"reward: expected {len(texts)} lists of {len(texts[0])} numbers, one an answer, got lists of "
            f"{list(map(len, rewards))[:8]}"
        )
    for prompt, (record, own) in enumerate(zip(records, rewards, strict=True)):
        for answer, value in enumerate(own):
            if not math.isfinite(value):
                raise ValueError(
                    f"reward: expected finite numbers, got {value} for answer {answer} of {len(own)}, "
                    f"{texts[prompt][answer]!r:.60}, to prompt {prompt} of {len(texts)} ({record.source}: "
                    f"{record.prompt!r:.60}) at step {step}, both counted from 0; give an answer that cannot be judged "
                    "a low reward"
                )
    return rewards


@dataclass(frozen=True)
class Answered:
    """What a rollout gave: the prompts with their answers and rewards, means over the answers, and their texts."""

    features: list[CandidateFeature]
    metrics: dict[str, float]
    texts: Sequence[str]
    finished: Sequence[bool]

    @property
    def rewards(self) -> list[float]:
        """Of all answers, in order."""
        return [reward for feature in self.features for reward in feature["rewards"] or ()]

    def lines(self, most: int, step: int, tokenizer: Any) -> list[dict[str, Any]]:
        """Of `samples.jsonl`, for the first `most` prompts, which have an answer each: as `samples.describe` has them.

        An answer stands there as it was judged, with its reward.
        """
        features = self.features[:most]
        prompts = [feature["prompt_ids"] for feature in features]
        tokens = [feature["completion_ids"][0] for feature in features]
        found = samples.describe(step, prompts, tokens, (), tokenizer)
        judged = zip(found, self.texts, self.finished, self.rewards, strict=False)
        return [{**line, "completion": text, "finished": end, "reward": reward} for line, text, end, reward in judged]

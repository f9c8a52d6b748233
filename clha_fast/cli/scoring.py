"""Options of the commands in which a model scores the responses of a file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from clha_fast.cli.reading import add_skip_argument
from clha_fast.data import FORMATS
from clha_fast.models.layouts import LAYOUT_CHOICES
from clha_fast.models.loading import DTYPES
from clha_fast.rewards.policy import Policy, PolicyRun
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.rewards.scoring import RewardRun

LIMITS = ("max_length", "max_prompt_length", "max_completion_length")


def read_alone(
    judge: Policy | RewardModel, limits: Mapping[str, int | None], prefix: str = ""
) -> Callable[..., object]:
    """What reads one record as the scoring of many does before it scores; arguments as `rewards.ranking.rank_file`."""
    if isinstance(judge, Policy):
        return lambda record: PolicyRun([record], judge, 1, dict(limits), False, prefix)
    return lambda record: RewardRun([record], judge, 1, limits["max_length"], False)


def add_scoring_arguments(parser: argparse.ArgumentParser, word: str, written: str, policy: str, dtype: str) -> None:
    """What all of them have.

    Args:
        word: for a response. written: the file's metavar. policy: of which model the finer limits are. dtype: what the
            default is.
    """
    parser.add_argument("--format", default="auto", help=f"auto (default), {', '.join(FORMATS)}")
    add_skip_argument(parser)
    parser.add_argument("--label", type=int, metavar="N", help="of a reward model with several logits: the reward's")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help=f"{word}s a forward pass (default 16)")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens of prompt and {word}, cut as in training (default: a reward model's own limit; of {policy} none)",
    )
    for name in LIMITS[1:]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"of {policy}: as in training")
    parser.add_argument(
        "--layout",
        choices=LAYOUT_CHOICES,
        help=f"padded (default), a row a {word}; packed, all in one; shared, a prompt once before its {word}s; auto, "
        "shared where the model computes it and it pays",
    )
    parser.add_argument("--resume", action="store_true", help=f"continue an interrupted run from {written}.partial")
    parser.add_argument(
        "--overwrite", action="store_true", help=f"replace {written} (and, without --resume, {written}.partial)"
    )
    parser.add_argument("--device", default="auto", help="auto (default: a GPU where there is one), cpu, cuda:1, ...")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)} ({dtype})")

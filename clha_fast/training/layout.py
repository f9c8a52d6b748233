"""Which layout a trainer's batches have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from transformers.utils import logging

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.sampling import padded_tokens, prompt_shapes
from clha_fast.batching.segments import PAYS, RowTokens
from clha_fast.models.layouts import RowLayouts
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.objectives import Objective

logger = logging.get_logger(__name__)

COUNTED = 2048  # prompts whose tokens are counted


def padded_for_noise(args: Any, asked: str | None = None) -> str:
    """The layout that settings (or `asked`) ask for, `auto` with NEFTune's noise `padded`.

    Raises:
        ValueError: another one, in whose rows the noise would be weaker: it is divided by the root of a row's length.
    """
    whose = "layout" if asked in (None, args.layout) else "the data_collator's layout"
    asked = args.layout if asked is None else asked
    if not args.neftune_noise_alpha or asked == "padded":
        return asked
    if asked != "auto":
        raise ValueError(
            f"neftune_noise_alpha: expected None with {whose}={asked!r} (its noise goes by the length of a row, which "
            f"holds several candidates there), got {args.neftune_noise_alpha}; layout='padded' takes it"
        )
    logger.warning("layout: padded, since NEFTune's noise goes by the length of a row")
    return "padded"


def asked_layout(args: Any, collator: Any) -> str:
    """What the settings or a collator of the caller's ask for.

    Raises:
        ValueError: two layouts; one that `padded_for_noise` refuses.
    """
    asked = args.layout
    own = collator.layout if isinstance(collator, RankedCollator) else "padded"
    if own != "padded" and asked not in ("padded", own):
        raise ValueError(f"layout: expected {own!r}, as the data_collator has it, got {asked!r}")
    return padded_for_noise(args, own if own != "padded" else asked)


def settle_layout(
    asked: str, models: list[RowLayouts], accelerator: Any, dataset: Any, objective: Objective, collators: list[Any]
) -> str:
    """The layout that the model, and the frozen one beside it, are seen to compute; collators are given it.

    `auto` is `shared` where probes pass and the count says that it pays (`segments.RowTokens`), else `padded`; which,
    and why, is said once. A later batch that a model does not compute so is given to that model as padded rows.

    Args:
        models: what is probed. accelerator: the trainer's. dataset: what is trained on; counted where it is tokenised.
        collators: those of training and evaluation.

    Raises:
        UnsupportedLayoutError: they do not compute it; sequences are spread over processes.
    """
    tokens = _count(dataset, objective, collators) if asked == "auto" else None
    layout = probe_layout(asked, models, accelerator, tokens)
    for collator in collators:
        if isinstance(collator, RankedCollator):
            collator.layout = layout
    return layout


class Settles(Protocol):
    """A model with what probes it: `models.layouts.RowLayouts`, or `rewards.joined.JoinedRewards`."""

    def settle(self, layout: str, or_padded: bool = False) -> str:
        """The layout that it is to have; `or_padded`: rows that are later seen to be wrong run as padded ones."""


def probe_layout(asked: str, models: Sequence[Settles], accelerator: Any, tokens: RowTokens | None) -> str:
    """`settle_layout`, of data whose tokens were counted, where they are known beforehand."""
    _check_parallel(accelerator)
    layout = asked
    if layout == "auto" and tokens is not None and tokens.layout == "padded":
        layout = "padded"
        logger.warning(f"layout auto: padded ({tokens}, and pay up to {100 * PAYS:.0f}%)")
    if layout != "padded":
        try:
            for rows in models:
                rows.settle("shared" if layout == "auto" else layout, or_padded=layout == "auto")
        except UnsupportedLayoutError as error:
            if layout != "auto":
                raise
            layout = "padded"
            logger.warning(f"layout auto: padded ({error})")
    if layout == "padded":
        for rows in models:
            rows.settle(layout)
    if layout == "auto":
        layout = "shared"
        why = "the data, which is not tokenised beforehand, was not counted" if tokens is None else tokens
        logger.warning(f"layout auto: shared, each prompt is computed once ({why})")
    return layout


def _check_parallel(accelerator: Any) -> None:
    config = getattr(accelerator, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        size = getattr(config, name, 1)
        if isinstance(size, int) and size > 1:
            raise UnsupportedLayoutError(
                f"parallelism_config: expected {name}=1 (accelerate would cut the rows of a batch, and not what says "
                f"where their scored tokens stand), got {size}; a CLHATrainer spreads rows over processes with "
                f"CLHAConfig(sequence_parallel_size={size})"
            )


def _count(dataset: Any, objective: Objective, collators: list[Any]) -> RowTokens | None:
    """Tokens that run, prompt by prompt; None where they are not known beforehand."""
    collator = collators[0]
    if not isinstance(dataset, RankedDataset) or not isinstance(collator, RankedCollator):
        return None
    features = [dataset[number] for number in range(min(len(dataset), COUNTED))]
    padded, shared = (
        sum(
            padded_tokens([shape], [0], joined=layout == "shared")
            for shape in prompt_shapes(features, objective, collator.drop_inert, layout=layout)
        )
        for layout in ("padded", "shared")
    )
    return RowTokens(padded, shared) if padded else None

"""Which layout a trainer's batches have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from transformers.utils import logging

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.sampling import padded_tokens, prompt_shapes
from clha_fast.models.layouts import RowLayouts
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.objectives import Objective

logger = logging.get_logger(__name__)

COUNTED = 2048  # prompts whose tokens are counted
# Shared rows pay where they leave so much of the tokens: below it, masks may cost what tokens save.
_PAYS = 0.9


def asked_layout(asked: str, collator: Any) -> str:
    """What the settings or a collator of the caller's ask for.

    Raises:
        ValueError: two layouts.
    """
    own = collator.layout if isinstance(collator, RankedCollator) else "padded"
    if own != "padded" and asked not in ("padded", own):
        raise ValueError(f"layout: expected {own!r}, as the data_collator has it, got {asked!r}")
    return own if own != "padded" else asked


def settle_layout(
    asked: str, models: list[RowLayouts], accelerator: Any, dataset: Any, objective: Objective, collators: list[Any]
) -> str:
    """The layout that the model, and the frozen one beside it, are seen to compute; collators are given it.

    `auto` is `shared` where probes pass and it leaves at most nine tenths of the tokens of padded rows, else `padded`.

    Args:
        models: what is probed. accelerator: the trainer's. dataset: what is trained on; counted where it is tokenised.
        collators: those of training and evaluation.

    Raises:
        UnsupportedLayoutError: they do not compute it; sequences are spread over processes.
    """
    share = _share(dataset, objective, collators) if asked == "auto" else None
    layout = probe_layout(asked, models, accelerator, share)
    for collator in collators:
        if isinstance(collator, RankedCollator):
            collator.layout = layout
    return layout


class Settles(Protocol):
    """A model with what probes it: `models.layouts.RowLayouts`, or `rewards.joined.JoinedRewards`."""

    def settle(self, layout: str) -> str:
        """The layout that it is to have."""


def probe_layout(asked: str, models: Sequence[Settles], accelerator: Any, share: float | None) -> str:
    """`settle_layout`, of data whose shared rows have `share` of the tokens of padded ones, where that is known."""
    layout = asked
    if layout == "auto" and share is not None and share > _PAYS:
        layout = "padded"
        logger.warning(
            f"layout auto: padded (shared rows would leave {100 * share:.0f}% of the tokens, too many to pay)"
        )
    if layout != "padded":
        try:
            _check_parallel(accelerator, layout)
            for rows in models:
                rows.settle("shared" if layout == "auto" else layout)
        except UnsupportedLayoutError as error:
            if layout != "auto":
                raise
            layout = "padded"
            logger.warning(f"layout auto: padded ({error})")
    if layout == "auto":
        layout = "shared"
        logger.warning("layout auto: shared, each prompt is computed once")
    return layout


def _check_parallel(accelerator: Any, layout: str) -> None:
    config = getattr(accelerator, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        size = getattr(config, name, 1)
        if isinstance(size, int) and size > 1:
            raise UnsupportedLayoutError(
                f"layout: expected {name}=1 for {layout} rows (context parallelism takes causal masks only), got "
                f"{size}; layout='padded' runs with it"
            )


def _share(dataset: Any, objective: Objective, collators: list[Any]) -> float | None:
    """Tokens of shared rows over those of padded ones, prompt by prompt; None where it is not known beforehand."""
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
    return shared / padded if padded else None

"""Which layout a model's batches have: settled once by a probe, and looked after batch by batch."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clha_fast.batching.batch import CandidateBatch, CandidateFeature
from clha_fast.batching.segments import LAYOUTS, PAYS, Segments, check_layout
from clha_fast.models import segment_attention, segment_masks
from clha_fast.models.adapters import virtual_tokens
from clha_fast.models.embedding import input_embedding_weight, is_dtensor
from clha_fast.models.forward import MODEL_FIELDS, LogpForward, first_position
from clha_fast.models.layout_probe import LayoutProbe, ProbedForward, candidates_of
from clha_fast.models.lengths import numbers_of, tells_more
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.models.sequence_parallel import WAY
from clha_fast.models.sharding import reshard
from clha_fast.models.unpacking import padded_batch

logger = logging.getLogger("clha_fast")

LAYOUT_CHOICES = (*LAYOUTS, "auto")
# What layers raise that do more with a mask than hand it on, or whose attention two calls do not compute.
_NOT_WITHOUT = (UnsupportedLayoutError, segment_attention.UnsupportedAttentionError, AttributeError, TypeError)
_MEDIA = ("pixel_values", "image", "video", "audio", "input_features", "inputs_embeds")


class DifferentRowsError(UnsupportedLayoutError):
    """A batch's rows of several candidates were compared, and are not computed as rows alone."""


class RowLayouts:
    """The layout that a model has been seen to compute.

    Args:
        model: the unwrapped model, or a PeftModel that adds virtual tokens.
        forward: its log-probabilities, or what else rows are compared by. One of rows whose tokens are spread over
            processes, all of which do the same here, has the model compute rows in two calls, whatever their layout.
        run: the model's own forward. around: what it runs within, such as an adapter's absence.

    Attributes:
        layout: `padded`, `packed`, `shared`; or `auto`, of batches that are shared where their count pays, else padded.
            Where it may, it becomes `padded` at a batch that the model does not compute as rows alone.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: ProbedForward,
        run: Callable[..., Any],
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.layout = "padded"
        self._or_padded = self._given_up = False
        self._model = model
        self._spread: LogpForward | None = None
        if isinstance(forward, LogpForward) and forward.sequence is not None:
            self._spread, forward = forward, forward.alone()
        self._probe = LayoutProbe(model, forward, run)
        self._around = around
        # Texts of up to so many tokens, in rows of so many, have been compared: rows of several candidates, or padded
        # ones, whose slices are other slices. A frozen model's are met when the policy has given up the former.
        self._seen = {"joined": (0, 0), "padded": (0, 0)}
        self._numbers = numbers_of(model)

    def settle(self, layout: str, or_padded: bool = False) -> str:
        """Probes the model for `layout`, and returns the one it is to have.

        Args:
            layout: `auto` stays where the probe passes for `shared` rows, for batches that are counted one by one
                (`pack_candidates`); else it becomes `padded`. Which is said.
            or_padded: whether rows of `layout` that a later batch shows to be computed otherwise run as padded ones
                (`takes`), as those of `auto` do.

        Raises:
            ValueError: an unknown layout. UnsupportedLayoutError: the model does not compute it.
        """
        check_layout(layout, "auto")
        if layout == "auto":
            or_padded = True
            layout = settle_auto(self._model, self.settle)
            if layout == "padded" and self._spread is not None:
                self.settle(layout)
        elif self._spread is not None:
            self._settle_spread(layout, self._spread)
        elif layout != "padded":
            check_no_virtual_tokens(self._model, layout)
            segment_masks.install()
            with self._around():
                if self._why_masks(layout):
                    self._probe.check(layout, gradients=not _spread(self._model))
            reshard(self._model)  # or an optimizer would take FSDP2's gathered weights for its own
        self.layout, self._or_padded, self._given_up = layout, or_padded, False
        return layout

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """Inside there is no dropout; modes and random states are afterwards as they were."""
        return self._probe.as_it_is()

    def _settle_spread(self, layout: str, spread: LogpForward) -> None:
        """Whether attention alone looks from a token at another, and slices are computed as whole rows are.

        Raises:
            UnsupportedLayoutError: they are not; on every process.
        """
        assert spread.sequence is not None
        sequence, problem, name = spread.sequence, None, type(self._model).__name__
        device = input_embedding_weight(self._model).device
        try:
            if virtual_tokens(self._model) or first_position(self._model) is None:
                got = "virtual tokens (peft's prompt tuning)" if virtual_tokens(self._model) else "no position_ids"
                raise UnsupportedLayoutError(
                    f"sequence_parallel: expected a model of tokens with their positions, got {name} with {got}; {WAY}"
                )
            sequence.check_model(self._model)
            segment_masks.install()
            # A prompt beside others in a row owes them nothing, in whatever layer: no slice does, either.
            masks = self._why_masks("packed" if layout == "padded" else layout)
            if masks:
                raise UnsupportedLayoutError(
                    f"sequence_parallel: expected a model whose attention runs in two calls, got {name}: {masks}; {WAY}"
                )
        except UnsupportedLayoutError as error:
            problem = error
        if not sequence.anywhere(problem is not None, device):
            try:
                self._probe.check_spread(layout, spread)
            except UnsupportedLayoutError as error:
                told = _bare(error.__cause__ or error)
                problem = UnsupportedLayoutError(
                    f"{told if told.startswith('sequence_parallel') else f'sequence_parallel: {told}'}; {WAY}"
                )
            if not sequence.anywhere(problem is not None, device):
                return
        raise problem or UnsupportedLayoutError(
            f"sequence_parallel: expected {name} to be computed in slices by all {sequence.size} processes, got one "
            "that does not; do all hold the same weights?"
        )

    def _why_masks(self, layout: str) -> str:
        """Why the model needs masks for `layout` rows, "" where it computes them without: it then goes on to."""
        segment_masks.IN_TWO_CALLS.discard(self._model)  # what an earlier one has seen may not hold any more
        config: Any = getattr(self._model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        implementation = getattr(text, "_attn_implementation", None)
        if implementation not in segment_attention.TAKEN:
            return f"attn_implementation is {implementation!r}, and not {' or '.join(segment_attention.TAKEN)}"
        if _drops_out(text):
            return "its configuration has attention dropout"
        if _spread(self._model):
            return "its weights are spread over processes"
        segment_masks.IN_TWO_CALLS.add(self._model)
        try:
            self._probe.check(layout)
        except BaseException as error:
            segment_masks.IN_TWO_CALLS.discard(self._model)
            if not isinstance(error, _NOT_WITHOUT):
                raise
            logger.debug("layout %s: with masks (%s)", layout, error)
            return f"{type(error).__name__}: {error}"
        return ""

    def takes(self, batch: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> bool:
        """`check`, but False for rows of several candidates that `auto` has found to be computed otherwise.

        They are to run as padded ones (`models.unpacking`) from then on, which is said.

        Raises:
            UnsupportedLayoutError: as `check`, of any layout but `auto` (or one that `settle` took with `or_padded`);
                padded rows whose tokens are spread over processes are not computed, either.
        """
        if batch.get("segments") is not None and self._given_up and not torch.compiler.is_compiling():
            self._check_media(others)
            return False
        try:
            self.check(batch, others)
        except DifferentRowsError as error:
            if not self._or_padded or batch.get("segments") is None:
                raise
            if self._spread is not None:  # all processes are here: they have agreed on the error
                self.settle("padded")
            self.layout, self._given_up = "padded", True
            logger.warning(
                "layout auto: padded from here on, also the shared rows that a collator still makes, whose prompts are "
                "then repeated, beyond what max_tokens_per_batch has counted; layout='padded' makes none (%s)",
                error,
            )
            return False
        return True

    def fitted(
        self, inputs: dict[str, Any], tensors: dict[str, Any], others: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what the model is given of a batch, what the loss is), as they are or as padded rows; errors as `takes`."""
        if self.takes(inputs, others):
            return inputs, tensors
        padded = self._padded({**inputs, **tensors})
        return {name: padded[name] for name in MODEL_FIELDS}, {name: padded[name] for name in tensors}

    def taken(self, batch: CandidateBatch) -> CandidateBatch:
        """The batch as it is to run: itself, or as padded rows; errors as `takes`."""
        if self.takes(vars(batch)):
            return batch
        return dataclasses.replace(batch, **self._padded(vars(batch)))

    def _padded(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        padded = padded_batch(batch)
        if self._spread is not None:  # padded rows are compared there, too
            self.check(padded)
        return padded

    def check(self, batch: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> None:
        """One batch before it runs.

        Args:
            batch: fields of a `CandidateBatch`. others: what else the model is given.

        Raises:
            UnsupportedLayoutError: rows of a layout that the model was not probed for; images or embeddings in rows of
                several candidates; the first batch, or one so long that earlier ones say nothing of it, is not computed
                as rows alone.
        """
        segments: Segments | None = batch.get("segments")
        if self._spread is not None:
            for name, value in (others or {}).items():
                if isinstance(value, Tensor):
                    raise UnsupportedLayoutError(
                        f"{name}: expected tokens alone with sequence_parallel, got {name} as well; {WAY}"
                    )
        if segments is None:
            if self._spread is not None and not torch.compiler.is_compiling():
                self._compare_slices(batch, "padded")
            return
        got = segments.layout
        if self.layout == "padded" or (got == "shared" and self.layout == "packed"):
            raise UnsupportedLayoutError(
                f"layout: expected {self.layout} rows, got {got} ones; attach(model, layout={got!r}), Scorer(model, "
                f"layout={got!r}) or CLHAConfig's layout probes whether the model computes them"
            )
        self._check_media(others)
        # What follows reads the batch on the host.
        if torch.compiler.is_compiling() or not any(group.candidates for group in segments.groups):
            return
        if self._spread is not None:
            self._compare_slices(batch, got)
        elif self._is_longer("joined", segments.longest, segments.width):
            features, looked_at = _features(batch["input_ids"], segments)
            try:
                with self._around():
                    self._probe.compare(features, got, looked_at)
            except UnsupportedLayoutError as error:
                raise DifferentRowsError(str(error)) from error
            self._note("joined", segments.longest, segments.width)

    @staticmethod
    def _check_media(others: Mapping[str, Any] | None) -> None:
        for name, value in (others or {}).items():
            if value is not None and any(part in name for part in _MEDIA):
                raise UnsupportedLayoutError(
                    f"{name}: expected tokens alone in rows of several candidates, got {name} as well; "
                    "RankedCollator(layout='padded') takes it"
                )

    def _is_longer(self, rows: str, longest: int, width: int) -> bool:
        """Whether texts or rows are so long that what has been compared says nothing of them: `tells_more`.

        `rows` are `joined` or `padded`. Never where weights are spread over processes: all would have to come here at
        the same batch.
        """
        pairs = zip(self._seen[rows], (longest, width), strict=True)
        return any(tells_more(*pair, self._numbers) for pair in pairs) and not _spread(self._model)

    def _note(self, rows: str, longest: int, width: int) -> None:
        before = self._seen[rows]
        self._seen[rows] = max(longest, before[0]), max(width, before[1])

    def _compare_slices(self, batch: Mapping[str, Any], layout: str) -> None:
        """`check` of rows whose tokens are spread: against texts alone in each process, which all come here together.

        Raises:
            UnsupportedLayoutError: they are not computed so; on every process.
        """
        assert self._spread is not None
        assert self._spread.sequence is not None
        sequence, ids, segments = self._spread.sequence, batch["input_ids"], batch.get("segments")
        sequence.same_batch(ids, mask=batch["attention_mask"])  # or one alone might find its texts long enough
        rows = "padded" if segments is None else "joined"
        if segments is None:
            lengths = batch["attention_mask"].sum(1).tolist()
            longest, width = max(lengths, default=0), ids.shape[1]
        else:
            longest, width = segments.longest, segments.width
        if not self._is_longer(rows, longest, width):
            return
        if segments is None:
            features, looked_at = _whole_rows(ids, lengths, min(self._spread.vocabulary))
        else:
            features, looked_at = _features(ids, segments)
        if not features:
            return
        problem: UnsupportedLayoutError | None = None
        short = False  # of memory: an error kept would keep all tensors of the trial
        try:
            with self._around():
                self._probe.compare(features, layout, looked_at, self._spread, masks=False)
        except torch.OutOfMemoryError:
            if not self._probe.together:  # the others are in its collectives, and would take another for one of them
                raise
            short = True
        except UnsupportedLayoutError as error:
            problem = error
        if sequence.anywhere(problem is not None, ids.device):
            told = "another of its processes has refused it" if problem is None else _bare(problem)
            raise DifferentRowsError(f"sequence_parallel: {told}; {WAY}") from problem
        self._note(rows, longest, width)
        if sequence.anywhere(short, ids.device):
            logger.warning(
                "sequence_parallel: texts of %s tokens are too long for the memory of one process, so slices of such "
                "rows are not compared with whole ones",
                f"{longest:,}",
            )


def settle_auto(model: nn.Module, settle: Callable[[str], str]) -> str:
    """`auto` where `settle("shared")` passes, whose batches are then counted one by one, else `padded`; it is said."""
    try:
        settle("shared")
    except UnsupportedLayoutError as error:
        logger.warning("layout auto: padded (%s)", error)
        return "padded"
    logger.info(
        "layout auto: shared where it leaves at most %d%% of a batch's tokens, else padded (%s computes shared rows as "
        "rows alone)",
        100 * PAYS,
        type(model).__name__,
    )
    return "auto"


def check_no_virtual_tokens(model: nn.Module, layout: str) -> None:
    """UnsupportedLayoutError for a PeftModel that puts tokens of its own in front of rows."""
    if virtual_tokens(model):
        raise UnsupportedLayoutError(
            f"layout: expected a model without virtual tokens (peft's prompt tuning) for {layout} rows, got "
            f"{virtual_tokens(model)} in front of each row; layout='padded' runs it"
        )


def _drops_out(config: Any) -> bool:
    names = (
        "attention_dropout",
        "attn_pdrop",
        "attention_probs_dropout_prob",
        "attn_dropout_prob",
        "attention_dropout_prob",
    )
    return any(getattr(config, name, 0) for name in names)


def _spread(model: nn.Module) -> bool:
    """Whether no process can run the model alone: FSDP, tensor parallelism or ZeRO-3 have its weights."""
    if input_embedding_weight(model).dim() != 2:  # FSDP's first version, which flattens
        return True
    return any(is_dtensor(parameter) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def _bare(error: BaseException) -> str:
    """What an error says, without the way out that is none where tokens are spread."""
    return str(error).partition("; layout='packed'")[0].partition("; layout='padded'")[0]


def _whole_rows(
    input_ids: Tensor, lengths: list[int], vocabulary: int
) -> tuple[list[CandidateFeature], tuple[int, ...]]:
    """The longest of some padded rows and the last one, as candidates behind their first tokens; which are compared."""
    chosen = {lengths.index(max(lengths)), len(lengths) - 1}
    texts = [input_ids[row, : lengths[row]].tolist() for row in sorted(chosen)]
    found = [candidates_of(text[:1], [text[1:]]) for text in texts if len(text) > 1 and max(text) < vocabulary]
    return found, tuple(range(len(found)))


def _features(input_ids: Tensor, segments: Segments) -> tuple[list[CandidateFeature], tuple[int, ...]]:
    """The prompts and candidates of a batch, and which are looked at: the one with the longest text, and the last."""
    rows = input_ids.tolist()
    groups = [group for group in segments.groups if group.candidates]
    found = [
        candidates_of(_text(rows[row], prompt), [_text(rows[row], span) for span in own]) for row, prompt, own in groups
    ]
    lengths = [prompt[1] + max(size for _, size in own) for _, prompt, own in groups]
    longest = lengths.index(max(lengths)) if lengths else 0
    return found, (longest, len(found) - 1)


def _text(row: list[int], span: tuple[int, int]) -> list[int]:
    start, length = span
    return row[start : start + length]

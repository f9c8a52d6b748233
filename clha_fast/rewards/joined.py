"""The rewards of responses in rows that hold several of them: a classifier's scores at their last tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clha_fast.batching.segments import check_layout, joined_rows
from clha_fast.models.adapters import base_model
from clha_fast.models.embedding import input_embedding_weight
from clha_fast.models.forward import MODEL_FIELDS, SEGMENT_FIELDS, first_position, split_segments
from clha_fast.models.layouts import RowLayouts, check_no_virtual_tokens, settle_auto
from clha_fast.models.segment_masks import IN_TWO_CALLS, UnsupportedLayoutError, segmented
from clha_fast.models.unpacking import padded_rows_of
from clha_fast.rewards.rows import configured, drift_of, pad_rows, padded_rewards

Text = tuple[Sequence[int], Sequence[int]]  # tokens of a prompt, and of one response
# What transformers' classifiers on decoders call the module that scores every token.
_HEADS = ("score", "classifier")
JOINED_FIELDS = ("read", *MODEL_FIELDS, *SEGMENT_FIELDS)


def join_texts(texts: Sequence[Sequence[Text]], layout: str, pad: int, multiple: int = 1) -> dict[str, Any]:
    """One row of all responses, as a batch of a language model has them (`batching.segments.joined_rows`).

    Args:
        texts: for each prompt, its responses, each with the prompt.
        layout: `packed`, each response behind its prompt; `shared`, a prompt once.
        pad: the token that the row is padded with, to a multiple of `multiple`.

    Returns:
        input_ids, attention_mask, position_ids, segment_ids, group_ids, int64 [1, T]; segments, a `Segments`; read,
        int64 [C], where a classifier on a decoder reads each text: its last token that is not `pad`.
    """
    none = torch.arange(0)
    families = [[(prompt, response, none) for prompt, response in own] for own in texts]
    if layout == "packed":
        families = [[row] for own in families for row in own]
    segments, input_ids, _, _ = joined_rows(families, pad, multiple)
    by_token = segments.tokens()
    read = []
    for own, (_, (start, length), spans) in zip(families, segments.groups, strict=True):
        for (prompt, response, _), (begin, _) in zip(own, spans, strict=True):
            text = [*prompt, *response]
            last = next((place for place in reversed(range(len(text))) if text[place] != pad), 0)
            read.append(start + last if last < length else begin + last - length)
    return {
        "input_ids": input_ids,
        "attention_mask": (by_token.group_ids >= 0).long(),
        "segments": segments,
        **by_token._asdict(),
        "read": torch.tensor(read),
    }


class _TokenScores:
    """What a classifier's head reads and makes of every token of a row; a `layout_probe.ProbedForward`.

    Rows are compared by what the head reads, each token's divided by its size, in one direction: a new head may say
    nothing yet, and a trained one has a scale of its own.
    """

    values, unit = "hidden states", "of their size"

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        named = dict(model.named_children())
        found = next((name for name in _HEADS if name in named), None)
        if found is None:
            raise self.refusal(f"no module named {' or '.join(_HEADS)}")
        self._head = found
        self.vocabulary = (input_embedding_weight(model).shape[0],)
        self._first = first_position(model)

    @property
    def last(self) -> nn.Module:
        """The head as it is now: one that is trained beside an adapter is another module once they are merged."""
        head: nn.Module = getattr(self.model, self._head)
        return head

    def refusal(self, got: str) -> UnsupportedLayoutError:
        """The error of a model without scores of single tokens."""
        return UnsupportedLayoutError(
            "layout: expected a classifier that scores each token and takes the last one's (transformers' on decoders) "
            f"for rows of several responses, got {type(self.model).__name__} with {got}; layout='padded' runs it"
        )

    def run(self, run: Callable[..., Any], inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(what the head reads [B, T, H], the scores [B, T, labels]) of one forward of `run`."""
        found: list[tuple[Tensor, Tensor]] = []
        segments, tokens, rest = split_segments(inputs, self._first)
        handle = self.last.register_forward_hook(lambda module, args, output: found.append((args[0], output)))
        try:
            with (
                configured(self.model.config, use_cache=False),
                segmented(segments, tokens, self.model in IN_TWO_CALLS),
            ):
                run(**rest)
        finally:
            handle.remove()
        if len(found) != 1 or found[0][1].shape[:2] != rest["input_ids"].shape:
            shapes = ", ".join(str(tuple(scores.shape)) for _, scores in found)
            raise self.refusal(f"scores of shape {shapes or 'none'} for tokens {tuple(rest['input_ids'].shape)}")
        return found[0]

    def with_graph(
        self, run: Callable[..., Any], inputs: Mapping[str, Any], targets: Tensor, row_index: Tensor, *, wrapped: bool
    ) -> Tensor:
        """[N], floating, of the tokens at `row_index`."""
        del targets, wrapped
        hidden = self.run(run, inputs)[0].flatten(0, 1)[row_index]
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        size = wide.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        signs = torch.randint(2, (wide.shape[-1],), generator=torch.Generator().manual_seed(0)) * 2 - 1
        return (wide / size) @ signs.to(wide)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """`with_graph` without a graph."""
        return self.with_graph(*args, **kwargs)


class JoinedRewards:
    """The rewards of rows with several responses, of a classifier that was seen to compute them as it does each alone.

    Args:
        model: a sequence classifier of transformers, or a PeftModel around one. pad: the token that rows are padded
            with. label: which logit is the reward.

    Attributes:
        layout: what `settle` came to, until then `padded`; and `padded` again where `auto` has met rows that the model
            does not compute as texts alone.
    """

    def __init__(self, model: nn.Module, pad: int, label: int = 0) -> None:
        self.layout = "padded"
        self._model: Any = base_model(model)
        self._pad, self._label = pad, label
        self._scores: _TokenScores | None = None
        self._layouts: RowLayouts | None = None

    def settle(self, layout: str, or_padded: bool = False) -> str:
        """Probes the model as `models.layouts.RowLayouts.settle` does, and how it takes a text's score.

        Raises:
            ValueError: an unknown layout. UnsupportedLayoutError: the model does not compute it.
        """
        check_layout(layout, "auto")
        if layout == "auto":
            self.layout = settle_auto(self._model, lambda shared: self.settle(shared, or_padded=True))
        elif layout != "padded":
            check_no_virtual_tokens(self._model, layout)
            self._scores = _TokenScores(self._model)
            self._layouts = RowLayouts(self._model, self._scores, self._model)
            self._layouts.settle(layout, or_padded)
            self._check_pooling(layout)
            self.layout = layout
        return self.layout

    def takes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether rows of `join_texts` run as they are; False where `auto` gives them up, from then on.

        Raises:
            UnsupportedLayoutError: as a call.
        """
        assert self._layouts is not None
        taken = self._layouts.takes(inputs)
        if not taken:
            self.layout = "padded"
        return taken

    def __call__(self, run: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """float32 [C] (float64 of a float64 model), with a graph where gradients are on.

        Args:
            run: the model or a wrapper around it. inputs: of `join_texts`, on the model's device.

        Raises:
            UnsupportedLayoutError: rows that the model was not probed for, or does not compute as rows alone, where the
                layout is not `auto`'s.
        """
        if self.takes(inputs):
            return self._read(run, inputs)
        rows, _ = padded_rows_of(inputs["input_ids"], inputs["segments"])
        mask = rows["attention_mask"]
        input_ids = rows["input_ids"].masked_fill(mask == 0, self._pad)
        return padded_rewards(run, self._model.config, input_ids, mask, self._pad, self._label)

    def _read(self, run: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
        assert self._scores is not None
        given = {name: value for name, value in inputs.items() if name != "read"}
        with configured(self._model.config, pad_token_id=self._pad):
            _, scores = self._scores.run(run, given)
        rewards = scores.flatten(0, 1)[inputs["read"], self._label]
        return rewards if rewards.dtype == torch.float64 else rewards.float()

    def _check_pooling(self, layout: str) -> None:
        """Whether the model takes the score where `join_texts` says, padding tokens within texts or not."""
        assert self._layouts is not None
        assert self._scores is not None
        other = itertools.cycle([token for token in range(min(self._scores.vocabulary[0], 99)) if token != self._pad])
        prompt, *bodies = ([next(other) for _ in range(5)] for _ in range(3))
        texts = [
            (prompt, bodies[0]),
            (prompt, [*bodies[1], self._pad]),
            (prompt, [bodies[0][0], self._pad, bodies[1][0]]),
        ]
        device = self._model.get_input_embeddings().weight.device
        joined = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in join_texts([texts], layout, self._pad).items()
        }
        rows = [part.to(device) for part in pad_rows([[*p, *r] for p, r in texts], self._pad)]
        with torch.no_grad(), self._layouts.undisturbed():
            got = self._read(self._model, joined)
            expected = padded_rewards(self._model, self._model.config, rows[0], rows[1], self._pad, self._label)
        far = float((got - expected).abs().max())
        if not far <= drift_of(self._model) * float(expected.abs().max()) + 1e-6:
            raise self._scores.refusal(f"rewards of padded rows that are no token's scores (apart by {far:.2g})")

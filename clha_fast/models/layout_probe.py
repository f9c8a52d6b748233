"""Whether a model computes rows that hold several candidates as it computes each candidate alone: tried, not believed.

Two trials that need each other. Values: the log-probabilities of the candidates in their row, against each alone behind
its prompt; they differ where positions are wrong or a candidate sees what it should not. Gradients: what a candidate's
log-probability owes to the embeddings of others is exactly 0, however small a leak would be.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clha_fast.batching.batch import CandidateBatch, CandidateFeature, pack_candidates
from clha_fast.models import segment_masks
from clha_fast.models.embedding import UnsupportedHeadError
from clha_fast.models.lengths import numbers_of, rope_by_length
from clha_fast.models.positions import positions_of
from clha_fast.models.segment_masks import UnsupportedLayoutError

# A candidate's mean difference, nats, is rounding up to so many times that of a row with padding behind it, plus a
# floor; a row that padding changes by more than `_MOVED` is compared with nothing.
_NOISE, _FLOOR, _MOVED = 20.0, 1e-4, 0.02
# More is no rounding in any dtype. A trained model of 135M parameters in bfloat16, whose log-probabilities of random
# tokens are about -14, shows 0.02 to 0.07 in rows that are right, 0.4 with positions that are wrong, and 0.7 to 1 where
# candidates see each other. There rounding is what it is, or three times what padding makes of it.
_LIMIT, _HALF_NOISE, _HALF_MOVED = 0.1, 3.0, 0.15
# Windows, chunks and blocks of attention, or whatever a configuration's numbers are, up to so many tokens are filled.
_FILLED = 512
_Steps = list[tuple[str, str, Tensor | None, Tensor]]


class ProbedForward(Protocol):
    """What a model says of tokens that rows are compared by: `forward.LogpForward`, or a classifier's."""

    values: str  # what a refusal calls them
    unit: str

    @property
    def vocabulary(self) -> tuple[int, ...]:
        """Rows of the embeddings that tokens have to be in."""

    @property
    def last(self) -> nn.Module:
        """The module that makes them, which is not looked into."""

    def __call__(
        self, run: Callable[..., Any], inputs: Mapping[str, Any], targets: Tensor, row_index: Tensor, *, wrapped: bool
    ) -> Tensor:
        """[N] values of the tokens that stand at `row_index` in the flattened rows, without a graph."""

    def with_graph(
        self, run: Callable[..., Any], inputs: Mapping[str, Any], targets: Tensor, row_index: Tensor, *, wrapped: bool
    ) -> Tensor:
        """The same with a graph."""


class LayoutProbe:
    """Runs `model` on known tokens in a layout and alone.

    Args:
        model: the unwrapped model. forward: its log-probabilities, or what else rows are compared by.
        run: what is called, the model's own forward.
    """

    def __init__(self, model: nn.Module, forward: ProbedForward, run: Callable[..., Any]) -> None:
        self.model, self.forward, self.run = model, forward, run

    def check_spread(self, layout: str, spread: ProbedForward) -> None:
        """The same prompts in rows of `layout` whose tokens are spread over processes, all of which call."""
        self.compare(self._features(), layout, spread=spread)

    def check(self, layout: str, gradients: bool = True) -> None:
        """A prompt with three candidates beside one with one, longer than any number of its configuration that is cheap
        to fill, be it a window, a block or something else.

        Args:
            gradients: False for weights that are spread over processes.

        Raises:
            UnsupportedLayoutError: `layout` rows are not computed as rows alone; the model's class, the kind of layer
                and the error are named.
        """
        features = self._features()
        try:
            self.compare(features, layout)
        except UnsupportedLayoutError as error:
            # One of the numbers may be what a row ends at.
            if error.__cause__ is None:
                raise
            features = self._features(filled=False)
            self.compare(features, layout)
        if gradients:
            with torch.inference_mode(False):  # whoever scores in it has no gradients otherwise
                self._check_gradients(pack(features, layout), layout)

    def compare(
        self,
        features: Sequence[CandidateFeature],
        layout: str,
        looked_at: Sequence[int] | None = None,
        spread: ProbedForward | None = None,
        masks: bool = True,
    ) -> None:
        """Values of the first candidates and the last one of some features, alone and in one row of `layout`.

        Args:
            looked_at: positions in `features`; None is all. spread: what runs the rows of `layout`, where that is not
                what runs each alone. masks: False has each alone run in two calls as well, as a row of one candidate,
                for texts whose mask would be too large.

        Raises:
            UnsupportedLayoutError: as `check`.
        """
        self.together = False
        with self.as_it_is():
            joined = pack(features, layout)
            with self._running(layout, joined):
                together = self._logps(joined, spread)
            self.together = True
            if segment_masks.asked() == 0:
                raise self._refuse(layout, "it asks for no attention mask that rows of several candidates could change")
            longest = joined.segments.longest if joined.segments is not None and rope_by_length(self.model) else 0
            parts = together.double().split(joined.candidate_lengths.tolist())
            error, noise, first, worst = torch.zeros(()), torch.zeros(()), 0, (0, 0)
            for place, feature in enumerate(features):
                sizes = [len(own) for own in feature["completion_ids"]]
                count = len(sizes)
                some = {*range(min(count, 2)), sizes.index(max(sizes, default=0)), count - 1} if sizes else set()
                chosen = some if looked_at is None or place in looked_at else set()
                for number in sorted(chosen):
                    own = feature["completion_ids"][number]
                    alone = candidates_of(feature["prompt_ids"], [own])
                    plain, behind = self._alone(alone, longest, layout, "padded" if masks else "packed")
                    # The worst candidate: a window's end may be felt by one of them alone. NaN stays.
                    differs = (parts[first + number] - plain).abs().mean()
                    if differs > error or differs.isnan():
                        error, worst = differs, (place, number)
                    noise = torch.maximum(noise, (behind - plain).abs().mean())
                first += count
            half = self._half
            if noise > (_HALF_MOVED if half else _MOVED) and not (half and looked_at is not None):
                raise self._refuse(
                    layout,
                    f"padding behind a row changes it by {float(noise):.2g} {self.forward.unit}, and nothing can be "
                    "compared",
                )
            rounding = _HALF_NOISE * noise if half else _NOISE * noise + _FLOOR
            if error <= (max(float(rounding), _LIMIT) if half else min(float(rounding), _LIMIT)):
                return
            kind = self._kind(features, joined, *worst) if spread is None else ""
            raise self._refuse(
                layout,
                f"{kind}{self.forward.values} differ by {float(error):.2g} {self.forward.unit} on average (by "
                f"{float(noise):.2g} with padding behind a row)",
            )

    def _features(self, filled: bool = True) -> list[CandidateFeature]:
        """filled: whether the first prompt goes beyond the numbers of the model's configuration."""
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        told = vars(text) if text is not None else {}
        size, positions = min(self.forward.vocabulary), positions_of(self.model)
        special = {v for name, v in told.items() if name.endswith(("token_id", "token_index")) and isinstance(v, int)}
        # No text is as long as a vocabulary is wide.
        numbers = [v for v in numbers_of(self.model) if v <= _FILLED and v not in self.forward.vocabulary]
        prompt = max([16, *(number + 8 for number in numbers if filled and number not in special)])
        if positions is not None:
            prompt = max(1, min(prompt, positions - 24))
        usual = torch.tensor([k for k in range(size) if k not in special])
        draw = torch.Generator().manual_seed(0)

        def some(count: int) -> list[int]:
            found: list[int] = usual[torch.randint(len(usual), (count,), generator=draw)].tolist()
            return found

        return [
            candidates_of(some(prompt), [some(9), some(20), some(13)]),
            candidates_of(some(max(1, min(6, prompt))), [some(4)]),
        ]

    def _alone(self, feature: CandidateFeature, longest: int, layout: str, kind: str) -> tuple[Tensor, Tensor]:
        """float64, (values of a candidate in a row of `kind`, those with padding behind the same row).

        Args:
            longest: the longest text beside it, where rotary positions of them all go by that one, as in the padded
                rows of the same batch; 0 where they do not.
        """
        length = len(feature["prompt_ids"]) + len(feature["completion_ids"][0])
        width, positions = max(length, longest), positions_of(self.model)
        # Padding has no place behind a table's end.
        wider = width + 3 if longest or positions is None else max(width, min(width + 3, positions))
        rows = [pack([feature], kind, multiple) for multiple in (longest or None, wider)]
        with self._running(layout, rows[1]):
            plain, behind = (self._logps(row, last=longest - 1 if longest else None).double() for row in rows)
        return plain, behind

    def _logps(self, batch: CandidateBatch, forward: ProbedForward | None = None, last: int | None = None) -> Tensor:
        """last: the position that padding has at most."""
        batch = batch.to(self._device)
        call, inputs = forward or self.forward, batch.model_inputs()
        if last is not None:
            places = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
            inputs = {**inputs, "position_ids": places.clamp(max=last).expand_as(batch.input_ids)}
        return call(self.run, inputs, batch.targets, batch.row_index, wrapped=False).cpu()

    @property
    def _device(self) -> torch.device:
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        device: torch.device = embeddings.weight.device
        return device

    @property
    def _half(self) -> bool:
        """Whether it computes in 16 bits; accelerate puts mixed precision around a model's forward."""
        mixed = hasattr(self.model, "_original_forward") or torch.is_autocast_enabled(self._device.type)
        return mixed or any(p.dtype in (torch.bfloat16, torch.float16) for p in self.model.parameters())

    @contextlib.contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Inside there is no dropout; modes and random states are afterwards as they were."""
        modes = [(module, module.training) for module in self.model.modules()]
        device = self._device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                self.model.eval()
                yield
            finally:
                for module, training in modes:
                    module.training = training

    @contextlib.contextmanager
    def _running(self, layout: str, batch: CandidateBatch) -> Iterator[None]:
        """Inside, what a model says of a row that it does not run is a refusal, such as of a table that ends before.

        What somebody's hook on it raises is no matter of layouts, and is left as it comes.
        """
        try:
            yield
        except (torch.OutOfMemoryError, UnsupportedLayoutError, UnsupportedHeadError):
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            if _in_a_hook(self.model, error):
                raise
            width = batch.input_ids.shape[1]
            said = " ".join(str(error).split())
            raise self._refuse(layout, f"it does not run a row of {width:,} tokens ({said})") from error

    def _check_gradients(self, batch: CandidateBatch, layout: str) -> None:
        """Whether the second candidate's log-probabilities owe nothing to tokens that it does not see."""
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        found: list[Tensor] = []

        def leaf(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return None
            found.append(output.detach().requires_grad_())
            return found[-1].clone()  # which may be scaled in place

        batch = batch.to(self._device)
        handle = embeddings.register_forward_hook(leaf)
        try:
            with self.as_it_is(), torch.enable_grad(), self._running(layout, batch):
                logps = self.forward.with_graph(
                    self.run, batch.model_inputs(), batch.targets, batch.row_index, wrapped=False
                )
                if not found:
                    raise self._refuse(layout, "it does not call its input embedding, so that no leak would be seen")
                own = logps.split(batch.candidate_lengths.tolist())[1]
                gradients = torch.autograd.grad(own.sum(), found, allow_unused=True)
        finally:
            handle.remove()
        assert batch.segments is not None
        assert batch.segment_ids is not None
        group, segment = (0, 2) if layout == "shared" else (1, 1)
        segments, groups = batch.segment_ids[0], batch.group_ids[0]  # type: ignore[index]
        sees = (groups == group) & ((segments == 0) | (segments == segment))
        size = torch.zeros(len(sees), device=sees.device)
        for gradient in gradients:
            if gradient is not None and gradient.shape[:2] == (1, len(sees)):
                size += gradient[0].float().flatten(1).norm(dim=1)
        most = float(size[sees].max())
        leaked = float(size[~sees].max())
        if not most > 0:
            raise self._refuse(layout, "no gradient reaches its input embedding, so that no leak would be seen")
        if leaked > 0 or leaked != leaked:
            raise self._refuse(
                layout,
                f"a candidate sees others (a gradient of {leaked:.2g} at their embeddings, beside {most:.2g} at its "
                "own text's)",
            )

    def _refuse(self, layout: str, seen: str) -> UnsupportedLayoutError:
        way = "layout='packed' may run, and " if layout == "shared" else ""
        return UnsupportedLayoutError(
            f"layout: expected a model that computes {layout} rows as it computes each candidate alone, got "
            f"{type(self.model).__name__}: {seen}; {way}layout='padded' runs with any model"
        )

    def _kind(self, features: Sequence[CandidateFeature], joined: CandidateBatch, place: int, number: int) -> str:
        """Which layer is the first to make something else of the same input, where one can be told.

        Looked at is a candidate, the `number`-th of `features[place]`, behind its prompt: what a layer mixes into a
        text's beginning may have faded where the candidate stands.
        """
        assert joined.segments is not None
        which = sum(len(feature["completion_ids"]) for feature in features[:place]) + number
        texts = [(prompt, own) for _, prompt, candidates in joined.segments.groups for own in candidates]
        tokens = torch.cat([torch.arange(start, start + length) for start, length in texts[which]])
        alone = candidates_of(features[place]["prompt_ids"], [features[place]["completion_ids"][number]])
        one = self._steps(joined, tokens)
        other = self._steps(pack([alone], "padded"), torch.arange(len(tokens)))
        for (name, kind, given, made), (name2, _, given2, made2) in zip(one, other, strict=False):
            if name != name2:
                break
            same = given is None or given2 is None or not _differ(given, given2)
            if same and _differ(made, made2):
                return f"{kind} ({name or 'the model'}) gives other values in such a row, "
        return ""

    def _steps(self, batch: CandidateBatch, tokens: Tensor) -> _Steps:
        """(name, class, first input, output) of the modules that ran, in the order in which they ended."""
        width, head = batch.input_ids.shape[1], self.forward.last
        found: _Steps = []

        def part(value: Any) -> Tensor | None:
            while isinstance(value, (tuple, list)) and value:
                value = value[0]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return None
            if value.dim() == 2:  # the one row's tokens, flattened
                value = value.unsqueeze(0)
            return value[0, tokens.to(value.device)] if value.dim() > 2 and value.shape[1] == width else None

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
                made = part(output)
                if made is not None:
                    given = args[0] if args else kwargs.get("hidden_states")
                    found.append((name, type(module).__name__, part(given), made))

            return hook

        handles = [
            module.register_forward_hook(note(name), with_kwargs=True)
            for name, module in self.model.named_modules()
            if name and module is not head  # measured with the hooks that it has
        ]
        try:
            self._logps(batch)
        finally:
            for handle in handles:
                handle.remove()
        return found


def pack(features: Sequence[CandidateFeature], layout: str, multiple: int | None = None) -> CandidateBatch:
    """All candidates of some prompts, padded with a token that any vocabulary has."""
    return pack_candidates(features, pad_token_id=0, drop_inert=False, layout=layout, pad_to_multiple_of=multiple)


def candidates_of(prompt: Sequence[int], candidates: Sequence[Sequence[int]]) -> CandidateFeature:
    """A prompt and its candidates, of which nothing else is known."""
    return {
        "prompt_ids": prompt,
        "completion_ids": candidates,
        "rewards": None,
        "sft_index": 0,
        "source": "probe",
    }


def _in_a_hook(model: nn.Module, error: BaseException) -> bool:
    """Whether `error` comes from within a forward hook or pre-hook that somebody has put on a module."""
    hooks = [
        hook
        for module in model.modules()
        for kind in (module._forward_pre_hooks, module._forward_hooks)
        for hook in kind.values()
    ]
    codes = {_code(hook) for hook in hooks}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _code(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook if hasattr(hook, "__code__") else type(hook).__call__, "__code__", None)


def _differ(one: Tensor, other: Tensor) -> bool:
    far = 1e-4 if one.dtype in (torch.float32, torch.float64) else 3e-2
    return one.shape != other.shape or not float((one - other).norm()) <= far * float(other.norm()) + 1e-6

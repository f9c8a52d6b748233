"""The two settings objects that travel through the library unchanged.

`HeadOptions` says how token log-probabilities come from hidden states (a property of the model);
`CLHAOptions` says what is done with them (a property of the training run).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

NoiseRule = Literal["abs", "signed", "none"]
Reduction = Literal["sum", "distance_mean", "pair_mean"]
SFTForm = Literal["sum", "mean"]
SFTFactor = Literal["squared", "one"]

# Words of a vocabulary block that a routed backward keeps or leaves out as a whole.
ROUTE_WORDS = 128

_T = TypeVar("_T", bound="_Settings")


def _require(name: str, value: Any, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class _Settings:
    def __post_init__(self) -> None:
        # Computed once: a compiled graph reads it as a constant, where json.dumps would break the graph.
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        object.__setattr__(self, "encoded", json.dumps(values, sort_keys=True))

    @classmethod
    def decode(cls: type[_T], encoded: str) -> _T:
        """The settings object whose `encoded` string is given (custom operators carry the string)."""
        return cls(**json.loads(encoded))

    def replace(self: _T, **changes: Any) -> _T:
        """A copy with some fields changed; unknown names raise ValueError."""
        known = {field.name for field in dataclasses.fields(self) if field.init}
        for name in changes:
            _require("option", name, name in known, f"one of {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class HeadOptions(_Settings):
    """How logits come from hidden states: z = softcap(scale * (hidden . weight^T + bias)) / temperature.

    Attributes:
        scale: factor on the raw logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        softcap: c of c * tanh(z / c), applied after `scale` (Gemma 2's `final_logit_softcapping`); None for none.
        temperature: divisor of the logits, applied last.
        ignore_index: target value of a token that is not scored.
        workspace_bytes: memory that logits may take at a time, whatever the number of tokens. None chooses for the
            torch backend about a quarter of the weight's float32 size (at least 16 MiB), and the size of the gradient
            of rows of hidden that no token reads, which comes last; in it stand the logits of prompts until they are
            ranked, beside the memory of the weight's gradient before that is needed (more spares large prompts a
            second pass); 64 MiB for the Triton backend; and max(64 MiB, the weight's float32
            size, which is its gradient's) for the workspace backend.
        max_dropped_mass: None for exact gradients. A number d in [0, 1) lets each token's gradient leave out the
            vocabulary blocks of `ROUTE_WORDS` words in which its softmax has least mass, as long as they hold at most
            d of it together; the target's own block always counts. Weight and bias get nothing of such a block; hidden
            gets its exact mass times the mean of its rows, and is off by at most |dL/dlogp| * d * the largest distance
            of a row from the mean of its block (times scale / temperature; with a softcap see `torch_routing`). Loss
            and log-probabilities stay exact.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    workspace_bytes: int | None = None
    max_dropped_mass: float | None = None

    encoded: str = dataclasses.field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        _require("scale", self.scale, _is_number(self.scale) and math.isfinite(self.scale), "a finite number")
        cap = self.softcap
        _require("softcap", cap, cap is None or (_is_number(cap) and 0 < cap < math.inf), "a positive number")
        temperature = self.temperature
        _require(
            "temperature",
            temperature,
            _is_number(temperature) and 0 < temperature < math.inf,
            "a positive number",
        )
        ignored = self.ignore_index
        _require("ignore_index", ignored, _is_integer(ignored) and ignored < 0, "a negative integer")
        budget = self.workspace_bytes
        ok = budget is None or (_is_integer(budget) and budget > 0)
        _require("workspace_bytes", budget, ok, "a positive number of bytes or None")
        mass = self.max_dropped_mass
        ok = mass is None or (_is_number(mass) and 0 <= mass < 1)
        _require("max_dropped_mass", mass, ok, "a number in [0, 1) or None")
        super().__post_init__()


@dataclass(frozen=True)
class CLHAOptions(_Settings):
    """Options of the CLHA loss (Fang et al. 2024, Eq. 3-6); the defaults are the published training code's.

    Attributes:
        margin: m_ij = margin * (j - i), Eq. 6.
        reward_margin: threshold of the noise rule.
        noise_rule: "abs" keeps a pair when |r_i - r_j| > reward_margin, "signed" when
            r_i - r_j > reward_margin, "none" keeps all. Without rewards all pairs are kept.
        reduction: "sum" (Eq. 5: over a prompt's pairs, mean over prompts), "distance_mean" (published: mean over the
            kept pairs of each rank distance, summed over distances) or "pair_mean" (over all kept pairs).
        rank_weight: factor on the ranking term; 0 leaves SFT alone.
        sft: "sum" uses S_t, the target's summed log-probability; "mean" uses s_t = S_t / |y_t|.
        sft_weight: factor on the SFT term; 0 leaves ranking alone.
        sft_factor: "squared" multiplies by (n_p - 1)^2, "one" does not.
        reward_floor: the SFT gate of a prompt is open when its target's reward is above this.
    """

    margin: float = 3.0
    reward_margin: float = 3.0
    noise_rule: NoiseRule = "abs"
    reduction: Reduction = "distance_mean"
    rank_weight: float = 1.0
    sft: SFTForm = "sum"
    sft_weight: float = 0.05
    sft_factor: SFTFactor = "squared"
    reward_floor: float = 0.0

    encoded: str = dataclasses.field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        for name in ("margin", "reward_margin", "rank_weight", "sft_weight"):
            value = getattr(self, name)
            ok = _is_number(value) and 0 <= value < math.inf
            _require(name, value, ok, "a finite number that is not negative")
        floor = self.reward_floor
        _require("reward_floor", floor, _is_number(floor) and not math.isnan(floor), "a number or -inf")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            _require(name, value, value in allowed, f"one of {', '.join(allowed)}")
        super().__post_init__()

    @classmethod
    def preset(cls, name: str) -> CLHAOptions:
        """A named preset: "published" (the training code), "paper" (Eq. 5 as printed) or "sft_only" (targets' NLL)."""
        _require("preset", name, name in PRESETS, f"one of {', '.join(PRESETS)}")
        return PRESETS[name]


_CHOICES: dict[str, tuple[str, ...]] = {
    "noise_rule": ("abs", "signed", "none"),
    "reduction": ("sum", "distance_mean", "pair_mean"),
    "sft": ("sum", "mean"),
    "sft_factor": ("squared", "one"),
}

PUBLISHED = CLHAOptions()
PRESETS: dict[str, CLHAOptions] = {
    "published": PUBLISHED,
    "paper": CLHAOptions(reduction="sum", sft="mean"),
    "sft_only": CLHAOptions(rank_weight=0.0, sft="mean", sft_weight=1.0, sft_factor="one", reward_floor=-math.inf),
}

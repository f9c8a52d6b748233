"""Settings objects: defaults, presets, refusals, and the string in which operators carry them."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from clha_fast import PRESETS, PUBLISHED, CLHAOptions, HeadOptions, Objective, PROOptions, SFTOptions


def fields(settings):
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.init}


def test_presets_are_those_of_the_sources():
    published = {
        "margin": 3.0,
        "reward_margin": 3.0,
        "noise_rule": "abs",
        "reduction": "distance_mean",
        "rank_weight": 1.0,
        "sft": "sum",
        "sft_weight": 0.05,
        "sft_factor": "squared",
        "reward_floor": 0.0,
    }
    assert fields(CLHAOptions.preset("published")) == published
    assert fields(CLHAOptions.preset("paper")) == {**published, "reduction": "sum", "sft": "mean"}
    sft_only = {"rank_weight": 0.0, "sft": "mean", "sft_weight": 1.0, "sft_factor": "one", "reward_floor": -math.inf}
    assert fields(CLHAOptions.preset("sft_only")) == {**published, **sft_only}
    assert set(PRESETS) == {"published", "paper", "sft_only"}
    assert CLHAOptions() == PUBLISHED


def test_head_defaults_leave_the_logits_alone():
    assert fields(HeadOptions()) == {
        "scale": 1.0,
        "softcap": None,
        "temperature": 1.0,
        "ignore_index": -100,
        "workspace_bytes": None,
        "max_dropped_mass": None,
    }


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"),
    [
        (HeadOptions, "scale", math.inf, "a finite number"),
        (HeadOptions, "scale", "2", "a finite number"),
        (HeadOptions, "scale", True, "a finite number"),
        (HeadOptions, "softcap", 0.0, "a positive number"),
        (HeadOptions, "softcap", math.nan, "a positive number"),
        (HeadOptions, "temperature", 0, "a positive number"),
        (HeadOptions, "temperature", -1.0, "a positive number"),
        (HeadOptions, "temperature", None, "a positive number"),
        (HeadOptions, "ignore_index", 0, "a negative integer of 64 bits"),
        (HeadOptions, "ignore_index", -1.5, "a negative integer of 64 bits"),
        (HeadOptions, "ignore_index", None, "a negative integer of 64 bits"),
        (HeadOptions, "workspace_bytes", 0, "a positive number of bytes or None (64 bits)"),
        (HeadOptions, "workspace_bytes", "64MB", "a positive number of bytes or None (64 bits)"),
        (HeadOptions, "workspace_bytes", True, "a positive number of bytes or None (64 bits)"),
        (HeadOptions, "max_dropped_mass", 1.0, "a number in [0, 1) or None"),
        (HeadOptions, "max_dropped_mass", -0.1, "a number in [0, 1) or None"),
        (CLHAOptions, "margin", -1.0, "a finite number that is not negative"),
        (CLHAOptions, "margin", math.nan, "a finite number that is not negative"),
        (CLHAOptions, "reward_margin", math.inf, "a finite number that is not negative"),
        (CLHAOptions, "rank_weight", "1", "a finite number that is not negative"),
        (CLHAOptions, "sft_weight", False, "a finite number that is not negative"),
        (CLHAOptions, "reward_floor", math.nan, "a number or -inf"),
        (CLHAOptions, "noise_rule", "absolute", "one of abs, signed, none"),
        (CLHAOptions, "noise_rule", None, "one of abs, signed, none"),
        (CLHAOptions, "reduction", "mean", "one of sum, distance_mean, pair_mean"),
        (CLHAOptions, "sft", "none", "one of sum, mean"),
        (CLHAOptions, "sft_factor", 2, "one of squared, one"),
    ],
)
def test_bad_values_are_named(kind, name, value, expected):
    message = f"^{re.escape(f'{name}: expected {expected}, got {value!r}')}$"
    with pytest.raises(ValueError, match=message):
        kind(**{name: value})
    with pytest.raises(ValueError, match=message):
        kind().replace(**{name: value})


def test_unknown_names():
    with pytest.raises(ValueError, match=r"^preset: expected one of published, paper, sft_only, got 'best'$"):
        CLHAOptions.preset("best")
    known = "ignore_index, max_dropped_mass, scale, softcap, temperature, workspace_bytes"
    with pytest.raises(ValueError, match=f"^option: expected one of {known}, got 'sclae'$"):
        HeadOptions().replace(sclae=2.0)
    with pytest.raises(TypeError, match="sclae"):
        HeadOptions(sclae=2.0)


@pytest.mark.parametrize(
    "settings",
    [
        *PRESETS.values(),
        CLHAOptions(margin=0.1, reward_floor=-2.5, noise_rule="signed", reduction="pair_mean"),
        HeadOptions(),
        HeadOptions(scale=1 / 3, softcap=30.0, temperature=0.7, ignore_index=-1, max_dropped_mass=0.01),
    ],
)
def test_encoding_loses_nothing(settings):
    decoded = type(settings).decode(settings.encoded)
    assert decoded == settings
    assert decoded.encoded == settings.encoded
    *name, values = settings.encoded.split(" ", 1) if isinstance(settings, Objective) else [settings.encoded]
    assert name == ([settings.name] if name else [])
    assert json.loads(values) == fields(settings)
    changed = settings.replace(**{next(iter(fields(settings))): 0.125})
    assert changed != settings
    assert type(settings).decode(changed.encoded) == changed


def test_settings_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED.margin = 1.0
    assert {PUBLISHED: 1}[CLHAOptions()] == 1
    assert {HeadOptions(): 1}[HeadOptions()] == 1


SETTINGS = [
    HeadOptions(scale=0.5, softcap=30, workspace_bytes=2**20),
    HeadOptions(temperature=2, max_dropped_mass=0),
    CLHAOptions(margin=2, reward_floor=-math.inf, reduction="pair_mean"),
    PROOptions(form="paper", sft_weight=1),
    SFTOptions(form="token_mean"),
]


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: type(o).__name__)
def test_asdict_goes_back_into_the_class(options):
    fields = dataclasses.asdict(options)
    again = type(options)(**json.loads(json.dumps(fields)))
    assert again == options
    assert again.encoded == options.encoded
    assert dataclasses.replace(options) == options


@pytest.mark.parametrize("kind", [int, float, np.float32, np.float64, np.float16, np.int64, np.int8, np.uint16])
@pytest.mark.parametrize(
    ("cls", "name"),
    [(HeadOptions, "scale"), (HeadOptions, "softcap"), (CLHAOptions, "reward_margin"), (PROOptions, "sft_weight")],
)
def test_a_number_is_one_setting_whatever_its_type(cls, name, kind):
    plain, made = cls(**{name: 3.0}), cls(**{name: kind(3)})
    assert type(getattr(made, name)) is float
    assert made.encoded == plain.encoded
    assert made == plain
    assert cls.decode(made.encoded) == plain


def test_integers_stay_integers():
    made = HeadOptions(ignore_index=np.int32(-7), workspace_bytes=np.int64(2**40))
    assert made == HeadOptions(ignore_index=-7, workspace_bytes=2**40)
    assert type(made.ignore_index) is type(made.workspace_bytes) is int
    assert type(HeadOptions.decode(made.encoded).workspace_bytes) is int


@pytest.mark.parametrize(
    ("cls", "name", "value", "expected"),
    [
        (HeadOptions, "ignore_index", -(2**63) - 1, "a negative integer of 64 bits"),
        (HeadOptions, "workspace_bytes", 2**63, "a positive number of bytes or None"),
        (HeadOptions, "scale", 10**400, "a finite number"),
        (HeadOptions, "temperature", np.float32("inf"), "a positive number"),
        (CLHAOptions, "margin", 10**309, "a finite number"),
        (CLHAOptions, "reward_floor", -(10**309), "a number or -inf"),
        (PROOptions, "sft_weight", np.float64("nan"), "a finite number"),
        (CLHAOptions, "margin", np.True_, "a finite number"),
    ],
)
def test_numbers_too_large_and_numpys_are_held_to_the_same(cls, name, value, expected):
    with pytest.raises(ValueError, match=f"{name}: expected {expected}"):
        cls(**{name: value})

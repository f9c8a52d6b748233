"""Settings objects: defaults, presets, refusals, and the string in which operators carry them."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from clha_fast import PRESETS, PUBLISHED, CLHAOptions, HeadOptions, Objective


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
        (HeadOptions, "ignore_index", 0, "a negative integer"),
        (HeadOptions, "ignore_index", -1.5, "a negative integer"),
        (HeadOptions, "ignore_index", None, "a negative integer"),
        (HeadOptions, "workspace_bytes", 0, "a positive number of bytes or None"),
        (HeadOptions, "workspace_bytes", "64MB", "a positive number of bytes or None"),
        (HeadOptions, "workspace_bytes", True, "a positive number of bytes or None"),
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

"""Models whose own forward padding changes, or which look ahead: said where they are, and measured, not believed."""

from __future__ import annotations

import logging

import pytest
import transformers

from clha_fast.models.measure import LOOKS_AHEAD, PADDING_CHANGES, measure_head
from tests.support.architecture_configs import shrink
from tests.support.architectures import build
from tests.support.padding import DRAWS, TOLERANCE, differences
from tests.support.versions import lacks_type


@pytest.mark.parametrize("kind", [*sorted(PADDING_CHANGES | LOOKS_AHEAD), "gpt2", "llama", "mistral", "gemma2", "opt"])
def test_the_lists_are_what_the_models_do(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    if lacks_type(kind):
        pytest.skip(f"transformers {transformers.__version__} has no model type {kind}")
    model = build(shrink(kind, False)).eval()
    padding, prefix = (max(values) for values in zip(*(differences(model, s) for s in range(DRAWS)), strict=True))
    assert (padding > TOLERANCE) == (kind in PADDING_CHANGES)
    if kind in LOOKS_AHEAD:
        assert prefix > TOLERANCE
    with caplog.at_level(logging.WARNING, logger="clha_fast"):
        measure_head(model)
    said = " ".join(caplog.messages)
    assert ("padding changes" in said) == (kind in PADDING_CHANGES)
    assert ("look ahead" in said) == (kind in LOOKS_AHEAD)

"""The transformers backend: `model.generate` on prompts padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from clha_fast.generation.backend import (
    EncodedPrompt,
    Generated,
    GenerationSettings,
    answer_text,
    cut_answer,
    read_answer,
)
from clha_fast.generation.decoding import Decoding
from clha_fast.generation.prompts import own_ends
from clha_fast.models.loading import (
    DTYPES,
    check_vocabulary,
    find_device,
    fingerprint,
    load_model,
    load_tokenizer,
)
from clha_fast.models.positions import positions_of


class TransformersBackend:
    """A causal language model and its tokenizer, on the model's device.

    Args:
        model: put into evaluation mode. Its own generation settings (a repetition penalty, a temperature) play no part.

    Raises:
        ValueError: a tokenizer with more tokens than the model.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer = model.eval(), tokenizer
        self._decoding = Decoding()

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for, None when its configuration names no limit."""
        return positions_of(self.model)

    def describe(self) -> dict[str, str]:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"backend": "hf", "dtype": dtype, "device": self.model.device.type}

    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def answer(
        self,
        prompts: Sequence[EncodedPrompt],
        settings: GenerationSettings,
        said: Callable[[int, str], None] | None = None,
    ) -> list[Generated]:
        """As `GenerationBackend.answer`; `said(row, text)` is called with what a row's answer is so far, uncut."""
        ends = sorted({*own_ends(self.model), *(token for prompt in prompts for token in prompt.ends)})

        def stopped(row: int, new: list[int]) -> bool:
            text = answer_text(new, self.tokenizer)
            if said is not None:
                said(row, text)
            return cut_answer(text, prompts[row].stops)[1]

        rows = self._decoding.answer(
            self.model,
            [prompt.ids for prompt in prompts],
            ends=ends,
            pad=self._pad,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seeds=[prompt.seed for prompt in prompts],
            stopped=stopped if said is not None or any(prompt.stops for prompt in prompts) else None,
            shown=said is not None,
        )
        return [read_answer(row, self.tokenizer, ends, prompt.stops) for prompt, row in zip(prompts, rows, strict=True)]

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


def load_backend(
    path: str, *, device: str = "auto", dtype: str = "auto", attn_implementation: str | None = None
) -> TransformersBackend:
    """The causal language model, or the adapter, and the tokenizer of a local folder or of a name on the Hub.

    Args:
        device: "auto" takes the accelerator that torch sees, else the CPU; or a torch device such as "cuda:1".
        dtype: "auto" is that of the checkpoint, or one of float32, bfloat16, float16.
        attn_implementation: as transformers' `from_pretrained`.

    Raises:
        ValueError: nothing there to load, as `load_model`; an unknown device or dtype; too little memory.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    place = find_device(device)
    tokenizer = load_tokenizer(path, "model")
    model: Any = load_model(path, "auto" if dtype == "auto" else getattr(torch, dtype), attn_implementation)
    try:
        model.to(place)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"device: {path} does not fit in the memory of {place} as {model.dtype}") from error
    return TransformersBackend(model, tokenizer)

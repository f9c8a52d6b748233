"""Answers to prompts: backends that write them, and files of them."""

from clha_fast.generation.answers import (
    Answer,
    Generation,
    GenerationError,
    GenerationInterrupted,
    generate_answers,
    read_answers,
    write_answers,
)
from clha_fast.generation.backend import (
    EncodedPrompt,
    Generated,
    GenerationBackend,
    GenerationSettings,
)
from clha_fast.generation.hf import TransformersBackend, load_backend
from clha_fast.generation.prompts import encode_prompts, trained_lead, trained_prefix

__all__ = [
    "Answer",
    "EncodedPrompt",
    "Generated",
    "Generation",
    "GenerationBackend",
    "GenerationError",
    "GenerationInterrupted",
    "GenerationSettings",
    "TransformersBackend",
    "encode_prompts",
    "generate_answers",
    "load_backend",
    "read_answers",
    "trained_lead",
    "trained_prefix",
    "write_answers",
]

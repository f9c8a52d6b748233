"""Tokenizers and models: loaded, or made from nothing for a run that starts from its own data."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from clha_fast.data.records import RankedRecord
from clha_fast.data.rendering import plain_template
from clha_fast.messages import check_keys, nearest
from clha_fast.models.adapters import import_peft
from clha_fast.models.tokenizer_files import read_tokenizer

logger = logging.get_logger(__name__)

# One of them is in every repository that can be loaded.
_KNOWN_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")
_PATIENCE = 10.0  # seconds
DTYPES = ("auto", "float32", "bfloat16", "float16")
_PART = 1 << 18  # weights whose checksum is taken at once: what it needs beside them stays in a CPU's cache
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
# The bases: errors of whatever carries the requests, which are no OSError; ValueError: a name that cannot be one.
_HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def texts_of(records: Iterable[RankedRecord]) -> Iterator[str]:
    """Every prompt (as the plain template writes it) and every completion."""
    for record in records:
        yield record.prompt if isinstance(record.prompt, str) else plain_template(record.prompt)
        yield from record.completions


def build_tokenizer(texts: Iterable[str], vocab_size: int = 4096, min_frequency: int = 2) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with <s> in front of what it encodes, </s> and <pad>.

    Any text can be encoded: all 256 bytes are tokens. The vocabulary is smaller than `vocab_size` where the texts do
    not hold enough pairs of at least `min_frequency`.

    Raises:
        ValueError: `vocab_size` has no room for the bytes and the three special tokens.
    """
    if not isinstance(vocab_size, int) or vocab_size < 259:
        raise ValueError(
            f"build_tokenizer.vocab_size: expected at least 259 (bytes and 3 special tokens), got {vocab_size!r}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    first = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, first)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def _expected(option: str, name: str) -> str:
    return f"{option}: expected a folder that holds one, or a name on the Hub, got {name!r}"


def check_reachable(option: str, name: str) -> None:
    """Whether there is such a folder, or such a name in the cache or on the Hub, asked once.

    transformers asks for file after file and tries each again and again, for a minute or more where a path is mistyped.

    Raises:
        ValueError: there is none, or the Hub does not answer.
    """
    if os.path.isdir(name):
        return
    expected = _expected(option, name)
    if os.path.lexists(name):
        raise ValueError(f"{expected}, which is a file")
    parent, _, last = name.rstrip("/").rpartition("/")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)
    if looks_local or (parent and os.path.isdir(parent)):
        known = os.listdir(parent) if os.path.isdir(parent) else []
        raise ValueError(f"{expected}, and there is no such folder{nearest(last, known)}")
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in _KNOWN_FILES):
            return
        get_hf_file_metadata(hf_hub_url(name, _KNOWN_FILES[0]), timeout=_PATIENCE)
    except EntryNotFoundError:  # the name is there, with other files
        return
    except _HUB_ERRORS as error:
        reason = " ".join(str(error).split()).split(". ")[0].removesuffix(".")
        raise ValueError(f"{expected}, which is no folder here, and the Hub gives none ({reason})") from error


@contextlib.contextmanager
def _one_sentence(option: str, name: str) -> Iterator[None]:
    """What transformers and the Hub say in paragraphs, as one sentence that names the option."""
    check_reachable(option, name)
    expected = _expected(option, name)
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # damaged weights, or of another shape
        reason = " ".join(str(error).split()).split(". ")[0].removesuffix(".")
        if "ignore_mismatched_sizes" in reason:  # which weights is in a table that transformers logs
            reason = "a weight in its files has another shape than its config.json says"
        raise ValueError(f"{expected} ({reason})") from error


def load_tokenizer(name: str, option: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or of a name on the Hub.

    Args:
        option: what the error calls it; a tokenizer often comes with the model.

    Raises:
        ValueError: there is none.
    """
    with _one_sentence(option, name):
        return read_tokenizer(name)


def build_model(
    settings: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    classifier: bool = False,
) -> PreTrainedModel:
    """A causal language model with random weights, or a sequence classifier with one label.

    Args:
        settings: `model_type` (llama, gpt2, qwen3, ...) and any fields of that type's configuration. `vocab_size` and
            the special tokens are the tokenizer's unless given.
        seed: of the weights; the process's random state is left alone.

    Raises:
        ValueError: no or an unknown model type, a field its configuration does not have, a vocabulary too small, a type
            without such a model, an encoder-decoder as classifier.
    """
    fields = dict(settings)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise ValueError(f"model_config.model_type: expected a name such as llama, got {kind!r}")
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {"vocab_size": len(tokenizer), **tokens, **fields}
    try:
        plain = AutoConfig.for_model(kind)
    except ValueError:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        raise ValueError(
            f"model_config.model_type: expected a type of transformers, got {kind!r}{nearest(kind, CONFIG_MAPPING)}"
        ) from None
    check_keys("model_config", fields, [*plain.to_dict(), *plain.attribute_map, *tokens])
    if fields["vocab_size"] < len(tokenizer):
        raise ValueError(
            f"model_config.vocab_size: expected at least the tokenizer's {len(tokenizer)}, got {fields['vocab_size']}"
        )
    config = AutoConfig.for_model(kind, **fields, **({"num_labels": 1} if classifier else {}))
    if classifier:
        _check_no_encoder_decoder("model_config.model_type", config, kind)
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ValueError(f"model_config.model_type: expected a type that has a sequence classifier, got {kind!r}")
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config, dtype=dtype)


def _check_no_encoder_decoder(option: str, config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{option}: expected a decoder or an encoder, which reads a response as one row, got {name}, an "
            "encoder-decoder"
        )


def adapter_config(settings: Mapping[str, Any]) -> Any:
    """A configuration of peft's from names and values, as they stand in a file.

    Args:
        settings: fields of the configuration; `peft_type` is LORA and `task_type` CAUSAL_LM unless given.

    Raises:
        ValueError: an unknown `peft_type`, a field that its configuration does not have, a value that it refuses.
        ImportError: peft is not installed.
    """
    peft = import_peft()
    fields = {"task_type": "CAUSAL_LM", **settings}
    kind = str(fields.pop("peft_type", "LORA")).upper()
    known = {key.value: cls for key, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        raise ValueError(f"peft_config.peft_type: expected one of {', '.join(sorted(known))}, got {kind!r}")
    check_keys("peft_config", fields, [field.name for field in dataclasses.fields(known[kind]) if field.init])
    try:
        return known[kind](**fields)
    except TypeError as error:
        raise ValueError(f"peft_config: expected settings of a {known[kind].__name__}, got {error}") from error


def load_model(
    name: str,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    option: str = "model",
    **others: Any,
) -> PreTrainedModel:
    """A causal language model of a local folder or of a name on the Hub; dtype "auto" is the checkpoint's own.

    A folder with an adapter of peft's alone gives the adapter on its base model, and goes on training it.

    Args:
        option: what errors call it. others: more arguments of `from_pretrained`.

    Raises:
        ValueError: there is none; weights are missing there, which would begin at random.
        ImportError: an adapter, and peft is not installed.
    """
    extra = others if attn_implementation is None else {**others, "attn_implementation": attn_implementation}
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        return load_adapter(name, option, base_option=option, dtype=dtype, **extra)
    return _load_whole(name, option, dtype=dtype, **extra)


def is_classifier(name: str, option: str = "model") -> bool:
    """Whether the configuration in a local folder, or of a name on the Hub, is a sequence classifier's.

    Raises:
        ValueError: there is none.
    """
    with contextlib.suppress(OSError), open(os.path.join(name, "adapter_config.json"), encoding="utf-8") as file:
        return bool(json.load(file).get("task_type") == "SEQ_CLS")
    with _one_sentence(option, name):
        config = AutoConfig.from_pretrained(name)
    return any("ForSequenceClassification" in kind for kind in config.architectures or ())


def config_positions(name: str) -> int | None:
    """Tokens that the model of a folder or name has positions for; None without a limit, and of a tokenizer alone.

    Raises:
        ValueError: nothing is there.
    """
    check_reachable("model", name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return None
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def load_classifier(
    name: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None, seed: int = 0
) -> tuple[PreTrainedModel, list[str]]:
    """A sequence classifier with one label from a local folder or a name on the Hub, and which weights are new.

    A classifier goes on with the head it has. A language model or an encoder gets a new one in its head's place.

    Args:
        seed: of new weights; the process's random state is left alone.

    Raises:
        ValueError: there is none; an adapter alone; an encoder-decoder; a classifier with several labels; weights of
            the body are missing there, which would begin at random.
    """
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        # `load_adapter`, and so `clha-fast merge`, refuse one of a classifier.
        by = "peft's merge_and_unload" if is_classifier(name) else "clha-fast merge, or peft's merge_and_unload"
        expected = f"model: expected a whole model, got {name} with an adapter alone"
        raise ValueError(f"{expected}; merge it ({by}) and give that folder")
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _one_sentence("model", name):
        config = AutoConfig.from_pretrained(name)
    _check_no_encoder_decoder("model", config, name)
    classifies = any("ForSequenceClassification" in kind for kind in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise ValueError(
            f"model: expected a classifier with one label to go on with, got {name} with {config.num_labels}"
        )
    with _one_sentence("model", name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype=dtype, output_loading_info=True, **extra
        )
    missing = sorted(found["missing_keys"])
    # What stands between body and labels is the head's: an encoder trained on masked words has no pooler.
    body = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if body:
        raise ValueError(
            f"model: expected weights for every parameter of the body of {type(model).__name__}, got {name} without "
            f"{_some(body)}, which would begin at random"
        )
    return model, missing


def _load_whole(name: str, option: str, **settings: Any) -> PreTrainedModel:
    with _one_sentence(option, name):
        model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **settings)
    missing, unused = (sorted(found[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    if (missing or unused) and is_classifier(name, option):  # With a tied embedding nothing is missing.
        way = "give the language model it was made of; rank takes reward models, and score and eval by --reward-model"
        raise ValueError(f"{option}: expected a causal language model, got {name}, a reward model; {way}")
    if missing:
        hint = f", and with unused ones ({_some(unused)})" if unused else ""
        raise ValueError(
            f"{option}: expected weights for every parameter of {type(model).__name__}, got {name} without "
            f"{_some(missing)}{hint}; these would begin at random: rename the weights as transformers does, or if new "
            f"ones are meant, save them once (AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)) "
            "and give that folder"
        )
    if unused:
        logger.warning(f"{option}: {name} has weights that {type(model).__name__} does not use: {_some(unused)}")
    return model


def load_adapter(
    name: str, option: str = "model", *, base: str | None = None, base_option: str = "model", **settings: Any
) -> PreTrainedModel:
    """As peft's `AutoPeftModelForCausalLM`, with the weights of the base model and of the adapter checked.

    Args:
        base: the base model, in the place of the one that the adapter names.
        option, base_option: what errors call adapter and base model.
        settings: of the base model's `from_pretrained`.

    Raises:
        ValueError, ImportError: as `load_model`.
    """
    peft = import_peft()
    with _one_sentence(option, name):
        config = peft.PeftConfig.from_pretrained(name)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"{option}: expected an adapter of a causal language model, got {name} for {config.task_type}")
    named = config.base_model_name_or_path
    if not (base or named):
        raise ValueError(f"{option}: expected an adapter that names its base model, got {name}, which names none")
    revision = {} if base or config.revision is None else {"revision": config.revision}
    whole = _load_whole(base or named, base_option, **settings, **revision)
    if os.path.isfile(os.path.join(name, "tokenizer_config.json")):
        size = len(load_tokenizer(name, option))
        if size > whole.get_input_embeddings().weight.shape[0]:
            whole.resize_token_embeddings(size)
    with _one_sentence(option, name), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModelForCausalLM.from_pretrained(whole, name, is_trainable=True)
    missing = next(
        (text for text in (str(warning.message) for warning in said) if "missing adapter keys" in text), None
    )
    if missing is not None:
        names = re.findall(r"'([^']+)'", missing)
        raise ValueError(
            f"{option}: expected weights for every parameter of the {config.peft_type} adapter, got {name} without "
            f"{_some(names)}, which would begin anew; rename the weights in its file as peft writes them"
        )
    return model


def load_config(name: str) -> Any:
    """A causal language model's configuration, from a folder or the Hub; no weights are read.

    Raises:
        ValueError: there is none, or it is an encoder-decoder's.
    """
    check_reachable("model", name)
    with _one_sentence("model", name):
        config = AutoConfig.from_pretrained(name)
    _check_no_encoder_decoder("model", config, name)
    return config


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f', ... ({len(names)} in all)' if len(names) > 3 else ''}"


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError when the tokenizer can produce a token that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"tokenizer: expected at most the model's {rows} tokens, got {len(tokenizer)}")


def fingerprint(model: Any) -> str:
    """A hash of configuration and weights, every one of them, whatever the folder they came from."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} {_checksum(value)}".encode())
    return digest.hexdigest()


def _checksum(value: torch.Tensor) -> list[int]:
    """Sums modulo 2^64 of a tensor's bits, where it lies: the same in any order of summation and on any device.

    Each weight, as an integer, is multiplied by an odd number that its place has, so that the sum of a part shows any
    single change, and weights that have changed places.
    """
    flat = value.detach().flatten()
    bits = flat.view(_INTEGERS[min(flat.element_size(), 8)])
    odd = 2 * torch.arange(min(_PART, bits.numel()), device=bits.device) + 1
    sums: list[int] = torch.stack([(part * odd[: part.numel()]).sum() for part in bits.split(_PART)]).tolist()
    return sums


def find_device(name: str) -> torch.device:
    """A torch device such as "cuda:1"; "auto" is the accelerator that torch sees, else the CPU.

    Raises:
        ValueError: no device's name, or one that is not here.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto or a torch device such as cpu or cuda:0, got {name!r}") from None
    accelerators = torch.accelerator.device_count()
    count = 1 if device.type == "cpu" else 0 if found is None or device.type != found.type else accelerators
    if (device.index or 0) >= count:
        have = "cpu" if found is None else f"cpu, {found.type}:0 to {found.type}:{accelerators - 1}"
        raise ValueError(f"device: expected one that is here ({have}), got {name!r}")
    return device

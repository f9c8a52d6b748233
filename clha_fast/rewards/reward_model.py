"""A sequence classifier as a source of rewards: loaded, checked, and fed with padded rows."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file, logging

from clha_fast.batching.segments import check_layout, counted_layout
from clha_fast.models.loading import DTYPES, check_reachable, check_vocabulary, find_device, fingerprint
from clha_fast.models.positions import positions_of
from clha_fast.models.tokenizer_files import read_tokenizer, tokenizer_hash
from clha_fast.rewards.joined import JoinedRewards, join_texts
from clha_fast.rewards.rows import pad_rows, padded_rewards
from clha_fast.rewards.run import Row, families

REWARD_FILE = "reward_model.json"  # what training says of the model in its folder
BLANK = "responses_begin_with_blank"
# What reads an adapter: transformers 5.6 does not say which weights it found, and what it calls is in peft since 0.19.
ADAPTERS_NEED = {"transformers": "5.7", "peft": "0.19"}
# What finds the head that an adapter brings, which older ones would begin at random.
HEADS_NEED = {"transformers": "5.18", "peft": "0.20"}


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier, one of whose logits is the reward, and its tokenizer.

    Attributes:
        model: from `AutoModelForSequenceClassification`, on its device; put into evaluation mode.
        tokenizer: the model's own.
        label: which logit; may be None when there is only one.
        layout: of the rows that `score_rows` runs, `padded`, `packed`, `shared` (the responses of a record behind one
            prompt) or `auto`, as `clha_fast.attach` has it; afterwards, what that came to, and `padded` from where
            `auto` has met rows that the model does not compute as texts alone.
        blank: whether the responses that it was trained on begin with a blank behind texts that do not end in one
            (`data.prompts.begin_with_blank`); None where that is not known.

    Raises:
        UnsupportedLayoutError: the model does not compute such rows as it computes each response alone.
        ValueError: an encoder-decoder model; a tokenizer with more tokens than the model; several labels and none
            chosen, or one that the model does not have.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    label: int | None = None
    layout: str = "padded"
    blank: bool | None = None
    _joined: JoinedRewards | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        config = self.model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                "reward_model: expected a decoder or an encoder, got an encoder-decoder model "
                f"({type(self.model).__name__})"
            )
        check_vocabulary(self.model, self.tokenizer)
        size = config.num_labels
        if self.label is None and size != 1:
            names = ", ".join(f"{index} = {config.id2label.get(index)}" for index in range(min(size, 8)))
            more = ", ..." if size > 8 else ""
            raise ValueError(f"label: expected the index of one of the reward model's {size} labels ({names}{more})")
        if self.label is not None and not 0 <= self.label < size:
            raise ValueError(f"label: expected an index from 0 to {size - 1}, got {self.label}")
        self.model.eval()
        check_layout(self.layout, "auto")
        if self.layout != "padded":
            pad = self._padding_token([])
            joined = JoinedRewards(self.model, 0 if pad is None else pad, self.label or 0)
            object.__setattr__(self, "layout", joined.settle(self.layout))
            object.__setattr__(self, "_joined", joined)

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for, None when its configuration names no limit."""
        return positions_of(self.model)

    @property
    def default_max_length(self) -> int | None:
        """The smaller of the model's and the tokenizer's limit."""
        limits = [self.max_positions, self.tokenizer.model_max_length]  # 1e30 is the tokenizer's way to say none
        return min((limit for limit in limits if limit is not None and limit < 10**9), default=None)

    def fingerprint(self) -> str:
        """Of all that decides a reward, whatever the folder it came from.

        Hashes of configuration and weights, and of the tokenizer with its chat template; the tokens that texts are cut
        to, and `blank` where it is False.
        """
        length = self.default_max_length
        parts = [fingerprint(self.model), f"read by {tokenizer_hash(self.tokenizer)}"]
        parts += [f"up to {length}"] if length is not None else []
        return " ".join([*parts, *(["without blanks"] if self.blank is False else [])])

    @torch.inference_mode()
    def score_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The rewards of token sequences: one forward pass over all of them, padded on the right.

        The padding token is the configuration's; where it names none, one that no row holds.

        Args:
            rows: token ids, each row with at least one.

        Returns:
            float32 [len(rows)], on the CPU.
        """
        pad = self._padding_token(rows)
        if pad is None:  # the rows hold the whole vocabulary
            return torch.cat([self.score_tokens([row]) for row in rows])
        input_ids, mask = (part.to(self.model.device) for part in pad_rows(rows, pad))
        return padded_rewards(self.model, self.model.config, input_ids, mask, pad, self.label or 0).float().cpu()

    @torch.inference_mode()
    def score_rows(self, rows: Sequence[Row]) -> Tensor:
        """float32 [len(rows)], on the CPU: `score_tokens` in rows of `layout`; neighbours with one prompt share it."""
        layout, together = self.layout, families(rows, self.layout)
        if layout == "auto":
            layout = counted_layout((len(same[0].prompt), [len(row.response) for row in same]) for same in together)
        if layout == "padded":
            return self.score_tokens([row.tokens for row in rows])
        assert self._joined is not None
        texts = [[(row.prompt, row.response) for row in same] for same in together]
        # Padding is at the row's end, where nothing reads it: any token will do where the model names none.
        own = self._own_padding()
        batch = join_texts(texts, layout, -1 if own is None else own)
        inputs = {name: v.to(self.model.device) if isinstance(v, Tensor) else v for name, v in batch.items()}
        if not self._joined.takes(inputs):  # padded with a token that the rows leave free
            object.__setattr__(self, "layout", self._joined.layout)
            return self.score_tokens([row.tokens for row in rows])
        return self._joined(self.model, inputs).float().cpu()

    def _own_padding(self) -> int | None:
        size = self.model.get_input_embeddings().weight.shape[0]
        own = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return own if own is not None and 0 <= own < size else None

    def _padding_token(self, rows: Sequence[Sequence[int]]) -> int | None:
        own = self._own_padding()
        if own is not None:
            return own
        size = self.model.get_input_embeddings().weight.shape[0]
        used = {token for row in rows for token in row}
        # A single row has no padding; any token will do that is not taken for it.
        return next((token for token in range(size) if token not in used), -1 if len(rows) == 1 else None)


def load_reward_model(
    path: str, *, label: int | None = None, device: str = "auto", dtype: str = "auto", layout: str = "padded"
) -> RewardModel:
    """The reward model and tokenizer of a local folder or of a name on the Hub.

    Args:
        label, layout: as `RewardModel`.
        device: "auto" takes the accelerator that torch sees, else the CPU; or a torch device such as "cuda:1".
        dtype: "auto" is that of the checkpoint, or one of float32, bfloat16, float16.

    Raises:
        ValueError: nothing there to load; a checkpoint without weights for the classifier's head, such as a plain
            language model, whose scores would be random; an unknown device or dtype; as `RewardModel`.
        ImportError: an adapter, and no peft, or a peft or transformers that is too old to read it.
    """
    check_layout(layout, "auto")
    place = _check_place(device, dtype)
    model, tokenizer = _read(os.fspath(path), dtype=dtype)
    try:
        model.to(place)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"device: {path} does not fit in the memory of {place} as {model.dtype}") from error
    return RewardModel(model, tokenizer, label, layout, trained_with_blank(os.fspath(path)))


def probe_reward_model(path: str, *, label: int | None = None, device: str = "auto", dtype: str = "auto") -> None:
    """Before hours of other work: what `load_reward_model` refuses, found out without its weights being read.

    Only the weights' own damage, and whether they fit into memory, are left to loading; of a quantised model and of an
    adapter, head and labels too.

    Raises:
        ValueError: as `load_reward_model`.
    """
    _check_place(device, dtype)
    path = os.fspath(path)
    _check_folder(path)
    try:
        quantised = getattr(AutoConfig.from_pretrained(path), "quantization_config", None) is not None
    except (OSError, ValueError, KeyError):  # reading the model says it better
        quantised = False
    if not (quantised or os.path.isfile(os.path.join(path, "adapter_config.json"))):
        RewardModel(*_read(path, dtype=dtype, device_map="meta"), label)


def trained_with_blank(path: str) -> bool | None:
    """What `reward_model.json` in its folder says of `RewardModel.blank`; None of a model from elsewhere."""
    found: Any = None
    # Somebody else's folder may have a file of that name, with anything in it.
    with contextlib.suppress(OSError, ValueError), open(os.path.join(path, REWARD_FILE), encoding="utf-8") as file:
        found = json.load(file)
    found = found.get(BLANK) if isinstance(found, dict) else None
    return found if isinstance(found, bool) else None


def _check_place(device: str, dtype: str) -> torch.device:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return find_device(device)


def _check_folder(path: str) -> None:
    if not os.path.isdir(path) and (os.path.lexists(path) or path.startswith((".", "~", os.sep))):
        raise ValueError(f"reward_model: expected a folder with a model, or a name on the Hub, got {path!r}")
    check_reachable("reward_model", path)
    if os.path.isdir(path) and not any(name.endswith("config.json") for name in os.listdir(path)):
        raise ValueError(f"reward_model: expected a folder with a model, got {path!r} without a configuration")


def _read(path: str, **settings: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """(model, tokenizer), or in one sentence why there is none; `settings` are of `from_pretrained`."""
    _check_folder(path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a table about what the error below says in one sentence
    try:
        tokenizer = read_tokenizer(path)
        heads = _adapter_heads(path)
        _check_adapter(path, bool(heads))
        labels = {"num_labels": min(heads.values())} if heads else {}
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path, output_loading_info=True, **labels, **settings
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # damaged weights, weights of another shape
        raise ValueError(f"reward_model: {path} could not be loaded ({' '.join(str(error).split())})") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(name for name in found["missing_keys"] if not any(head.endswith(f".{name}") for head in heads))
    if missing:
        raise ValueError(
            f"reward_model: expected a trained sequence classifier, got {path} without weights for "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; its scores would be random "
            "(clha-fast reward-model train makes one of it)"
        )
    return model, tokenizer


def _check_adapter(path: str, brings_head: bool) -> None:
    """Without peft, transformers would pass over an adapter in silence where a whole model lies beside it."""
    for package, oldest in (HEADS_NEED if brings_head else ADAPTERS_NEED).items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        if (version == "none" or Version(version) < Version(oldest)) and find_adapter_config_file(path) is not None:
            raise ImportError(
                f"reward_model: expected {package} {oldest} or newer for the adapter in {path}, got {version}; "
                f"pip install '{package}>={oldest}', or merge the adapter (peft's merge_and_unload) and give that"
            )


def _adapter_heads(path: str) -> dict[str, int]:
    """Matrices of the head that an adapter's folder brings along, and their rows: a language model below has none."""
    weights = os.path.join(path, "adapter_model.safetensors")
    if not os.path.isfile(weights):
        return {}
    with safe_open(weights, framework="pt") as file:
        names = [name for name in file.keys() if not {"score", "classifier"}.isdisjoint(name.split("."))]  # noqa: SIM118
        shapes = {name: file.get_slice(name).get_shape() for name in names if "lora_" not in name}
    return {name: shape[0] for name, shape in shapes.items() if len(shape) == 2}

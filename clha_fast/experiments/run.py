"""A training run from files to a folder: what the command line drives, without a line of printing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import signal
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from clha_fast.data.containers import files_of, source_name
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.data.split import shared_prompts, split_records
from clha_fast.experiments.contents import with_contents
from clha_fast.experiments.folder import check_apart, check_folder, claim_folder
from clha_fast.experiments.reading import leave_out, read_file
from clha_fast.files import RunIdentity, file_hash, write_json
from clha_fast.generation.prompts import lead_of
from clha_fast.messages import nearest
from clha_fast.models.init_kwargs import check_init_kwargs, load_with
from clha_fast.models.loading import (
    adapter_config,
    build_model,
    build_tokenizer,
    check_vocabulary,
    load_tokenizer,
    texts_of,
)
from clha_fast.ops.dispatch import resolve
from clha_fast.reports.data_summary import DataSummary, summarise
from clha_fast.reports.run_page import REPORT_FILE
from clha_fast.training.checkpoints import wait_for_everyone
from clha_fast.training.config import CLHAConfig
from clha_fast.training.objective import CLHA_FIELDS
from clha_fast.training.samples import SAMPLES_FILE
from clha_fast.training.stopping import StopAsked
from clha_fast.training.switches import idle_settings
from clha_fast.training.trainer import CLHATrainer
from clha_fast.training.trl_names import SETTLED
from clha_fast.training.validation import check_best_metric, check_casts, check_optimizer, evaluation_metrics

if TYPE_CHECKING:
    from typing_extensions import Self

METRICS_FILE = "metrics.json"
CURVE_FILE = "loss_curve.png"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Whatever carries the Hub's requests, and OSError.
_HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)
# Where a run from files wants something else than transformers' Trainer.
DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
}
# Settings that change what is written or said, never the weights: a run may be resumed with other ones.
_NEUTRAL = (
    *("output_dir", "logging_steps", "logging_strategy", "logging_first_step", "log_level", "report_to", "run_name"),
    *("save_steps", "save_strategy", "save_total_limit", "disable_tqdm", "push_to_hub"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataset_num_proc"),
    *("eval_samples", "eval_sample_tokens", "eval_sample_temperature"),
    *("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
)


@dataclass
class RunOptions:
    """What a run needs beside `CLHAConfig`.

    Attributes:
        train_file: ranked responses. eval_file: held-out ones; without it `eval_fraction` (0.1) of the training
            file's prompts are held out; with 0 none of its own are, and without either nothing is evaluated.
        format, rank_by_reward, columns: as `clha_fast.data.read_records`, for both files.
        skip_bad_records: leave malformed records out and count them, instead of stopping at the first.
        model: a folder or name to load; or model_config: `{"model_type": "llama", ...}`, random weights.
        tokenizer: a folder or name (the model's by default); or build_tokenizer: `{"vocab_size": 4096}`, a byte-level
            BPE trained on the training records.
        peft_config: an adapter to train in the model's place, fields of a peft configuration: `{"r": 8,
            "target_modules": ["q_proj", "v_proj"]}` (LoRA unless `peft_type` says otherwise).
        dtype: of the weights. attn_implementation: as transformers' `from_pretrained`.
        resume: continue the run in `output_dir`. overwrite: replace it.
    """

    train_file: str | None = None
    eval_file: str | None = None
    eval_fraction: float | None = None
    format: str = "auto"
    columns: dict[str, Any] | None = None
    rank_by_reward: bool = False
    skip_bad_records: bool = False
    model: str | None = None
    model_config: dict[str, Any] | None = None
    tokenizer: str | None = None
    build_tokenizer: dict[str, Any] | None = None
    peft_config: dict[str, Any] | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """ValueError for values missing, doubled or outside their choices."""
        if self.train_file is None:
            way = "; a run is resumed with the options that it was started with" if self.resume else ""
            raise ValueError(f"train_file: expected the path of a file with ranked responses, got nothing{way}")
        if (self.model is None) == (self.model_config is None):
            got = "neither" if self.model is None else "both"
            raise ValueError(f"model: expected either model (a path or name) or model_config, got {got}")
        if self.tokenizer is not None and self.build_tokenizer is not None:
            raise ValueError("tokenizer: expected either tokenizer or build_tokenizer, got both")
        if self.model is None and self.tokenizer is None and self.build_tokenizer is None:
            raise ValueError("tokenizer: expected tokenizer or build_tokenizer with model_config, got neither")
        if self.eval_file is not None and self.eval_fraction:
            raise ValueError("eval_fraction: expected none (or 0) beside eval_file, got both")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.resume and self.overwrite:
            raise ValueError("resume: expected either resume or overwrite, got both")
        for name in self.build_tokenizer or {}:
            known = ("vocab_size", "min_frequency")
            if name not in known:
                raise ValueError(f"build_tokenizer: unknown key {name!r}{nearest(name, known)}")


def with_defaults(settings: Mapping[str, Any], config_class: type[TrainingArguments]) -> dict[str, Any]:
    """The settings, with those of `DEFAULTS` that have a part beside them."""
    made = {**DEFAULTS, **settings}
    idle = idle_settings(made, config_class).keys() - settings.keys()
    return {name: value for name, value in made.items() if name not in idle}


class Run:
    """One run from files to a folder, in stages: read, split, build, train, report.

    Args:
        options: a `RunOptions`.
        settings: fields of `CLHAConfig`; `DEFAULTS` fill in what is not there.

    Attributes:
        train_records, held_out: the records, once split. skipped: the errors of those left out (`skip_bad_records`).
        trainer: the `CLHATrainer`, once built. before, after: evaluation metrics, {} until known.
        by_content: set before `prepare`, files and folders that options and settings name are told by their content,
            wherever they lie, where the run is told from others.
        idle: settings that do nothing as the others are -> a sentence.
        checkpoint: what will be resumed from, None for a new run. interrupted: whether training was asked to stop.

    Raises:
        ValueError: bad options. BackendError: the backend that was asked for cannot run here.

    Example::

        run = Run(options, settings).prepare()   # reads, splits and builds; writes nothing
        run.evaluate_before()
        run.train()
        run.report()
    """

    config_class: ClassVar[type[TrainingArguments]] = CLHAConfig
    # What a run leaves in its folder beside the model and its checkpoints.
    files: ClassVar[tuple[str, ...]] = (METRICS_FILE, CURVE_FILE, SAMPLES_FILE, REPORT_FILE)
    trainer: Any  # a CLHATrainer
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel

    def __init__(self, options: RunOptions, settings: Mapping[str, Any]) -> None:
        options.check()
        self.options = options
        settings = with_defaults(settings, self.config_class)
        if settings.get("output_dir") is None:
            raise ValueError("output_dir: expected a folder for the run, got nothing")
        settings.setdefault("dataloader_pin_memory", torch.cuda.is_available())
        self.settings = settings
        self.args: Any = self.config_class(**settings)
        self.idle = idle_settings(settings, self.config_class)
        self.folder: str = self.args.output_dir
        if options.eval_file is not None or options.eval_fraction != 0:
            check_casts(self.args, DTYPES[options.dtype])
        self._init_kwargs = check_init_kwargs(getattr(self.args, "model_init_kwargs", None), options.model is not None)
        self._check_settings()
        self._adapter = None if options.peft_config is None else self._adapter_config(options.peft_config)
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self.interrupted = self.by_content = False
        self.skipped: list[RecordError] = []
        self.train_records: list[RankedRecord] = []
        self.held_out: list[RankedRecord] = []
        self._stop = StopAsked()

    def _check_settings(self) -> None:
        """Before anything is read or written: a backend that was asked for runs or is refused."""
        self._check_best_metric()
        resolve(self.args.backend, self.args.device.type, self._compute_dtype())

    def _check_best_metric(self) -> None:
        own = self.args.measured_options().metric_names
        check_best_metric(self.args.metric_for_best_model, evaluation_metrics(own))

    def _adapter_config(self, settings: Mapping[str, Any]) -> Any:
        return adapter_config(settings)

    def prepare(self) -> Self:
        """Everything before training: read, split, build. Writes nothing.

        Raises:
            ValueError, OSError: bad files, models and folders, each named.
        """
        self.split(*self.read())
        self.build()
        return self

    def read(self) -> tuple[list[RankedRecord], list[RankedRecord] | None]:
        """The records of the training file, and of the evaluation file where there is one."""
        options = self.options
        assert options.train_file is not None
        files = [path for path in (options.train_file, options.eval_file) if path is not None]
        train, *held_out = (read_file(path, vars(options), self.skipped) for path in files)
        return train, held_out[0] if held_out else None

    def split(self, records: list[RankedRecord], held_out: list[RankedRecord] | None) -> None:
        """Which records train, and which are held out."""
        fraction = 0.1 if self.options.eval_fraction is None else self.options.eval_fraction
        if held_out is not None:
            self.train_records, self.held_out = records, held_out
        elif fraction == 0:
            self._check_no_evaluation()
            self.train_records, self.held_out = records, []
        else:
            self.train_records, self.held_out = split_records(records, fraction, self.args.seed)

    def build(self) -> None:
        """Tokenizer, model and trainer, new or from the checkpoint that is resumed; tokenises the records."""
        options = self.options
        starts = {name: getattr(options, name, None) for name in ("model", "tokenizer", "reward_model")}
        check_apart(self.folder, {**starts, "reference": getattr(self.args, "reference", None)})
        self.identity = self._identity()
        self.checkpoint = check_folder(self.folder, self.identity, resume=options.resume, overwrite=options.overwrite)
        self.tokenizer = self._tokenizer()
        self.model = self._model()
        check_vocabulary(self.model, self.tokenizer)
        check_optimizer(self.args, self.model)
        if self._init_kwargs:  # the trainer is given a model that has been made with them
            self.args.model_init_kwargs = None
        try:
            self.trainer = self._trainer(
                train_dataset=self.train_records,
                eval_dataset=self.held_out or None,
                processing_class=self.tokenizer,
                peft_config=self._adapter,
                callbacks=[self._stop],
            )
        except _HUB_ERRORS as error:
            if not self.args.push_to_hub:
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"push_to_hub: expected a repository that can be made on the Hub, got an error ({reason}); log in "
                "(hf auth login, or hub_token), or leave it out and push the folder afterwards"
            ) from error
        sets = (self.trainer.train_dataset, self.trainer.eval_dataset)
        for dataset, records in zip(sets, (self.train_records, self.held_out), strict=True):
            self.skipped += leave_out(records, () if dataset is None else dataset.skipped)
        self.trainer.dataset_names = [source_name(path) for path in (options.train_file, options.eval_file) if path]

    def _trainer(self, **given: Any) -> Any:
        return CLHATrainer(self.model, self.args, **given)

    def _compute_dtype(self) -> torch.dtype:
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        return DTYPES[self.options.dtype]

    def _check_no_evaluation(self) -> None:
        """ValueError for what needs a held-out set."""
        for name, none in (("eval_strategy", "no"), ("eval_samples", 0), ("eval_on_start", False)):
            value = getattr(self.args, name, none)
            value = getattr(value, "value", value)
            if value != none:
                raise ValueError(f"{name}: expected {none!r} with eval_fraction 0 (no held-out set), got {value!r}")

    @property
    def changed(self) -> dict[str, Any]:
        """Options and settings that are not the defaults of a run from files, however they were spelled.

        They stand on the page and in the folder, both of which are shown to others: a secret is no part of them.
        """
        # An objective by name, in a mapping, with settings of CLHA in it.
        settled = ("objective", "preset", *CLHA_FIELDS) if isinstance(self.args, CLHAConfig) else ()
        given = {**vars(self.options), **self.settings, **{name: getattr(self.args, name) for name in settled}}
        fields = {f.name: f.default for cls in (type(self.options), self.config_class) for f in dataclasses.fields(cls)}
        # Pinning fits the device; what is spelled out as it would be anyway makes no other run.
        defaults = {**fields, **DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available()}
        left_out = {*SETTLED, "hub_token"}
        return {name: value for name, value in given.items() if name not in left_out and value != defaults[name]}

    def _identity(self) -> RunIdentity:
        files = {"train_file": self.options.train_file, "eval_file": self.options.eval_file}
        skip = {*files, "resume", "overwrite", *_NEUTRAL}
        settings = {name: value for name, value in self.changed.items() if name not in skip}
        settings = with_contents(settings) if self.by_content else settings
        return RunIdentity(settings, {name: _data_hash(path) for name, path in files.items() if path is not None})

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        options = self.options
        if self.checkpoint is not None:
            return load_tokenizer(self.checkpoint)
        if options.build_tokenizer is not None:
            return build_tokenizer(texts_of(self.train_records), **options.build_tokenizer)
        name = options.tokenizer or options.model
        assert name is not None
        return load_tokenizer(name, "tokenizer" if options.tokenizer else "model")

    def _model(self) -> PreTrainedModel:
        options, dtype = self.options, DTYPES[self.options.dtype]
        if options.model_config is not None:
            return build_model(options.model_config, self.tokenizer, self.args.seed, dtype)
        assert options.model is not None
        return load_with(self._init_kwargs, options.model, dtype, options.attn_implementation)

    @functools.cached_property
    def lead(self) -> str | None:
        """What the model is trained behind, as `clha_fast.generation.prompts.trained_lead` gives it of the folder."""
        return lead_of(self.train_records, self.tokenizer)

    @property
    def notes(self) -> dict[str, str | None]:
        """What stands in the folder's `run.json` beside the run's identity; None is left out."""
        return {"lead": self.lead}

    def summary(self) -> tuple[DataSummary, DataSummary | None, int]:
        """(training, evaluation, evaluation prompts that training has too); None without a held-out set."""
        loss = self.trainer.loss_options
        shared = shared_prompts(self.train_records, self.held_out)
        held_out = summarise(self.held_out, loss) if self.held_out else None
        return summarise(self.train_records, loss), held_out, shared

    def evaluate_before(self) -> None:
        """Claim the folder and evaluate the untrained model; a resumed run reads what it found then.

        Under FSDP and DeepSpeed a model can run once training has wrapped it: `train` evaluates it there, first.
        """
        path = os.path.join(self.folder, METRICS_FILE)
        if self.checkpoint is not None:
            with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
                self.before = json.load(file)["before"]
            return
        wait_for_everyone()  # until every process has seen the folder as it was
        if self.args.process_index == 0:
            claim_folder(self.folder, self.identity, owned=self.files, **self.notes)
        wait_for_everyone()
        if not self.held_out:
            self.write_metrics()
            return
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            self.args.eval_on_start = True
            return
        self.before = self._evaluate()
        self.write_metrics()

    def train(self) -> None:
        """Train to the end, or until Ctrl-C: then the current step is finished and saved, and `interrupted` is set."""
        try:
            with self._ctrl_c():
                self.trainer.train(resume_from_checkpoint=self.checkpoint)
        finally:
            if self.args.eval_on_start and not self.before:
                lines = self.trainer.state.log_history
                self.before = next((line for line in lines if line["step"] == 0 and "eval_loss" in line), {})
        self.interrupted = self._stop.stopped

    @contextlib.contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        def handler(number: int, frame: types.FrameType | None) -> None:
            if self._stop.asked:  # the second time: at once
                raise KeyboardInterrupt
            self._stop.asked = True

        before = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def report(self) -> None:
        """Evaluate the trained model, unless training has just done so, and save it, its tokenizer and the metrics."""
        if self.held_out:
            self.after = self._evaluated() or self._evaluate()
        self.trainer.save_model()
        self.write_metrics()

    def _evaluate(self) -> dict[str, Any]:
        return self.trainer.evaluate()

    def _evaluated(self) -> dict[str, float] | None:
        """What training has found for the weights that there are now, at its last step."""
        state = self.trainer.state
        if self.trainer.restored_step is not None or not state.global_step:
            return None
        lines = (line for line in state.log_history if line["step"] == state.global_step and "eval_loss" in line)
        return next(lines, None)

    def write_metrics(self, **more: Any) -> None:
        """`metrics.json`: evaluation before and after, every line of the log, and `more`; null is not a number."""
        found = {"before": self.before, "after": self.after, "log": self.trainer.state.log_history, **more}
        if self.args.process_index == 0:
            write_json(os.path.join(self.folder, METRICS_FILE), _plain(found))


def _data_hash(path: str) -> str:
    """Of the file's bytes; of several files, or a folder's, of all their hashes in order."""
    files: list[str] = []
    for found in files_of(path):
        inside = (os.path.join(folder, name) for folder, _, names in os.walk(found) for name in names)
        files += sorted(inside) if os.path.isdir(found) else [found]
    hashes = [file_hash(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Without what JSON has no word for: NaN becomes null, an infinity a text."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value

"""Names of options, from the source of the settings: what is misspelled is refused before transformers is imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
from collections.abc import Iterable, Sequence

from clha_fast.cli.values import OptionError, read_mapping, twice
from clha_fast.messages import nearest

PRINTING = ("memory_report", "plot")
# Other trainers' names, with what is written here.
ELSEWHERE = {
    **dict.fromkeys(("model_name_or_path", "model_name"), "--model"),
    **dict.fromkeys(("tokenizer_name", "tokenizer_name_or_path"), "--tokenizer"),
    "torch_dtype": "--dtype",
    **dict.fromkeys(
        ("dataset_name", "dataset_path", "train_dataset", "data_path"), "--train_file, with the path of a file"
    ),
    **dict.fromkeys(("eval_dataset", "validation_file"), "--eval_file"),
    **dict.fromkeys(("dataset_train_split", "dataset_test_split"), "--train_file and --eval_file, or --eval_fraction"),
    **dict.fromkeys(("use_peft", "use_lora", "lora_r"), "--peft_config.r 16 (any entry of it makes an adapter)"),
    **{name: f"--peft_config.{name}" for name in ("lora_alpha", "lora_dropout")},
    "lora_target_modules": "--peft_config.target_modules '[q_proj, v_proj]'",
    "lora_modules_to_save": "--peft_config.modules_to_save '[lm_head]'",
    **{name: f"--peft_config.{name.removeprefix('lora_')}" for name in ("lora_task_type", "use_rslora", "use_dora")},
    # Weights in 4 or 8 bits train behind an adapter alone.
    **{
        name: f"--model_init_kwargs.quantization_config '{{{name}: true}}', beside --peft_config.r 16"
        for name in ("load_in_4bit", "load_in_8bit")
    },
    "quantization_config": "--model_init_kwargs.quantization_config '{load_in_4bit: true}'",
    **{
        name: f"--model_init_kwargs.quantization_config '{{load_in_4bit: true, {entry}}}'"
        for name, entry in (
            ("bnb_4bit_quant_type", "bnb_4bit_quant_type: nf4"),
            ("bnb_4bit_compute_dtype", "bnb_4bit_compute_dtype: bfloat16"),
            ("bnb_4bit_use_double_quant", "bnb_4bit_use_double_quant: true"),
            ("use_bnb_nested_quant", "bnb_4bit_use_double_quant: true"),
            ("bnb_4bit_quant_storage", "bnb_4bit_quant_storage: uint8"),
        )
    },
    **{name: f"--model_init_kwargs.{name}" for name in ("trust_remote_code", "device_map")},
    **dict.fromkeys(
        ("revision", "model_revision"), "--model DIR, of `hf download NAME --revision REVISION --local-dir DIR`"
    ),
    "max_seq_length": "--max_length",
    "max_target_length": "--max_completion_length",
    "evaluation_strategy": "--eval_strategy",
    "no_cuda": "--use_cpu",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "preprocessing_num_workers": "--dataset_num_proc",
    **dict.fromkeys(("loss", "method"), "--objective"),
    **dict.fromkeys(("ref_model", "ref_model_name_or_path", "reference_model"), "--reference"),
    **dict.fromkeys(
        ("precompute_ref_log_probs", "precompute_ref_logps"),
        "--reference file, of a --train_file that `clha-fast score --policy MODEL SRC DST` has written",
    ),
    "overwrite_output_dir": "--overwrite",
    "resume_from_checkpoint": "--resume",
}


def unknown(name: str, where: str, known: Iterable[str]) -> OptionError:
    """The error for an option that there is not: what it is called here, or the nearest name."""
    name, known = name.replace("-", "_"), list(known)
    here = ELSEWHERE.get(name)
    if here is not None and here.lstrip("-").partition(" ")[0].partition(".")[0].rstrip(",") not in known:
        here = None  # another command's
    hint = nearest(name, known) if here is None else f"; here it is {here}"
    return OptionError(f"{where}: unknown option {name!r}{hint}")


def check_names(words: Sequence[str]) -> None:
    """Every option on the command line, and in the file after --config, without importing what they belong to.

    Raises:
        OptionError: one that there is not, or as `take_config` and `read_mapping`. What else is wrong is found later.
    """
    words, paths = take_config(words)
    known = option_names()
    if known is None:
        return
    flags = [word[2:].partition("=")[0].partition(".")[0] for word in words if word.startswith("--") and len(word) > 2]
    _check(flags, "command line", known | {"help"})
    for path in paths:
        try:
            loaded = read_mapping(path)
        except (OSError, UnicodeError):
            return
        _check([str(name) for name in loaded], path, known)


def take_config(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without `--config PATH`, and the paths: one or none.

    Raises:
        OptionError: it stands there twice, or without a path.
    """
    rest: list[str] = []
    paths: list[str] = []
    left = list(words)
    while left:
        name, equals, path = left.pop(0).partition("=")
        if name != "--config":
            rest.append(name + equals + path)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise OptionError("--config: expected the path of a YAML file, got none")
            path = left.pop(0)
        if paths:
            raise twice("--config", paths[0], path)
        paths.append(path)
    return rest, paths


def _check(names: Iterable[str], where: str, known: set[str]) -> None:
    for name in names:
        if name.replace("-", "_") not in known:
            raise unknown(name, where, sorted(known))


def option_names() -> set[str] | None:
    """The fields of `RunOptions`, of `CLHAConfig` and of its bases; None where transformers' source is not found."""
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        return None
    here = os.path.dirname(os.path.dirname(__file__))
    sources = {
        "TrainingArguments": os.path.join(os.path.dirname(package.origin), "training_args.py"),
        "CLHAConfig": os.path.join(here, "training", "config.py"),
        "TRLNames": os.path.join(here, "training", "trl_names.py"),
        "RunOptions": os.path.join(here, "experiments", "run.py"),
    }
    found = set(PRINTING)
    for name, path in sources.items():
        try:
            fields = _fields(path, name)
        except (OSError, SyntaxError):
            return None
        if not fields:
            return None
        found |= fields
    # `train` has its own way to say these.
    return found - {"resume_from_checkpoint", "do_train", "do_eval", "do_predict", "local_rank", "disable_tqdm"}


@functools.cache
def _fields(path: str, name: str) -> frozenset[str]:
    """The fields of a dataclass as its source has them: thousands of lines, read once."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    owner = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    found = set()
    for node in owner.body if owner is not None else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            value = node.value
            made = [k for k in value.keywords if k.arg == "init"] if isinstance(value, ast.Call) else []
            if not made and "ClassVar" not in ast.dump(node.annotation):
                found.add(node.target.id)
    return frozenset(found)

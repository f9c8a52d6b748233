"""`clha-fast merge`: what it takes and what it prints."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.utils import logging

from clha_fast.cli.generate import model_text
from clha_fast.cli.text import Parser, with_dashes
from clha_fast.models.loading import DTYPES
from clha_fast.training.merging import merge_adapter

DESCRIPTION = (
    "Merge an adapter (LoRA and other kinds of peft's) into its base model: a new folder with one whole model, its "
    "tokenizer and generation settings, for whatever reads a model of transformers."
)


def merge(words: Sequence[str]) -> int:
    """`clha-fast merge`: the exit status.

    Raises:
        ValueError, OSError, ImportError: a user error, in one sentence.
    """
    parser = Parser(prog="clha-fast merge", description=DESCRIPTION)
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter's folder, such as a run's output_dir")
    parser.add_argument("destination", metavar="OUT", help="the folder to write; it must not exist")
    parser.add_argument("--model", metavar="BASE", help="the base model (default: the one that the adapter names)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help=f"in which weights are added and written: {', '.join(DTYPES)} (default auto: the base's own)",
    )
    args = parser.parse_args(with_dashes(words))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one for every file of weights
    try:
        found = merge_adapter(args.adapter, args.destination, base=args.model, dtype=args.dtype)
    finally:
        if bars:
            logging.enable_progress_bar()
    print(f"adapter       {args.adapter}: {found.kind}")
    print(f"base          {found.base}")
    print(f"merged        {model_text(found.model, args.destination)}")
    if found.untied:
        print("note          head and input embedding, which shared a weight, have one each now")
    if found.uncarded:
        print(f"note          no model card was written: {found.uncarded}")
    return 0

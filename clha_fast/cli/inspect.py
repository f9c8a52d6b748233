"""`clha-fast inspect`: what it takes and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clha_fast.cli.columns import COLUMNS_HELP, take_columns
from clha_fast.cli.text import Parser, as_flags, check_positive, with_dashes
from clha_fast.data import FORMATS
from clha_fast.files import check_destination, write_text
from clha_fast.models.loading import config_positions, load_tokenizer
from clha_fast.objectives.clha import PUBLISHED, CLHAOptions
from clha_fast.reports.inspection import inspect_file
from clha_fast.reports.inspection_text import inspection_page, inspection_text

DESCRIPTION = (
    "What a file of ranked responses holds, before a model is trained on it: counts, lengths, reward gaps and a reward "
    "margin that fits, duplicates, columns that nobody reads, and with --model a few records token by token."
)
_LENGTHS = ("max_length", "max_prompt_length", "max_completion_length")


def inspect(words: Sequence[str]) -> int:
    """`clha-fast inspect`: the exit status.

    Raises:
        ValueError, OSError: a user error, in one sentence.
    """
    parser = Parser(prog="clha-fast inspect", description=DESCRIPTION, epilog=COLUMNS_HELP)
    parser.add_argument("source", metavar="FILE", help="ranked responses in any known format")
    parser.add_argument("--model", metavar="M", help="whose tokenizer and chat template: a folder, or a name")
    parser.add_argument("--html", metavar="PAGE.html", help="also write one page of HTML, which loads nothing")
    parser.add_argument("--format", default="auto", help=f"auto (default), {', '.join(FORMATS)}")
    parser.add_argument("--rank-by-reward", action="store_true", help="as in training")
    parser.add_argument("--records", type=int, metavar="N", help="records to show token by token (default 3; 0: none)")
    parser.add_argument("--limit", type=int, default=10_000, metavar="N", help="the first N records (default 10000)")
    for name in _LENGTHS:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, metavar="N", help="tokens, as in training")
    parser.add_argument(
        "--reward-margin",
        type=float,
        default=PUBLISHED.reward_margin,
        metavar="R",
        help="of the noise rule (3)",
    )
    parser.add_argument(
        "--reward-floor", type=float, default=PUBLISHED.reward_floor, metavar="R", help="of the SFT gate (default 0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace PAGE.html")
    parser.elsewhere["skip-bad-records"] = (
        "inspect always leaves bad records out, says how many there are and names the first"
    )
    words, columns = take_columns(words)
    args = parser.parse_args(with_dashes(words))
    check_positive(args, ("limit", *_LENGTHS))
    for name in _LENGTHS:
        if getattr(args, name) is not None and args.model is None:
            raise ValueError(f"--{name.replace('_', '-')}: expected --model, whose tokens these are, got none")
    records = 3 if args.records is None else args.records
    if records < 0:
        raise ValueError(f"--records: expected a whole number of at least 0, got {records}")
    if args.records and args.model is None:
        raise ValueError("--records: expected --model, whose tokens are shown, got none")
    if args.html is not None:
        check_destination(args.html, overwrite=args.overwrite)
    elif args.overwrite:
        raise ValueError("--overwrite: expected --html, whose file it is about, got none")
    objective = CLHAOptions(reward_margin=args.reward_margin, reward_floor=args.reward_floor)
    tokenizer = None if args.model is None else load_tokenizer(args.model, "model")
    found = inspect_file(
        args.source,
        objective,
        tokenizer,
        format=args.format,
        columns=columns,
        rank_by_reward=args.rank_by_reward,
        limits={name: getattr(args, name) for name in _LENGTHS},
        examples=records,
        most=args.limit,
        positions=None if args.model is None else config_positions(args.model),
    )
    found = replace(found, sentences=[*map(as_flags, found.sentences)])
    print(inspection_text(found, objective))
    if args.html is not None:
        write_text(args.html, inspection_page(found, objective))
        print(f"\npage          {args.html}")
    return 0

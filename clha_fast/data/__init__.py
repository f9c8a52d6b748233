"""Ranked responses: records, the formats they are published in, and files of them.

Nothing here imports torch or Hugging Face; `render_prompt` is handed the tokenizer it uses.
"""

from clha_fast.data.convert import ConvertCounts, convert
from clha_fast.data.formats import FORMATS
from clha_fast.data.readers import iter_records, read_records, record_from_row
from clha_fast.data.records import RankedRecord, RecordError, make_record
from clha_fast.data.rendering import plain_template, render_prompt

__all__ = [
    "FORMATS",
    "ConvertCounts",
    "RankedRecord",
    "RecordError",
    "convert",
    "iter_records",
    "make_record",
    "plain_template",
    "read_records",
    "record_from_row",
    "render_prompt",
]

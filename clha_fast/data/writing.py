"""Records as canonical JSON Lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from clha_fast.data.records import RankedRecord
from clha_fast.files import naming_full


def write_records(records: Iterable[RankedRecord], path: str) -> int:
    """Write one object a line, UTF-8; the file appears whole or not at all. How many there were."""
    partial = f"{path}.partial"
    count = 0
    with naming_full(path), open(partial, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record.as_dict(), ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    os.replace(partial, path)
    return count

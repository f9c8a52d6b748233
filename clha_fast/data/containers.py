"""Where rows come from: files of any kind, folders, globs and tables."""

from __future__ import annotations

import bz2
import contextlib
import errno
import glob
import gzip
import importlib
import lzma
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, cast

from clha_fast.data.delimited import delimited_rows
from clha_fast.data.encodings import PACKED, as_utf8
from clha_fast.data.hub import hub_files, is_hub_name
from clha_fast.data.jsonlines import json_rows
from clha_fast.data.records import RecordError, is_sequence

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_KINDS = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
    **{".csv": "csv", ".tsv": "tsv"},
}
_KNOWN = "JSON Lines, a JSON list, csv, tsv, parquet or arrow (each may be .gz, .bz2, .xz or .zst)"
_ROWS = 256  # of a table, made Python objects at a time


def rows_of(source: Source) -> Iterator[tuple[str, object]]:
    """(place, row) of every row; one that cannot be decoded is a RecordError, so that reading can go on.

    A file is taken for what its name says (csv, tsv, parquet, arrow, in any case) or its content (parquet, arrow, JSON
    Lines, a JSON list, an object around one), decompressed by its content.

    Raises:
        RecordError: damaged files, named; a kind that is not read. OSError: no such file. ImportError: what reads it is
            not installed.
    """
    if not isinstance(source, (str, os.PathLike)):
        yield from ((f"record {number}", row) for number, row in enumerate(table_rows(source)))
        return
    for path in files_of(source):
        yield from _folder_rows(path) if os.path.isdir(path) else _file_rows(path)


def files_of(source: str | os.PathLike[str]) -> list[str]:
    """The path, or those that match it as a glob, sorted; `~` is the home folder; `owner/name:split` is of the Hub.

    Raises:
        FileNotFoundError: there is none. Others: `hub.hub_files`.
    """
    path = os.path.expanduser(os.fspath(source))
    if os.path.lexists(path):
        return [path]
    if glob.has_magic(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if found:
            return found
        raise FileNotFoundError(errno.ENOENT, "expected files that match, found none", path)
    if is_hub_name(path):
        return hub_files(path)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def source_name(path: str) -> str:
    """How a source is called: a file by its name without folders, a data set of the Hub by its owner's and its own."""
    if not os.path.lexists(os.path.expanduser(path)) and is_hub_name(path):
        return path.partition(":")[0]
    return os.path.basename(path)


def table_rows(source: Any) -> Iterator[Any]:
    """The rows of a table: an iterable of them, a mapping of columns, a DataFrame, a table of arrow, one split.

    Raises:
        RecordError: several splits; columns of different lengths; one row where rows are expected.
    """
    module = type(source).__module__.partition(".")[0]
    if isinstance(source, Mapping):
        yield from _mapping_rows(source)
    elif module == "pandas":
        arrow = _need("pyarrow", "records", "a DataFrame")
        yield from _arrow_rows(arrow.Table.from_pandas(source, preserve_index=False).to_batches(_ROWS))
    elif module == "polars":
        yield from _arrow_rows(source.to_arrow().to_batches(_ROWS))
    elif module == "pyarrow":
        yield from _arrow_rows(source.to_batches())
    else:
        yield from source


def _mapping_rows(source: Mapping[str, Any]) -> Iterator[object]:
    if source and all(hasattr(split, "column_names") for split in source.values()):
        if len(source) > 1:
            expected = "one split of it, such as dataset['train']"
            raise RecordError.of("records", "", expected, f"splits {', '.join(source)}")
        yield from next(iter(source.values()))
        return
    columns = {
        name: value.tolist() if hasattr(value, "tolist") else value for name, value in source.items()
    }  # arrays, series
    if not all(is_sequence(value) for value in columns.values()):
        raise RecordError.of("records", "", "rows, or a mapping of columns (one row is [row])", dict(source))
    sizes = {name: len(value) for name, value in columns.items()}
    if len(set(sizes.values())) > 1:
        raise RecordError.of("records", "", "columns of one length (one row is [row])", sizes)
    for cells in zip(*columns.values(), strict=True):
        yield dict(zip(columns, cells, strict=True))


def _arrow_rows(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()


def _file_rows(path: str) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as file:
        head = file.read(6)
    compression = next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), "")
    name = path.lower()
    stem = next((name.removesuffix(suffix) for suffix in PACKED if name.endswith(suffix)), name)
    kind = _KINDS.get(os.path.splitext(stem)[1], "")
    if not kind and head.startswith((b"PAR1", b"ARROW1")):
        kind = "parquet" if head.startswith(b"PAR1") else "arrow"
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"7z\xbc\xaf", b"\x80\x04", b"\x80\x05")):
        message = f"{path}: expected {_KNOWN}, got an archive, a spreadsheet or a pickle"
        raise RecordError(message, source=path)
    with _opened(path, compression) as file:
        if not kind:
            yield from json_rows(as_utf8(file, path), path, compression)
            return
        if kind in ("csv", "tsv"):
            file = as_utf8(file, path)
        rows = {"parquet": _parquet_rows, "arrow": _ipc_rows, "csv": delimited_rows, "tsv": delimited_rows}[kind]
        number = 0
        try:
            for row in rows(file, path, kind):
                yield row.source if isinstance(row, RecordError) else f"{path}: row {number}", row
                number += 1
        except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
            if isinstance(error, RecordError):
                raise
            place = f" after row {number - 1}" if number else ""
            raise RecordError(f"{path}: damaged {kind} file{place} ({error})", source=path) from error


@contextlib.contextmanager
def _opened(path: str, compression: str) -> Iterator[IO[bytes]]:
    if compression == "zstd":
        arrow = _need("pyarrow", path, "zstd")
        with arrow.CompressedInputStream(arrow.OSFile(path), "zstd") as file:
            import io

            yield io.BufferedReader(cast("Any", file))
        return
    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    with cast("IO[bytes]", openers.get(compression, open)(path, "rb")) as file:
        yield file


def _need(module: str, path: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f"{path}: {what} needs {name}; pip install 'clha-fast[eval]' brings it") from error


def _parquet_rows(file: IO[bytes], path: str, kind: str) -> Iterator[dict[str, Any]]:
    with _need("pyarrow.parquet", path, kind).ParquetFile(_seekable(file, path)) as table:
        yield from _arrow_rows(table.iter_batches(batch_size=_ROWS))


def _ipc_rows(file: IO[bytes], path: str, kind: str) -> Iterator[dict[str, Any]]:
    """A file or a stream of arrow: feather writes the one, `datasets` the other."""
    arrow, ipc = _need("pyarrow", path, kind), _need("pyarrow.ipc", path, kind)
    found = _seekable(file, path)
    if isinstance(found, str):
        found = arrow.memory_map(found)
    try:
        reader = ipc.open_file(found)
    except arrow.ArrowInvalid:
        found.seek(0)
        yield from _arrow_rows(ipc.open_stream(found))
        return
    yield from _arrow_rows(reader.get_batch(number) for number in range(reader.num_record_batches))


def _seekable(file: IO[bytes], path: str) -> Any:
    """The path, where it is not compressed; otherwise all that is in it."""
    if getattr(file, "name", None) == path and type(file).__module__ == "_io":
        return path
    return importlib.import_module("pyarrow").BufferReader(file.read())


def _folder_rows(path: str) -> Iterator[tuple[str, object]]:
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))
    if not saved:
        expected = "a folder written by save_to_disk, or the files in it as a glob (folder/*.jsonl)"
        raise RecordError.of(path, "", expected, sorted(os.listdir(path))[:5])
    try:
        table = _need("datasets", path, "save_to_disk").load_from_disk(path)
        if isinstance(table, Mapping) and len(table) > 1:
            expected = f"the folder of one split, such as {os.path.join(path, next(iter(table)))}"
            raise RecordError.of(path, "", expected, f"splits {', '.join(table)}")
        rows = table_rows(table)
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows))
    except (OSError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path}: damaged folder of save_to_disk ({error})", source=path) from error

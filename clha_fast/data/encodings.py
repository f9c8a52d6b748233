"""Encodings of text files: UTF-8, or UTF-16 and UTF-32 with the mark that tells them; others are refused by name."""

from __future__ import annotations

import codecs
import io
import lzma
import os
import re
import shlex
import zlib
from typing import IO, Any, cast

from clha_fast.data.records import RecordError

# The longer marks begin with a shorter one.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_UNMARKED = {0: "UTF-16BE", 1: "UTF-16LE"}  # by which of the first two bytes, of an ASCII letter, is 0
# Ends of the names of compressed files.
PACKED = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 16
# What "surrogateescape" makes of a byte that is no UTF-8.
_ESCAPED = re.compile("[\udc80-\udcff]")


def as_utf8(file: IO[bytes], path: str) -> IO[bytes]:
    """The file's text in UTF-8, from its beginning, where a mark says that it is in UTF-16 or UTF-32.

    Raises:
        RecordError: UTF-16 without a mark; in reading, what is none.
    """
    try:
        head = cast("Any", file).peek(4)[:4]
    except (EOFError, OSError, zlib.error, lzma.LZMAError):  # damaged: whoever reads it says so
        return file
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            file.read(len(mark))
            return cast("IO[bytes]", io.BufferedReader(_Recoded(file, path, encoding)))
    zero = head[:2].find(b"\0")
    if zero >= 0 and len(head) > 1 and any(head[:2]):
        message = f"{path}:1: expected UTF-8, got what looks like UTF-16 without the mark that says so"
        raise RecordError(f"{message}; {_way(_UNMARKED[zero], path)}", source=path)
    return file


class _Recoded(io.RawIOBase):
    def __init__(self, file: IO[bytes], path: str, encoding: str) -> None:
        self._file, self._path, self._name = file, path, encoding[:6].upper()
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._lines = 1
        self._held = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held and not self._ended:
            read = self._file.read(_CHUNK)
            self._ended = not read
            try:
                text = self._decoder.decode(read, final=self._ended)
            except UnicodeDecodeError as error:
                message = f"{self._path}: behind line {self._lines}: invalid {self._name} ({error.reason})"
                raise RecordError(message, source=self._path) from error
            self._lines += text.count("\n")
            self._held = text.encode()
        part, self._held = self._held[: len(buffer)], self._held[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def escaped_byte(line: str) -> int | None:
    """The first byte of a line, decoded with "surrogateescape", that is no UTF-8."""
    found = None if line.isascii() else _ESCAPED.search(line)
    return None if found is None else ord(found[0]) - 0xDC00


def not_utf8(byte: int, path: str) -> str:
    """What is wrong with text that has such a byte, and the way out."""
    return f"invalid UTF-8 (byte 0x{byte:02x}), as in a file of another encoding; {_way('WINDOWS-1252', path)}"


def _way(encoding: str, path: str) -> str:
    plain, packed = os.path.splitext(path)
    unpacked = packed.lower() in PACKED
    name, end = os.path.splitext(plain if unpacked else path)
    old, new = shlex.quote(name + end), shlex.quote(f"{name}.utf8{end}")
    return f"if that is {encoding}, {'unpacked, ' * unpacked}iconv -f {encoding} -t UTF-8 {old} > {new} rewrites it"

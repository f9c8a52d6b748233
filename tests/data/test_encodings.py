"""Text files in UTF-16 and UTF-32 with their mark are read as those in UTF-8; other encodings are refused by name."""

from __future__ import annotations

import codecs
import gzip
import shlex
from pathlib import Path

import pytest

from clha_fast.data import RankedRecord, RecordError, read_records
from clha_fast.data.prompts import read_prompts

OBJECT = '{{"prompt": "{0}", "chosen": "b", "rejected": "c"}}'
TEXTS = {
    "a.jsonl": f"{OBJECT}\n\n{OBJECT.replace('{0}', 'a2')}\n",
    "a.json": f"[{OBJECT},\n {OBJECT.replace('{0}', 'a2')}]",
    "a.csv": 'prompt;chosen;rejected\r\n"{0}";b;c\r\na2;b;c\r\n',
    "a.tsv": "prompt\tchosen\trejected\r\n{0}\tb\tc\r\na2\tb\tc\r\n",
}
MARKS = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
MARKS |= {"utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}


@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize("name", TEXTS)
def test_marked_files_are_read(tmp_path: Path, name: str, encoding: str) -> None:
    prompt = "Größe 😀 \u010a, 說明 " * 9000  # pieces of the file end inside characters; U+010A holds a newline's byte
    prompt = prompt.strip()
    data = MARKS[encoding] + TEXTS[name].format(prompt).encode(encoding)
    expected = [RankedRecord(prompt, ("b", "c")), RankedRecord("a2", ("b", "c"))]
    (tmp_path / name).write_bytes(data)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        assert read_records(path) == expected
    assert [record.prompt for record in read_prompts(tmp_path / name)] == [prompt, "a2"]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_refused_by_name(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes(TEXTS[name].format("Größe").encode(encoding))
    single = not encoding.startswith("utf")
    line = 2 if single and name.endswith("sv") else 1
    place = f"{path}: line {line}" if name.endswith("sv") and single else f"{path}:{line}"
    with pytest.raises(RecordError) as caught:
        read_records(path)
    said = str(caught.value)
    assert said.startswith(place)
    assert ("invalid UTF-8 (byte 0xf6)" if single else "looks like UTF-16 without the mark") in said
    way = "WINDOWS-1252" if single else f"UTF-16{encoding[-2:].upper()}"
    assert f"iconv -f {way} -t UTF-8 {path} > {tmp_path / 'a.utf8'}{path.suffix} rewrites it" in said
    assert "damaged" not in said


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
@pytest.mark.parametrize(
    ("name", "packed"), [("my file.csv", ""), ("my file", ""), ("v1.2/a.jsonl", ".gz"), ("b", ".gz")]
)
def test_the_way_out_is_a_command_that_works(tmp_path: Path, name: str, packed: str, encoding: str) -> None:
    path, data = tmp_path / name, TEXTS["a.jsonl"].format("Größe").encode(encoding)
    path.parent.mkdir(exist_ok=True)
    given = tmp_path / f"{name}{packed}"
    given.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(RecordError) as caught:
        read_records(given)
    assert ("unpacked, " in str(caught.value)) is bool(packed)
    path.write_bytes(data)
    words = shlex.split(str(caught.value)[str(caught.value).index("iconv") :])
    assert words[:6] == ["iconv", "-f", words[2], "-t", "UTF-8", str(path)]
    assert words[6:9] == [">", str(path.with_name(f"{path.stem}.utf8{path.suffix}")), "rewrites"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_a_line_of_another_encoding_is_a_bad_record(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(TEXTS[name].format("Gr\udcf6\udcdfe").encode("utf-8", "surrogateescape"))
    errors: list[RecordError] = []
    assert read_records(path, errors=errors) == [RankedRecord("a2", ("b", "c"))]
    assert "invalid UTF-8 (byte 0xf6)" in str(errors[0])


def test_a_header_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("Größe,prompt,chosen,rejected\nx,a,b,c\n".encode("latin-1"))
    with pytest.raises(RecordError, match=r"a.csv: line 1: invalid UTF-8 \(byte 0xf6\)"):
        read_records(tmp_path / "a.csv", errors=[])


@pytest.mark.parametrize("name", TEXTS)
def test_utf16_that_breaks_off(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(MARKS["utf-16-le"] + TEXTS[name].format("a").encode("utf-16-le")[:-1])
    with pytest.raises(RecordError, match=rf"{name}: behind line \d: invalid UTF-16 \(truncated data\)"):
        read_records(tmp_path / name)

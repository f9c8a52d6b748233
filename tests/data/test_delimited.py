"""Lines of csv and tsv files that are no rows, numbers in front of them, and headers."""

from __future__ import annotations

import csv
import gzip
import itertools
from pathlib import Path

import pytest

from clha_fast.data import RankedRecord, RecordError, read_records
from clha_fast.data.notes import Notes


@pytest.mark.parametrize(
    ("places", "ending"),
    [
        *itertools.product([(0,), (1,), (0, 1, 2, 4)], ["\n", "\r\n"]),
        ((3999,), "\r\n"),  # behind the first block that is read
        ((4500, 8001), "\n"),
    ],
)
def test_lines_with_too_many_cells_are_bad_records(tmp_path: Path, places: tuple[int, ...], ending: str) -> None:
    path = tmp_path / "a.csv"
    lines = [f"q{number},a,b" + ",more" * (number in places) for number in range(max(places) + 3)]
    path.write_text(ending.join(["prompt,chosen,rejected", *lines, ""]), newline="")
    with pytest.raises(RecordError, match=rf"a.csv: line {places[0] + 2}: expected 3 cells, .* got 4; .* in quotes$"):
        read_records(path)
    errors: list[RecordError] = []
    found = read_records(path, errors=errors)
    assert [record.prompt for record in found] == [f"q{k}" for k in range(max(places) + 3) if k not in places]
    assert [error.source for error in errors] == [f"{path}: line {place + 2}" for place in places]
    assert found[-1].source == f"{path}: row {max(places) + 2}", "bad rows count"


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("a.csv", ["q,a,b,0,5,0,3", "q,c,d,0,7,0,1"], "line 2: expected 5 cells, one a name of the header, got 7"),
        ("a.csv", ["q,a,b,1,0,5"] * 3, "line 2: expected 5 cells, one a name of the header, got 6"),
        ("a.tsv", ["q,a\tb\tc\t1\t2\t3"], "line 2: expected 5 cells, one a name of the header, got 6"),
        ("a.csv", ["q,a,b,1,2", "q,c,d,0,7,0,1"], "line 3: expected 5 cells, one a name of the header, got 7"),
    ],
)
def test_rows_with_more_cells_than_the_header_has_names(tmp_path: Path, name: str, rows: list[str], said: str) -> None:
    """Their first cells were taken for no column's, and what stands behind for prompt and responses."""
    separator = "\t" if name.endswith("tsv") else ","
    header = separator.join(["prompt", "chosen", "rejected", "score_chosen", "score_rejected"])
    (tmp_path / name).write_text("\n".join([header, *rows, ""]))
    with pytest.raises(RecordError) as caught:
        read_records(tmp_path / name)
    quotes = "; a cell that holds a comma, or whatever else parts the cells, stands in quotes"
    assert str(caught.value) == f"{tmp_path / name}: {said}{quotes}"


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("rows", [1, 3, 600])
def test_row_numbers_without_a_name_are_no_cells(tmp_path: Path, rows: int, first: int) -> None:
    """As R's `write.table` has them."""
    lines = [f'"{first + number}","q{number}","a","b"' for number in range(rows)]
    (tmp_path / "a.csv").write_text("\n".join(['"prompt","chosen","rejected"', *lines, ""]))
    assert read_records(tmp_path / "a.csv") == [RankedRecord(f"q{number}", ("a", "b")) for number in range(rows)]


@pytest.mark.parametrize(("named", "first"), [(True, 0), (False, 0), (False, 1)])
@pytest.mark.parametrize("bad", [0, 1, 2, 300])
def test_row_numbers_beside_a_line_with_too_many_cells(tmp_path: Path, bad: int, first: int, named: bool) -> None:
    lines = [f"{first + number},q{number},a,b" + ",more" * (number == bad) for number in range(bad + 3)]
    header = ",prompt,chosen,rejected" if named else "prompt,chosen,rejected"
    (tmp_path / "a.csv").write_text("\n".join([header, *lines, ""]))
    notes, errors = Notes(), list[RecordError]()
    found = read_records(tmp_path / "a.csv", errors=errors, notes=notes)
    assert [record.prompt for record in found] == [f"q{number}" for number in range(bad + 3) if number != bad]
    assert [error.source for error in errors] == [f"{tmp_path / 'a.csv'}: line {bad + 2}"]
    assert notes.sentences() == []


def test_a_number_in_front_of_one_row_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n1,x,a,b\n2,a,b\n3,a,b\n")
    errors: list[RecordError] = []
    assert read_records(tmp_path / "a.csv", errors=errors) == [RankedRecord(k, ("a", "b")) for k in "23"]
    assert "line 2: expected 3 cells" in str(errors[0])


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_of_csv_are_those_of_the_file(tmp_path: Path, ending: str) -> None:
    """Cells that go over lines, and blank lines, count."""
    text = 'prompt,chosen,rejected\n\n"q\n1","a\n\nb",c\n \nq2,a,b,c\n"q\n3",a,b,c\nq4,a,b\n'
    (tmp_path / "a.csv").write_bytes(text.replace("\n", ending).encode())
    errors: list[RecordError] = []
    found = read_records(tmp_path / "a.csv", errors=errors)
    expected = [RankedRecord(f"q{ending}1", (f"a{ending}{ending}b", "c")), RankedRecord("q4", ("a", "b"))]
    assert (found, [error.source.rpartition(" ")[2] for error in errors]) == (expected, ["8", "9"])


def test_a_long_cell_and_a_quote_that_stays_open(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"prompt,chosen,rejected\nq,{'long ' * 30_000},b\n")
    assert len(read_records(tmp_path / "a.csv")[0].completions[0]) == 150_000
    assert csv.field_size_limit() == limit
    for tail in ('"a,b\nq3,a,b\n', '"a,b'):
        (tmp_path / "a.csv").write_text(f'prompt,chosen,rejected\n"q\n1",a,b\nq2,{tail}')
        with pytest.raises(RecordError, match=r"a.csv: damaged csv file \(a quote that opens in the row of line 4 is"):
            read_records(tmp_path / "a.csv", errors=[])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt;chosen;rejected\na, b;c;d\n"),
        ("b.csv", "prompt\tchosen\trejected\na, b\tc\td\n"),
        ("c.csv", 'prompt, chosen ,rejected\n"a, b",c,d\n'),
        ("d.tsv", "prompt \tchosen\trejected\na, b\tc\td\n"),
        ("e.csv", 'prompt,"chosen",rejected\r\n"a, b",c,d\r\n'),
    ],
)
def test_headers_of_csv_as_they_are_written(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_records(tmp_path / name) == [RankedRecord("a, b", ("c", "d"))]
    with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
        file.write(text)
    assert read_records(tmp_path / f"{name}.gz") == [RankedRecord("a, b", ("c", "d"))]


def test_names_that_differ_by_blanks_alone_stay(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,prompt ,chosen,rejected\na,x,c,d\n")
    assert read_records(tmp_path / "a.csv") == [RankedRecord("a", ("c", "d"))]


@pytest.mark.parametrize("cell", ['"Yes," he said.', '"Hi" there', r'"Hi \"x\" there"', '"" he said', '"a" '])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_quotes_that_are_not_written_twice_are_no_row(tmp_path: Path, cell: str, separator: str) -> None:
    """They went out of the text, in silence, and at times a separator with them."""
    path = tmp_path / "a.csv"
    good = RankedRecord("say", ('"Yes," he said', "no"))
    lines = [("prompt", "chosen", "rejected"), ("say", cell, "no"), ("say", '"""Yes,"" he said"', "no")]
    path.write_text("".join(f"{separator.join(line)}\n" for line in lines))
    with pytest.raises(RecordError, match=r"a.csv: line 2: expected the cell to end with the quote that closes it"):
        read_records(path)
    errors: list[RecordError] = []
    assert read_records(path, errors=errors) == [good]
    assert len(errors) == 1

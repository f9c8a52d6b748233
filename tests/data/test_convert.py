"""Conversion is lossless and leaves either the whole new file or what was there before."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clha_fast.data import RankedRecord, RecordError, convert, read_records

RRHF = {"query": "Wörum?", "responses": ["low", "high"], "scores": [-1, 2]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_writes_canonical_lines_and_counts(tmp_path):
    source = write(tmp_path / "rrhf.jsonl", [RRHF, {**RRHF, "responses": ["a", "b"]}])
    counts = convert(source, tmp_path / "out.jsonl")
    assert (counts.records, counts.completions, counts.with_rewards, counts.skipped) == (2, 4, 2, 0)
    first = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert first == '{"prompt": "Wörum?", "completions": ["high", "low"], "rewards": [2.0, -1.0]}'
    assert names(tmp_path) == ["out.jsonl", "rrhf.jsonl"]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), min_size=1
)


@st.composite
def records(draw):
    completions = draw(st.lists(texts, min_size=1, max_size=4))
    size = len(completions)
    rewards = draw(st.none() | st.lists(st.floats(-1e30, 1e30), min_size=size, max_size=size))
    return RankedRecord(
        draw(texts | messages.map(tuple)),
        tuple(completions),
        None if rewards is None else tuple(rewards),
        draw(st.integers(0, size - 1)),
        subset=draw(texts | st.just("")),
    )


@given(st.lists(records(), min_size=1, max_size=4))
def test_round_trip(tmp_path_factory, expected):
    folder = tmp_path_factory.mktemp("round_trip")
    convert([record.as_dict() for record in expected], folder / "a.jsonl")
    convert(folder / "a.jsonl", folder / "b.jsonl")
    assert read_records(folder / "b.jsonl") == expected


def test_existing_file_is_refused_unless_asked_for(tmp_path):
    source = write(tmp_path / "rrhf.jsonl", [RRHF])
    before = source.read_bytes()
    with pytest.raises(FileExistsError, match=r"rrhf\.jsonl: exists already"):
        convert(source, source)
    assert source.read_bytes() == before
    assert convert(source, source, overwrite=True).records == 1
    assert read_records(source, "canonical")[0].completions == ("high", "low")
    assert names(tmp_path) == ["rrhf.jsonl"]


def test_failure_keeps_what_was_there(tmp_path):
    source = write(tmp_path / "rrhf.jsonl", [RRHF, {**RRHF, "scores": [1]}])
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    with pytest.raises(RecordError, match=r"rrhf\.jsonl:2: scores: expected 2 numbers"):
        convert(source, target, overwrite=True)
    assert target.read_text() == "old"
    target.unlink()
    with pytest.raises(RecordError):
        convert(source, target)
    assert names(tmp_path) == ["rrhf.jsonl"]


def test_full_disk_keeps_what_was_there(tmp_path, full_disk):
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    with full_disk(limit=4096), pytest.raises(OSError, match="File too large"):
        convert([{**RRHF, "query": "long " * 2000}] * 3, target, overwrite=True)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["out.jsonl"]


def test_bad_records_can_be_left_out(tmp_path):
    source = write(tmp_path / "rrhf.jsonl", [RRHF, {**RRHF, "scores": [1]}, RRHF])
    errors = []
    counts = convert(source, tmp_path / "out.jsonl", errors=errors)
    assert (counts.records, counts.skipped) == (2, 1)
    assert errors[0].source == f"{source}:2"


@pytest.mark.parametrize(
    ("rows", "skip", "lost"),
    [
        ([RRHF], False, None),
        ([{"prompt": "a", "completions": ["b", "c"]}], True, None),
        ([{**RRHF, "id": 7}, RRHF], False, "the columns id, which nobody reads"),
        ([{**RRHF, "id": 7, "origin": "web"}], False, "the columns id, origin, which nobody reads"),
        ([RRHF, {**RRHF, "scores": [1]}], True, "1 bad records"),
        ([{**RRHF, "id": 7}, {**RRHF, "scores": [1]}], True, "the columns id, which nobody reads and 1 bad records"),
    ],
)
@pytest.mark.parametrize("way", ["path", "link", "pattern"])
def test_a_file_over_itself_loses_nothing(tmp_path, rows, skip, lost, way):
    source = target = write(tmp_path / "rrhf.jsonl", rows)
    if way == "link":
        source = tmp_path / "link.jsonl"
        source.symlink_to(target)
    if way == "pattern":
        source = tmp_path / "rr*.jsonl"
    before = target.read_bytes()
    if lost is None:
        convert(source, target, overwrite=True, errors=[] if skip else None)
        assert read_records(target, "canonical")
        return
    with pytest.raises(ValueError, match=rf"^destination: expected another file than the source, which has {lost}, "):
        convert(source, target, overwrite=True, errors=[] if skip else None)
    assert target.read_bytes() == before
    convert(source, tmp_path / "new.jsonl", errors=[] if skip else None)
    assert not [name for name in names(tmp_path) if "partial" in name]


@pytest.fixture
def full_disk():
    """Writes past `limit` bytes of a file fail, by the kernel's own file size limit."""
    import contextlib
    import resource
    import signal

    @contextlib.contextmanager
    def limited(limit):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    return limited

"""Files that cannot be written are refused under the name that was given, before a model or a record is read."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from clha_fast.cli import main as cli
from clha_fast.files import check_destination, try_folder_of, write_json, write_lines, write_text
from clha_fast.training import samples
from tests.support.command_line import one_sentence

# A name that a file may have, but for what is written beside it.
LONG = "x" * 250


@pytest.mark.parametrize("ending", ["inside", "folder", "long"])
@pytest.mark.parametrize(
    "words",
    [
        "eval absent.jsonl --references absent --out OUT.json",
        "eval --model absent --references absent --out OUT.json",
        "compare absent absent --references absent --out OUT.json",
        "inspect absent --html OUT.html",
        "generate absent absent OUT.jsonl",
        "rank absent absent OUT.jsonl",
        "score absent OUT.jsonl --policy absent",
    ],
)
def test_tried_first(words: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    command = words.split()
    (place,) = (k for k, word in enumerate(command) if word.startswith("OUT"))
    suffix = Path(command[place]).suffix
    names = {"inside": f"file/out{suffix}", "folder": "folder", "long": LONG[: 255 - len(suffix)] + suffix}
    out = str(tmp_path / names[ending])
    command[place] = out
    assert cli.main(command) == cli.USER_ERROR
    said = {
        "inside": f"expected an existing folder, got {tmp_path / 'file'}",
        "folder": "expected a file, got a folder",
        "long": os.strerror(errno.ENAMETOOLONG),
    }
    if "eval --model" in words and ending != "folder":  # the answers come first
        out = f"{out.removesuffix('.json')}.answers.jsonl"
    assert one_sentence(capsys) == f"clha-fast {command[0]}: {out}: {said[ending]}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("write", [write_json, write_text, partial(write_lines, overwrite=True)])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str, write: Callable[[str, str], None]) -> None:
    path = str(tmp_path / "out")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
    else:
        os.symlink(os.devnull, path)
    before = os.lstat(path).st_mode
    for refuse in (write, lambda name, _: check_destination(name, overwrite=True)):
        with pytest.raises(OSError, match=f"^{path}: expected a file, or a name that is free, got a device, a pipe"):
            refuse(path, "")
    assert os.lstat(path).st_mode == before
    assert os.listdir(tmp_path) == ["out"]


def test_processes_of_one_number_try_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two machines that share a folder: the other's try may be gone, and take this one's away."""
    path, unlink = str(tmp_path / "out"), os.unlink

    def twice(name: str) -> None:
        unlink(name)
        unlink(name)

    monkeypatch.setattr(os, "unlink", twice)
    try_folder_of(path)
    assert os.listdir(tmp_path) == []


def test_a_picture_is_tried_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = str(tmp_path / f"{LONG}.png")
    words = ["score", "absent", str(tmp_path / "out.jsonl"), "--reward-model", "absent", "--plot", plot]
    assert cli.main(words) == cli.USER_ERROR
    assert one_sentence(capsys) == f"clha-fast score: {plot}: {os.strerror(errno.ENAMETOOLONG)}\n"


def test_errors_name_the_file_that_was_given(tmp_path: Path) -> None:
    """Not the one beside it, that is renamed to it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    kinds = {"folder": IsADirectoryError, "file/out": NotADirectoryError, "no/out": FileNotFoundError}
    for name, kind in kinds.items():
        path = str(tmp_path / name)
        writes: list[Callable[[str], None]] = [
            lambda path: write_text(path, "text"),
            lambda path: write_json(path, {}),
            lambda path: write_lines(path, [{}], overwrite=True),
        ]
        for write in writes:
            with pytest.raises(kind) as caught:
                write(path)
            assert (caught.value.filename, caught.value.filename2) == (path, None)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError) as caught:
            check_destination(tmp_path / "out.json")
    finally:
        tmp_path.chmod(0o700)
    assert caught.value.filename == str(tmp_path / "out.json")


@pytest.mark.parametrize("what", ["convert", "parts", "samples"])
def test_no_room_is_said_of_the_file(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file that may have no more than so many bytes, as of a full disk; what was there is left."""
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows = [{"prompt": f"prompt {k}", "completions": ["a " * 400, "b " * 400], "rewards": [1, 0]} for k in range(300)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.mkdir()
    target = out / {"convert": "a.jsonl", "parts": "ranked", "samples": "samples.jsonl"}[what]
    lines = [{"step": 1, "index": k, "prompt": "p", "completion": "c " * 400} for k in range(300)]
    if what == "samples":
        samples.write(str(out), [{"step": 0}])
    before = sorted(out.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        if what == "samples":
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as raised:
                samples.write(str(out), lines)
            said = f"{raised.value.filename}: {raised.value.strerror}"
        else:
            words = ["convert", str(source), str(target)]
            if what == "parts":
                words = ["prepare", "ranked", str(source), str(target), "--test", "0.2", "--dev", "0.1"]
            assert cli.main(words) != 0
            said = one_sentence(capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{target}: {os.strerror(errno.EFBIG)}" in said
    assert sorted(out.rglob("*.*")) == before
    if what == "samples":
        assert target.read_text() == '{"step": 0}\n'

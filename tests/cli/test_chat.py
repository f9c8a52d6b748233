"""`clha-fast generate --chat` through a pipe, in a process of its own, and what is refused."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import sys
from pathlib import Path

import pytest

from clha_fast.cli import main as cli
from tests.support import forked
from tests.support.command_line import one_sentence
from tests.support.reward_models import TOKENIZER, write
from tests.support.scripted import scripted

POSITIONS = 1408
LONG = 600  # seconds, on a machine that is busy with other things


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """It says "a cat" whenever it is asked in few words, and never ends where the prompt is longer."""
    path = str(tmp_path_factory.mktemp("model"))
    positions, short = POSITIONS, len(TOKENIZER("ab")["input_ids"])
    cat, word = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in ("a cat", " dog"))
    script = {short - 1 + k: token for k, token in enumerate(cat)}
    script |= dict.fromkeys(range(short + len(cat), positions), word[0])
    scripted(TOKENIZER, script, positions).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


# Shells start background jobs, such as a test run, with this signal ignored, and what those start inherits that.
CHAT = """
import os, signal, sys
for number, name in enumerate(sys.argv[1:3]):
    os.dup2(os.open(name, (os.O_RDONLY, os.O_WRONLY)[number]), number)
signal.signal(signal.SIGINT, signal.default_int_handler)
from clha_fast.cli.main import main
sys.exit(main(sys.argv[3:]))
"""


def test_ctrl_c_ends_an_answer_and_further_lines_are_answered_through_a_pipe(model: str, tmp_path: Path) -> None:
    """In one process; what stands behind /quit is not read."""
    pipes = [str(tmp_path / name) for name in ("in", "out")]
    for pipe in pipes:
        os.mkfifo(pipe)
    words = ["generate", model, "--chat", "--device", "cpu", "--no-history", "--max-new-tokens", "1300"]
    process = forked.start("train", "-c", CHAT, *pipes, *words, out=tmp_path / "said", CUDA_VISIBLE_DEVICES="")
    with open(pipes[0], "w") as lines, open(pipes[1], "rb", buffering=0) as shown:
        # The whole answer does not fit this: it waits to be read, and is not over before the signal comes.
        fcntl.fcntl(shown, fcntl.F_SETPIPE_SZ, 4096)
        print("a longer line than the other", file=lines, flush=True)
        assert os.read(shown.fileno(), 8), "it is being answered"
        os.kill(process.pid, signal.SIGINT)
        lines.write("ab\n\n/what\n/reset\nab\n/quit\nab\n")
        lines.close()
        out = shown.read().decode()
    err = (tmp_path / "said.err").read_text()
    assert process.wait(LONG) == 0, err
    assert "(interrupted)" in err
    answer, *others = out.splitlines()
    assert others == ["a cat", "a cat"]
    assert len(answer) < 1290 * len(" dog")
    assert "model         " in err
    assert "/what: expected one of /reset, /quit, /help; nothing was sent" in err
    assert "(the conversation begins anew)" in err


def test_the_end_of_the_file_ends_it(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n"))
    assert cli.main(["generate", model, "--chat", "--device", "cpu", "--no-history"]) == 0
    assert capsys.readouterr().out == "a cat\n"


def test_what_is_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(write(tmp_path / "in.jsonl", [{"prompt": "say"}]))
    for words, expected in (
        ((model, rows, "--chat"), "PROMPTS: expected none with --chat"),
        ((model, "--chat", "--batch-size", "3"), "--batch-size: expected none with --chat"),
        ((model, "--chat", "--columns.prompt", "q"), "--columns: expected none with --chat"),
        ((model, rows), "OUT: expected PROMPTS and OUT, two files, or --chat, got no OUT"),
        ((model, rows, "out", "--system", "be kind"), "--system: expected none without --chat"),
        ((model, "--chat", "--no-history", "--system", "be kind"), "--system: expected none with --no-history"),
    ):
        assert cli.main(["generate", *words]) == 2
        assert expected in one_sentence(capsys), words

"""Who may import whom: the files' imports against the design's table, and the package without its optional parts."""

from __future__ import annotations

import ast
import contextlib
import functools
import sys

import pytest

from tests.support import forked
from tests.support.helpers import ROOT

# Room -> rooms that it may import, lowest first. docs/design.md says what each knows; a room of its own is a folder, a
# folder of `backends/`, or a file at the top of `clha_fast/`.
BASE = ("errors", "version", "messages", "files", "processes", "options", "types", "layout")
MODEL_ROOMS = ("models", "batching", "data")
RUN_ROOMS = ("experiments", "reports", "evaluation", "generation", "rewards", "training")
ROOMS: dict[str, tuple[str, ...]] = {
    "csrc_triton": (),
    **dict.fromkeys(("errors", "version", "messages", "files", "options", "types", "layout"), ()),
    "processes": ("files",),
    "objectives": ("options", "types", "layout"),
    "reference": ("objectives", "options", "types"),
    "backends": ("objectives", "options", "types", "layout"),
    "backends/torch": ("backends", "objectives", "options", "types", "layout"),
    "backends/triton": ("csrc_triton", "backends", "objectives", "errors", "options", "types", "layout"),
    "ops": ("backends", "objectives", "errors", "options", "types"),
    "functional": ("backends/torch", "reference", "ops", "objectives", "options", "types"),
    "modules": ("functional", "ops", "objectives", "options", "types"),
    "data": ("files",),
    "batching": ("data", "objectives", *BASE),
    "models": ("batching", "data", "functional", "ops", "objectives", *BASE),
    "planning": ("models", "batching", "ops", "backends", *BASE),
    "rewards": ("models", "batching", "data", "objectives", *BASE),
    "generation": ("models", "batching", "data", *BASE),
    "training": ("generation", "rewards", "models", "batching", "data", "functional", "ops", "objectives", *BASE),
    "evaluation": ("generation", "rewards", *MODEL_ROOMS, "reference", "functional", "objectives", *BASE),
    "reports": ("evaluation", *MODEL_ROOMS, "objectives", *BASE),
    "experiments": (*RUN_ROOMS[1:], *MODEL_ROOMS, "ops", "objectives", *BASE),
    "face": ("models", "functional", "modules", "objectives", *BASE),
    "integrations": ("training", *MODEL_ROOMS, "functional", "ops", "objectives", *BASE),
    "hf": ("training", "rewards", "models", "batching"),
    "demo": (),
    "cli": (*RUN_ROOMS, "planning", "models", "batching", "data", "ops", "objectives", *BASE),
    "__main__": ("cli",),
}
# Third-party packages that a room must not import, anywhere in its files.
MODELS = ("transformers", "tokenizers", "datasets", "accelerate", "safetensors", "huggingface_hub", "peft")
WITHOUT = {
    "csrc_triton": ("torch", *MODELS),
    **dict.fromkeys(("objectives", "reference", "backends", "backends/torch", "ops"), ("triton", *MODELS)),
    **dict.fromkeys(("functional", "modules", "face", *BASE), ("triton", "transformers", "datasets", "accelerate")),
    "backends/triton": MODELS,
    "data": ("torch", *MODELS),
}
FILES = sorted(
    path.relative_to(ROOT).as_posix() for top in ("clha_fast", "csrc_triton") for path in (ROOT / top).rglob("*.py")
)
TEST_FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))


@functools.cache
def imports(file: str, programs: bool = False) -> frozenset[str]:
    """Dotted names that a file imports at any depth; `from a import b` counts as a and a.b.

    With `programs` also what its strings import that are Python themselves.
    """
    names: set[str] = set()
    trees = [ast.parse((ROOT / file).read_text(encoding="utf-8"))]
    while trees:
        for node in ast.walk(trees.pop()):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}: a relative import"
                assert node.module
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif programs and isinstance(node, ast.Constant) and isinstance(node.value, str):
                with contextlib.suppress(SyntaxError, ValueError):
                    trees.append(ast.parse(node.value))
    return frozenset(names)


MODULES = {file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): file for file in FILES}


def room_of(file: str) -> str:
    first, *inner = file.split("/")
    if first == "csrc_triton":
        return first
    if len(inner) == 1:
        name = inner[0].removesuffix(".py")
        return "face" if name == "__init__" else name
    return f"backends/{inner[1]}" if inner[0] == "backends" and len(inner) > 2 else inner[0]


def imported_files(file: str) -> set[str]:
    """Files of the project that a file imports; `from a import b` is b where that is a module, else a."""
    names = imports(file)
    return {
        MODULES[name]
        for name in names
        if name in MODULES and not any(other.startswith(f"{name}.") for other in names & MODULES.keys())
    }


def upward(file: str, target: str) -> bool:
    ours, theirs = room_of(file), room_of(target)
    return ours != theirs and theirs not in ROOMS[ours]


def test_every_file_has_a_room_and_every_room_a_file():
    assert {room_of(file) for file in FILES} == set(ROOMS)


def test_imports_follow_the_table():
    assert {(file, target) for file in FILES for target in imported_files(file) if upward(file, target)} == set()
    without = {
        (file, top)
        for file in FILES
        for top in {name.split(".")[0] for name in imports(file)} & set(WITHOUT.get(room_of(file), ()))
    }
    assert without == set()


def test_the_table_has_no_circle():
    below: dict[str, set[str]] = {}

    def depth(room: str, above: tuple[str, ...]) -> set[str]:
        assert room not in above, " -> ".join((*above, room))
        if room not in below:
            below[room] = set().union(*(depth(other, (*above, room)) | {other} for other in ROOMS[room]), set())
        return below[room]

    for room in ROOMS:
        depth(room, ())


def test_files_import_in_no_circle():
    done: set[str] = set()

    def visit(file: str, above: tuple[str, ...]) -> None:
        assert file not in above, " -> ".join((*above, file))
        if file not in done:
            for target in imported_files(file):
                visit(target, (*above, file))
            done.add(file)

    for file in FILES:
        visit(file, ())


def test_files_can_be_read_in_one_sitting():
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in (*FILES, *TEST_FILES)}
    assert {file: count for file, count in lines.items() if count > 450} == {}


def test_the_noise_rule_stands_in_three_places():
    """The reference, the objectives' pairs and the kernel: whoever needs it elsewhere calls one of them."""
    compares = {
        file
        for file in FILES
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and {"reward_margin"} & {name(part) for part in node.comparators}
    }
    assert compares == {"clha_fast/reference/objectives.py", "clha_fast/objectives/pairs.py", "csrc_triton/clha.py"}


def name(node: ast.expr) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def test_backends_are_told_apart():
    """The rules above see what they are meant to see."""
    assert upward("clha_fast/objectives/clha.py", "clha_fast/backends/sweep.py")
    assert upward("csrc_triton/clha.py", "clha_fast/types.py")
    assert upward("clha_fast/training/trainer.py", "clha_fast/cli/main.py")
    assert not upward("clha_fast/training/trainer.py", "clha_fast/models/forward.py")
    assert "csrc_triton/combine.py" in imported_files("clha_fast/backends/triton/combine.py")


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("csrc_triton/")])
def test_kernel_files_import_triton_only(file):
    tops = {name.split(".")[0] for name in imports(file)}
    assert tops <= {"triton", "csrc_triton"} | set(sys.stdlib_module_names)


def test_importing_loads_nothing_optional():
    out = forked.output(
        "bare",
        """
import sys
import torch
before = set(sys.modules)
import clha_fast
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(names & {"triton", "csrc_triton", "transformers", "tokenizers", "datasets", "accelerate", "matplotlib"}))
print(sorted(name for name in sys.modules if name.startswith("clha_fast.backends.")))
""",
    )
    # Of the backends nothing but what one is chosen by: a count of bytes, and which products there are.
    assert out.split("\n")[:2] == ["[]", "['clha_fast.backends.memory', 'clha_fast.backends.products']"]


def test_it_works_without_triton_and_transformers():
    out = forked.output(
        "bare",
        """
import sys
for name in ("triton", "transformers", "tokenizers", "accelerate", "datasets", "matplotlib", "yaml"):
    sys.modules[name] = None
import torch
import clha_fast
from clha_fast import CLHALoss, token_logps

hidden = torch.zeros(2, 3, requires_grad=True)
weight = torch.zeros(5, 3)
loss, metrics = CLHALoss()(hidden, weight, torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([2]))
loss.backward()
print(round(float(loss), 4), hidden.grad.shape, metrics.as_dict()["kept_pair_share"])
print(token_logps(hidden, weight, torch.tensor([0, 1])).shape)
import clha_fast.data
import clha_fast.batching.batch
""",
    )
    # Uniform over five words: h = 3, SFT 0.05 * log 5 = 0.0805.
    assert out.splitlines() == ["3.0805 torch.Size([2, 3]) 1.0", "torch.Size([2])"]

"""Who may import whom: the files' imports against the design's table, and the package without its optional parts."""

from __future__ import annotations

import ast
import contextlib
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support.helpers import ROOT, run_python

# Third-party and own modules that no file of the pattern imports, anywhere in it.
KERNELS = ("triton", "csrc_triton", "clha_fast.backends.triton.backend")
TORCH_BACKEND = ("clha_fast.backends.torch.backend", "clha_fast.objectives.clha")
WORKSPACE_BACKEND = (
    "clha_fast.backends.triton.workspace",
    "clha_fast.backends.triton.clha",
    "clha_fast.backends.triton.softmax",
)
BACKENDS = (*KERNELS, *TORCH_BACKEND, *WORKSPACE_BACKEND, "clha_fast.ops.head")
ABOVE = (
    "clha_fast.hf",
    "clha_fast.data",
    "clha_fast.batching.batch",
    "clha_fast.cli.main*",
    "clha_fast.evaluation.memory",
    "clha_fast.evaluation.tables",
)
MODELS = ("transformers", "tokenizers", "datasets", "accelerate", "safetensors", "huggingface_hub")
CORE = ("auto", "checks", "dispatch", "errors", "functional", "inputs", "metrics", "modules", "ops", "options")
FORBIDDEN = {
    "clha_fast/reference.py": (*BACKENDS, *ABOVE, *MODELS, "clha_fast.ops.dispatch", "clha_fast.functional"),
    "clha_fast/torch_*.py": (*KERNELS, *ABOVE, *MODELS, "clha_fast.ops.head", "clha_fast.reference"),
    "clha_fast/token_loss.py": (*KERNELS, *ABOVE, *MODELS, "clha_fast.ops.head", "clha_fast.reference"),
    "clha_fast/backends/triton/workspace.py": (
        "triton",
        "csrc_triton",
        "clha_fast.backends.triton.backend",
        "clha_fast.backends.triton.backward",
        *TORCH_BACKEND,
        *ABOVE,
        *MODELS,
        "clha_fast.ops.head",
        "clha_fast.reference",
    ),
    "clha_fast/layout.py": (*BACKENDS, *ABOVE, *MODELS, "clha_fast.reference"),
    "clha_fast/backends/torch/vocab_parallel.py": (*KERNELS, *ABOVE, *MODELS, "clha_fast.reference"),
    "clha_fast/triton_*.py": (*TORCH_BACKEND, *ABOVE, *MODELS, "clha_fast.ops.head", "clha_fast.reference"),
    **{f"clha_fast/{name}.py": (*ABOVE, *MODELS, "matplotlib") for name in CORE},
    "clha_fast/batching/batch.py": (*BACKENDS, *MODELS, "clha_fast.hf"),
    "clha_fast/data/*.py": (*BACKENDS, *MODELS, "clha_fast.hf", "clha_fast.functional"),
    "clha_fast/hf/*.py": (*BACKENDS, "clha_fast.cli.main*"),
    "clha_fast/cli*.py": BACKENDS,
    "clha_fast/__main__.py": BACKENDS,
    "clha_fast/evaluation/memory.py": BACKENDS,
    "clha_fast/evaluation/tables.py": (*BACKENDS, *MODELS),
}
FILES = sorted(
    path.relative_to(ROOT).as_posix() for top in ("clha_fast", "csrc_triton") for path in (ROOT / top).rglob("*.py")
)
TEST_FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))


def imports(file: str, programs: bool = False) -> set[str]:
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
    return names


def breaches(file: str, forbidden: tuple[str, ...]) -> set[str]:
    return {name for name in imports(file) for f in forbidden if fnmatch(name, f) or fnmatch(name, f"{f}.*")}


def test_every_rule_has_files():
    for pattern in FORBIDDEN:
        assert any(fnmatch(file, pattern) for file in FILES), pattern


@pytest.mark.parametrize("file", FILES)
def test_imports_follow_the_table(file):
    for pattern, forbidden in FORBIDDEN.items():
        if fnmatch(file, pattern):
            assert breaches(file, forbidden) == set(), pattern


def test_the_triton_backend_alone_knows_the_kernels():
    knowing = {
        file for file in FILES if not file.startswith("csrc_triton/") and breaches(file, ("triton", "csrc_triton"))
    }
    assert "clha_fast/backends/triton/backend.py" in knowing
    assert {file for file in knowing if not fnmatch(file, "clha_fast/triton_*.py")} == set()


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("csrc_triton/")])
def test_kernel_files_import_triton_only(file):
    tops = {name.split(".")[0] for name in imports(file)}
    assert tops <= {"triton", "csrc_triton"} | set(sys.stdlib_module_names)


def test_backends_are_told_apart():
    """The rules above see what they are meant to see."""
    assert "csrc_triton.clha" in imports("clha_fast/backends/triton/backend.py")
    assert breaches("clha_fast/backends/triton/backend.py", ("csrc_triton",))
    assert breaches("clha_fast/training/trainer.py", ("transformers",))
    assert breaches("clha_fast/cli/main.py", ("clha_fast.cli.main*",))
    assert not breaches("clha_fast/backends/triton/backend.py", ("triton",))


@pytest.mark.parametrize("file", TEST_FILES)
def test_no_test_file_is_imported(file):
    """What two of them need stands in tests/support; a program in a string counts as its file."""
    assert {name for name in imports(file, programs=True) if name.split(".")[-1].startswith("test_")} == set()


def test_importing_loads_nothing_optional(tmp_path: Path):
    out = run_python(
        """
import sys
import torch
before = set(sys.modules)
import clha_fast
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(names & {"triton", "csrc_triton", "transformers", "tokenizers", "datasets", "accelerate", "matplotlib"}))
print(sorted(name for name in sys.modules if name.startswith("clha_fast") and "backend" in name))
""",
        cwd=tmp_path,
    )
    assert out.split("\n")[:2] == ["[]", "[]"]


def test_it_works_without_triton_and_transformers(tmp_path: Path):
    out = run_python(
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
        cwd=tmp_path,
    )
    # Uniform over five words: h = 3, SFT 0.05 * log 5 = 0.0805.
    assert out.splitlines() == ["3.0805 torch.Size([2, 3]) 1.0", "torch.Size([2])"]

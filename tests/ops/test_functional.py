"""The public face: error messages, choice of backend, autocast, the module."""

from __future__ import annotations

import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch

from clha_fast import BackendError, CLHALoss, CLHAOptions, HeadOptions, linear_clha_loss, token_logps
from clha_fast.backends.memory import Workspace
from clha_fast.ops import dispatch
from tests.support import forked
from tests.support.helpers import IGNORE, make_case

BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])
I64 = torch.int64


def small(**settings):
    """Two prompts of two candidates, 8 tokens, H = 4, V = 7."""
    return make_case([2, 1, 3, 2], [2, 2], hidden_size=4, vocab_size=7, **settings)


# What is changed, and the whole message: argument, expected, got.
HEAD_ERRORS = [
    ({"hidden": torch.zeros(8)}, "hidden: expected a floating tensor [M, H], got [8] float32 on cpu"),
    ({"hidden": torch.zeros(8, 4, dtype=I64)}, "hidden: expected a floating tensor [M, H], got [8, 4] int64 on cpu"),
    (
        {"hidden": torch.zeros(2, 4, 4)},
        "hidden: expected a floating tensor [M, H] (hidden.flatten(0, -2), with targets to match), got [2, 4, 4] "
        "float32 on cpu",
    ),
    ({"weight": torch.zeros(7, 5)}, "weight: expected [V, H = 4] with V > 0, got [7, 5] float32 on cpu"),
    ({"weight": torch.zeros(0, 4)}, "weight: expected [V, H = 4] with V > 0, got [0, 4] float32 on cpu"),
    (
        {"weight": torch.zeros(7, 4, dtype=torch.bfloat16)},
        "weight: expected hidden's dtype float64 (cast one, or use torch.autocast), got [7, 4] bfloat16 on cpu",
    ),
    (
        {"weight": torch.zeros(7, 4, dtype=torch.float64, device="meta")},
        "weight: expected hidden's device cpu, got [7, 4] float64 on meta",
    ),
    (
        {"bias": torch.zeros(6, dtype=torch.float64)},
        "bias: expected [V = 7] of hidden's dtype and device, got [6] float64 on cpu",
    ),
    ({"bias": torch.zeros(7)}, "bias: expected [V = 7] of hidden's dtype and device, got [7] float32 on cpu"),
    ({"targets": torch.zeros(8, dtype=torch.int32)}, "targets: expected int64, got [8] int32 on cpu"),
    (
        {"targets": torch.zeros(9, dtype=I64)},
        "targets: expected integers of shape [N = 8], or a row_index, got [9] int64 on cpu",
    ),
    (
        {"targets": torch.zeros(8, 1, dtype=I64)},
        "targets: expected integers of shape [N = 8], or a row_index, got [8, 1] int64 on cpu",
    ),
    (
        {"targets": torch.zeros(8, dtype=I64, device="meta")},
        "targets: expected hidden's device cpu, got [8] int64 on meta",
    ),
    ({"row_index": torch.zeros(8)}, "row_index: expected int64, got [8] float32 on cpu"),
    ({"row_index": torch.zeros(7, dtype=I64)}, "row_index: expected integers of shape [N = 8], got [7] int64 on cpu"),
    (
        {"row_index": torch.zeros(8, dtype=I64, device="meta")},
        "row_index: expected hidden's device cpu, got [8] int64 on meta",
    ),
    (
        {"targets": torch.tensor([0, 1, 2, 7, 0, 0, 0, 0])},
        "targets: expected values in [0, V = 7) or -100, got 7 at position 3",
    ),
    (
        {"targets": torch.tensor([0, 1, 2, 6, IGNORE, -1, 0, 0])},
        "targets: expected values in [0, V = 7) or -100, got -1 at position 5",
    ),
    (
        {"row_index": torch.tensor([0, 8, 0, 0, 0, 0, 0, 0])},
        "row_index: expected values in [0, M = 8), got 8 at position 1",
    ),
    (
        {"row_index": torch.tensor([0, 1, 0, 0, 0, 0, 0, -1])},
        "row_index: expected values in [0, M = 8), got -1 at position 7",
    ),
]
RANKING_ERRORS = [
    (
        {"candidate_lengths": torch.ones(4, dtype=torch.uint8)},
        "candidate_lengths: expected int64 or int32 of shape [C], got [4] uint8 on cpu",
    ),
    (
        {"candidates_per_prompt": torch.ones(2, dtype=torch.bool)},
        "candidates_per_prompt: expected int64 or int32 of shape [P], got [2] bool on cpu",
    ),
    (
        {"candidate_lengths": torch.ones(4)},
        "candidate_lengths: expected integers of shape [C], got [4] float32 on cpu",
    ),
    (
        {"candidate_lengths": torch.tensor([2, 1, 3, 1])},
        "candidate_lengths: expected a sum of N = 8 tokens, got 7",
    ),
    (
        {"candidate_lengths": torch.tensor([4, 3, -1, 2])},
        "candidate_lengths: expected no negative length, got -1 at position 2",
    ),
    (
        {"candidates_per_prompt": torch.ones(2, 1, dtype=I64)},
        "candidates_per_prompt: expected integers of shape [P], got [2, 1] int64 on cpu",
    ),
    (
        {"candidates_per_prompt": torch.zeros(0, dtype=I64)},
        "candidates_per_prompt: expected at least one prompt, got none; where a process has none left, [1] beside "
        "candidate_lengths [0] gives a loss of 0 and gradients of zeros",
    ),
    (
        {"candidates_per_prompt": torch.tensor([4, 0])},
        "candidates_per_prompt: expected at least 1 candidate a prompt, got 0 at position 1",
    ),
    (
        {"candidates_per_prompt": torch.tensor([2, 3])},
        "candidates_per_prompt: expected a sum of C = 4 candidates, got 5",
    ),
    ({"rewards": torch.zeros(3)}, "rewards: expected floating [C = 4], got [3] float32 on cpu"),
    ({"rewards": torch.zeros(4, dtype=I64)}, "rewards: expected floating [C = 4], got [4] int64 on cpu"),
    (
        {"rewards": torch.tensor([0.0, math.nan, 1.0, 2.0])},
        "rewards: expected finite values, got nan at position 1",
    ),
    (
        {"rewards": torch.tensor([0.0, 1.0, 1.0, -math.inf])},
        "rewards: expected finite values, got -inf at position 3",
    ),
    (
        {"rewards": torch.tensor([0.0, 1.0, 1e39, 1.0], dtype=torch.float64)},
        "rewards: expected finite values, got 1e+39 at position 2",
    ),
    ({"sft_index": torch.zeros(1, dtype=I64)}, "sft_index: expected integers of shape [P = 2], got [1] int64 on cpu"),
    ({"sft_index": torch.tensor([0, 2])}, "sft_index: expected a value in [0, 2) for prompt 1, got 2"),
    ({"sft_index": torch.tensor([-1, 0])}, "sft_index: expected a value in [0, 2) for prompt 0, got -1"),
    (
        {"pair_counts": torch.ones(1, 1)},
        "pair_counts: expected [D], one count a rank distance, got [1, 1] float32 on cpu",
    ),
    ({"pair_counts": torch.ones(0)}, "pair_counts: expected at least 1 rank distances, got 0"),
    ({"prompt_count": torch.ones(1)}, "prompt_count: expected a scalar tensor, got [1] float32 on cpu"),
]


@BACKENDS
@pytest.mark.parametrize(
    ("changes", "message"), HEAD_ERRORS + RANKING_ERRORS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_tensors_are_named(backend, changes, message):
    case = small().replace(**changes)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        case.loss(backend)


@BACKENDS
def test_settings_of_another_kind_are_named(backend):
    with pytest.raises(ValueError, match=r"^options: expected CLHAOptions, such as .*, got 'published'$"):
        small().loss(backend, options="published")
    with pytest.raises(ValueError, match=r"^head: expected HeadOptions\(...\), got \{'softcap': 3.0\}$"):
        small().loss(backend, head={"softcap": 3.0})
    with pytest.raises(ValueError, match=r"^options: "):
        CLHALoss("paper", backend=backend)


@BACKENDS
@pytest.mark.parametrize(("changes", "message"), HEAD_ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_token_logps_names_them_too(backend, changes, message):
    case = small().replace(**changes)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        token_logps(case.hidden, case.weight, case.targets, bias=case.bias, row_index=case.row_index, backend=backend)


@BACKENDS
def test_another_ignore_index(backend):
    """-1 instead of -100: the same loss, and -100 is then a target like any other that does not exist."""
    case = small(ignored=0.4)
    moved = case.replace(targets=case.targets.masked_fill(case.targets == IGNORE, -1))
    loss, gradients = moved.gradients(backend, head=HeadOptions(ignore_index=-1))
    torch.testing.assert_close((loss, gradients), case.gradients(backend), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^targets: expected values in \[0, V = 7\) or -1, got -100 at position"):
        case.loss(backend, head=HeadOptions(ignore_index=-1))


def test_unknown_backend():
    message = f"^backend: expected one of {', '.join(dispatch.BACKENDS)}, got 'cuda'$"
    with pytest.raises(ValueError, match=message):
        small().loss("cuda")
    with pytest.raises(ValueError, match=message):
        token_logps(torch.zeros(1, 1), torch.zeros(2, 1), torch.zeros(1).long(), backend="cuda")


def test_a_backend_asked_for_by_name_never_falls_back():
    """In a process without the interpreter: triton on a CPU says why, and so it does where triton is missing."""
    out = forked.output(
        "bare",
        """
import sys
import torch
from clha_fast import BackendError, CLHALoss, linear_clha_loss, token_logps

head = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
ranking = torch.tensor([1, 1]), torch.tensor([2])
calls = [
    lambda: token_logps(*head, backend="triton"),
    lambda: linear_clha_loss(*head, *ranking, backend="triton"),
    lambda: CLHALoss(backend="triton")(*head, *ranking),
]
def attempt():
    for call in calls:
        try:
            print("ran", call())
        except BackendError as error:
            print(error)
attempt()
sys.modules["triton"] = None
attempt()
print(float(linear_clha_loss(*head, *ranking)[0]))
""",
    )
    on_cpu = (
        "backend 'triton' cannot run: the tensors are on 'cpu': it needs a CUDA or ROCm device (or TRITON_INTERPRET=1)"
    )
    missing = "backend 'triton' cannot run: the package triton is not installed"
    *lines, loss = out.splitlines()
    assert lines == [on_cpu] * 3 + [missing] * 3
    # Uniform over 5 words: h = 3, SFT 0.05 * log 5.
    assert float(loss) == pytest.approx(3 + 0.05 * math.log(5), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "environment", "reason"),
    [
        (torch.float64, "1", "not float64"),
        (torch.float32, "0", "the tensors are on 'cpu'"),
        (torch.bfloat16, "1", "Triton's interpreter computes bfloat16 wrongly"),
    ],
    ids=["float64", "no interpreter", "bfloat16 in the interpreter"],
)
def test_triton_says_what_it_cannot_take(dtype, environment, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", environment)
    with pytest.raises(RuntimeError, match=f"^backend 'triton' cannot run: .*{reason}"):
        small(dtype=dtype).loss("triton")


def test_auto_says_its_choice_once(caplog):
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="clha_fast"):
        chosen = [small().loss("auto")[0] for _ in range(3)]
    assert [record.getMessage() for record in caplog.records] == [
        f"backend auto: torch (the device is cpu; {dispatch.RULES[-1].origin})"
    ]
    torch.testing.assert_close(chosen[0], small().loss("torch")[0], rtol=0, atol=0)


def test_the_table_of_auto_takes_every_call():
    """Every row names a backend and its origin, every call finds a row, and none is out of reach."""
    taken = set()
    for device in ("cpu", "cuda", "mps"):
        for kernels in (True, False):
            for gradients in (True, False):
                for room in (True, False):
                    rule = dispatch.choose(device, kernels, gradients, room)
                    taken.add(rule)
                    assert rule.backend in dispatch.BACKENDS[1:-1]
                    assert rule.origin
                    assert rule.backend == "torch" or (device == "cuda" and kernels)
    assert taken == set(dispatch.RULES)


GIB = 2**30
ALL = dispatch.ANY_NUMBER


@pytest.mark.parametrize(
    ("memory", "weight", "budget", "limit"),
    [
        # [V, H] in float32 is 2.1 GB, the workspace as large, copies of its 8192 rows 0.3 GB: 4.5 GB of 80.
        (80 * GIB, (128256, 4096), None, ALL),
        # The float32 gradient alone is missing: one chunk fits, of 2 H tokens.
        (64 * GIB, (128256, 4096), None, 8192),
        # The gradient in 16 bits, 64 MiB of it in float32, and 264,704 bytes a token.
        (40 * GIB, (128256, 4096), None, (40 * 2**26 - 2 * 128256 * 4096 - 2**26) // (2 * 128256 + 2 * 4096)),
        # Less of a workspace: the sums and what they are rounded to, 3.2 GB; of one chunk 1046 tokens.
        (64 * GIB, (128256, 4096), 2**28, ALL),
        (40 * GIB, (128256, 4096), 2**28, 1046),
        (16 * GIB, (128256, 4096), None, 0),
        (24 * GIB, (32000, 2048), None, ALL),
        (80 * GIB, (151936, 8192), None, (5 * GIB - 2 * 151936 * 8192 - 2**26) // (2 * 151936 + 2 * 8192)),
    ],
)
def test_auto_takes_the_workspace_where_it_is_a_small_share_of_the_memory(memory, weight, budget, limit, monkeypatch):
    monkeypatch.setattr(dispatch, "_why_not_kernels", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    half = torch.bfloat16
    assert dispatch.token_limit("cuda", half, *weight, True, budget) == limit
    for tokens in (1, limit, limit + 1):
        chosen = "workspace" if 0 < tokens <= limit else "triton"
        if tokens:
            assert dispatch.planned(memory, Workspace(*weight, 2, budget), tokens) == (chosen, limit)
    found = [dispatch.resolve("auto", "cuda", half, gradients=True, limit=limit, fits=fits) for fits in (True, False)]
    assert found == ["workspace", "triton"]
    # Log-probabilities, and routed gradients, are the fused kernels' whatever there is.
    assert dispatch.resolve("auto", "cuda", half, limit=limit, fits=True) == "triton"
    assert dispatch.resolve("auto", "cuda", half, gradients=True, routed=True, limit=limit, fits=True) == "triton"
    # A frozen head's gradient takes nothing.
    assert dispatch.token_limit("cuda", half, *weight, False, budget) >= max(1, limit)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert dispatch.token_limit("cuda", half, *weight, True, budget) == 0


def test_auto_says_one_thing_for_all_numbers_of_tokens(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_why_not_kernels", lambda device, dtype: None)
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="clha_fast"):
        for limit in (1247, ALL):
            for fits in (True, False, True):
                dispatch.resolve("auto", "cuda", torch.bfloat16, gradients=True, limit=limit, fits=fits)
    origin = dispatch.RULES[0].origin
    why = "gradients are wanted and its memory is there"
    assert [record.getMessage() for record in caplog.records] == [
        f"backend auto: workspace up to 1,247 tokens in a call, triton beyond ({why}; {origin})",
        f"backend auto: workspace ({why}; {origin})",
    ]


@pytest.mark.parametrize("backend", ["reference", "workspace"])
def test_exact_backends_refuse_to_drop_mass(backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    message = f"^backend '{backend}' forms every gradient whole: expected max_dropped_mass None"
    with pytest.raises(BackendError, match=message):
        small(dtype=torch.float32).loss(backend, head=HeadOptions(max_dropped_mass=0.01))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_its_dtype(backend, dtype):
    """Under autocast: the result of inputs cast to its dtype, the gradients in the parameters' own dtype."""
    case = small(dtype=torch.float32, bias=True)
    expected_loss, expected = case.to(dtype).gradients(backend)
    full_loss, _ = case.gradients(backend)
    leaves = case.leaves()
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = case.loss(backend)
        logps = token_logps(case.hidden, case.weight, case.targets, bias=case.bias, backend=backend)
    assert loss.dtype == torch.float32
    assert logps.dtype == torch.float32
    assert loss != full_loss
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0)
    for gradient, expected_gradient in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected_gradient.float(), rtol=0, atol=0)
    cast = case.to(dtype)
    expected_logps = token_logps(cast.hidden, cast.weight, cast.targets, bias=cast.bias, backend=backend)
    torch.testing.assert_close(logps, expected_logps, rtol=0, atol=0)


def test_autocast_leaves_float64_alone():
    expected = small().loss()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = small().loss()
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@BACKENDS
def test_the_module_is_the_function(backend):
    case = small(rewards=True, bias=True, sft_index=True, rows=5)
    options = CLHAOptions.preset("paper").replace(margin=1.0)
    head = HeadOptions(softcap=5.0)
    module = CLHALoss(options, head, backend)
    loss, metrics = module(**case.arguments())
    expected, expected_metrics = case.loss(backend, options=options, head=head)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(metrics.values, expected_metrics.values, rtol=0, atol=0)
    assert not list(module.parameters())
    assert "margin=1.0" in repr(module)
    default = CLHALoss()
    assert default.options == CLHAOptions.preset("published")
    assert default.head == HeadOptions()


@BACKENDS
def test_ranking_tensors_may_be_int32(backend):
    case = small(rewards=True, sft_index=True)
    narrow = case.replace(
        candidate_lengths=case.candidate_lengths.int(),
        candidates_per_prompt=case.candidates_per_prompt.int(),
        sft_index=case.sft_index.int(),
    )
    torch.testing.assert_close(narrow.gradients(backend), case.gradients(backend), rtol=0, atol=0)


@BACKENDS
def test_metrics_carry_no_graph(backend):
    case = small()
    case.leaves()
    loss, metrics = case.loss(backend)
    assert loss.requires_grad
    assert not metrics.values.requires_grad
    assert not metrics.scores.requires_grad


def test_keywords_follow_the_tensors():
    """Options are not positional: a signature that grows cannot silently change what a call means."""
    case = small(rewards=True)
    head = (case.hidden, case.weight, case.targets)
    with pytest.raises(TypeError):
        linear_clha_loss(*head, case.candidate_lengths, case.candidates_per_prompt, case.rewards)


@pytest.mark.parametrize("name", ["candidate_lengths", "candidates_per_prompt", "rewards", "targets"])
def test_lists_are_refused_by_name(name: str) -> None:
    given = {
        "targets": torch.zeros(6, dtype=torch.long),
        "candidate_lengths": torch.tensor([2, 2, 2]),
        "candidates_per_prompt": torch.tensor([3]),
        "rewards": torch.tensor([4.0, 0.0, -4.0]),
    }
    given[name] = given[name].tolist()
    with pytest.raises(ValueError, match=f"{name}: expected a tensor, got a list"):
        linear_clha_loss(torch.randn(6, 4), torch.randn(9, 4), **given)

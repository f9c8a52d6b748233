"""Every causal language model that transformers can build, tiny: the fused head against eager logits.

``python -m tests.support.architectures`` walks all of `MODEL_FOR_CAUSAL_LM_MAPPING`, prints a line for each model and,
with ``--write PATH``, renders the list; ``--types llama bert`` takes some of them.

What is compared, in float32 on a padded batch: log-probabilities of chosen tokens and the gradients of all parameters,
once by way of the model's own logits and once by way of `fused_head`. Both run the same operations up to the head, so
that experts are chosen alike, and differ by the rounding of one projection: about 1e-6. The tolerances are 1e-4.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clha_fast.models.head_loss import head_values
from clha_fast.models.heads import HeadForward, HeadInfo, UnsupportedHeadError, fused_head, inspect_head
from clha_fast.models.router import auxiliary_coefficient
from tests.support import layouts
from tests.support.architecture_configs import FREE_TOKENS, shrink

NATS = 1e-4
RELATIVE = 1e-4
# A check that could not see a lost scale is none: logps must differ among one another, and without the transform.
FELT = 1e-2
LENGTH, BATCH = 12, 3
SECONDS = 60
# From what there is nothing to say about to what there is most.
NOT_BUILDABLE, RIGHT, REFUSED, WRONG = OUTCOMES = ("not buildable", "right", "refused", "wrong")
SHOWN = (RIGHT, WRONG, REFUSED, NOT_BUILDABLE)
VARIANTS = ("untied", "tied")
# Its reversible layers have a backward in training mode only; every dropout is 0.
TRAINING = {"reformer"}
# The class is not built from the configuration that the mapping has for it, but from this part.
PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}


@dataclass
class Result:
    """What one variant of one architecture gave.

    Attributes:
        reason: why it is not right. transform: what `inspect_head` found.
        nats, relative: the largest differences of log-probabilities and of a parameter's gradient, over its norm.
        felt: by how much log-probabilities are off when the transform is left out, or the weight read of a head that is
            more than one, in nats; None where there is neither.
        tied: whether input and output embedding are one parameter. aux_loss: whether there was a router's loss.
        packed, shared: `layouts.short` of these rows; "" where they were not tried. in_two_calls: those of the two that
            are right without masks.
    """

    model_type: str
    variant: str
    outcome: str = RIGHT
    reason: str = ""
    transform: str = ""
    nats: float = 0.0
    relative: float = 0.0
    felt: float | None = None
    tied: bool = False
    aux_loss: bool = False
    packed: str = ""
    shared: str = ""
    in_two_calls: list[str] = dataclasses.field(default_factory=list)
    parameters: int = 0
    seconds: float = 0.0

    def said(self, outcome: str, reason: object) -> Result:
        self.outcome, self.reason = outcome, " ".join(str(reason).split())
        return self


def build(config: PreTrainedConfig, part: str | None = None) -> nn.Module:
    """A tiny random model in evaluation mode in which no bias is 0 and no norm's weight 1."""
    torch.manual_seed(0)
    if part is None:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    else:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](getattr(config, part))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        head = model.get_output_embeddings()
        if isinstance(getattr(head, "weight", None), Tensor):
            # Logits of about 2, which every softcap bends.
            head.weight.normal_(0, 2 * head.weight.shape[-1] ** -0.5, generator=generator)
            if isinstance(getattr(head, "bias", None), Tensor):
                head.bias.normal_(0, 1, generator=generator)
    return model.eval()


def batch() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Padded inputs, the rows scored and their targets."""
    ids = torch.randint(*FREE_TOKENS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    rows = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)[:, 2:-1][mask[:, 3:].bool()]
    return {"input_ids": ids, "attention_mask": mask}, rows, ids.flatten()[rows + 1]


@dataclass
class Outcome:
    """Detached log-probabilities, gradients by parameter name, and the router's auxiliary loss."""

    logps: Tensor
    gradients: dict[str, Tensor]
    aux_loss: Tensor | None

    @classmethod
    def of(cls, model: nn.Module, logps: Tensor, output: Any) -> Outcome:
        aux_loss = getattr(output, "aux_loss", None)
        model.zero_grad(set_to_none=True)
        loss = logps @ torch.linspace(-1, 1.5, len(logps))
        if isinstance(aux_loss, Tensor) and aux_loss.requires_grad:
            loss = loss + 0.5 * aux_loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return cls(logps.detach(), gradients, aux_loss.detach() if isinstance(aux_loss, Tensor) else None)


def eager(model: nn.Module) -> Outcome:
    inputs, rows, targets = batch()
    output = model(**inputs, use_cache=False)
    logits = output.logits.float().flatten(0, 1)[rows]
    return Outcome.of(model, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], output)


def fused(model: nn.Module, info: HeadInfo) -> Outcome:
    inputs, rows, targets = batch()

    def compute(hidden: Tensor, weight: Tensor | HeadForward, bias: Tensor | None) -> Tensor:
        return head_values(hidden, weight, bias, targets, rows, head=info.options(), backend=layouts.backend(info))[0]

    with fused_head(model, compute, info):
        output = model(**inputs, use_cache=False)
    return Outcome.of(model, output.logits, output)


def gradient_error(expected: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of a parameter's gradient over its norm, and the parameter's name."""
    whole = sum(float(g.double().norm()) ** 2 for g in expected.values()) ** 0.5
    worst = (0.0, "")
    for name in sorted(expected.keys() | got.keys()):
        one, other = expected.get(name, torch.zeros(())).double(), got.get(name, torch.zeros(())).double()
        # A gradient that is 0 but for rounding (a key's bias in attention) has no relative error: 1e-3 of the whole.
        error = float((one - other).norm() / (one.norm() + 1e-3 * whole))
        if not error <= worst[0]:
            worst = (error, name)
    return worst


def describe(info: HeadInfo) -> str:
    rows = info.module.weight.shape[0]
    found = {
        "own forward": info.own_forward is not None,
        f"scale {info.scale:.6g}": info.scale != 1,
        f"softcap {info.softcap}": info.softcap is not None,
        f"adds {info.bias_name}": info.bias_name is not None,
        f"{info.vocab_size} of {rows} rows": info.vocab_size != rows,
        f"stream {info.stream}": info.stream is not None,
        "bias": info.module.bias is not None,
    }
    return ", ".join(text for text, there in found.items() if there) or "identity"


def check(model_type: str, variant: str) -> Result:
    """One variant of one architecture, in this process."""
    result = Result(model_type, variant)
    config = None
    try:
        config = shrink(model_type, tied=variant == "tied")
        model = build(config)
    except Exception as error:  # whatever transformers raises is the answer
        result.said(NOT_BUILDABLE, f"{type(error).__name__}: {error}")
        part = PARTS.get(model_type)
        if part is None or config is None:
            return result
        try:
            inspect_head(build(config, part))
        except UnsupportedHeadError as refusal:
            name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
            why = f"AutoModelForCausalLM: {result.reason}; {name} from its {part}'s configuration: {refusal}"
            return result.said(NOT_BUILDABLE, why)
        return result.said(WRONG, f"{result.reason}; its {part} is accepted, and was not compared")
    model.train(model_type in TRAINING)
    result.parameters = sum(p.numel() for p in model.parameters())
    try:
        info = inspect_head(model, own_forward=True)
    except UnsupportedHeadError as refusal:
        return result.said(REFUSED, refusal)
    result.transform = describe(info)
    result.tied = info.module.weight is model.get_input_embeddings().weight
    result = compare(model, info, result)
    if variant == VARIANTS[0] and result.outcome == RIGHT:
        layouts.usual_attention(model.eval())
        judged = {layout: layouts.judge(model, layout) for layout in layouts.LAYOUTS}
        result.packed, result.shared = map(layouts.short, judged.values())
        result.in_two_calls = [
            layout for layout, found in judged.items() if found.outcome == layouts.RIGHT and found.in_two_calls
        ]
    return result


def compare(model: nn.Module, info: HeadInfo, result: Result) -> Result:
    expected, got = eager(model), fused(model, info)
    result.nats = float((got.logps - expected.logps).abs().max())
    result.relative, where = gradient_error(expected.gradients, got.gradients)
    result.aux_loss = expected.aux_loss is not None
    plain = dataclasses.replace(info, scale=1.0, softcap=None, bias_name=None, own_forward=None)
    if plain != info:
        result.felt = float((fused(model, plain).logps - expected.logps).abs().max())
    if not expected.gradients or not torch.isfinite(expected.logps).all():
        return result.said(WRONG, "the eager path gives no finite log-probabilities to compare with")
    if expected.logps.std() < FELT or (result.felt is not None and result.felt < FELT):
        return result.said(WRONG, "the comparison is blind: log-probabilities do not depend on what is checked")
    if not result.nats <= NATS:
        return result.said(WRONG, f"log-probabilities differ by {result.nats:.2e} nats")
    if not result.relative <= RELATIVE:
        return result.said(WRONG, f"the gradient of {where} differs by {result.relative:.2e}")
    if result.aux_loss and (got.aux_loss is None or not torch.equal(got.aux_loss, expected.aux_loss)):
        return result.said(WRONG, "the router's auxiliary loss is another one")
    if result.aux_loss:
        own, ours = own_coefficient(model), auxiliary_coefficient(model)
        if not abs(own - ours) <= 1e-3 * abs(own):
            return result.said(WRONG, f"the model multiplies the auxiliary loss by {own:.4g}, not by {ours:.4g}")
    return result


def own_coefficient(model: nn.Module) -> float:
    """What the model's own loss, which it computes from labels, makes of the auxiliary one."""
    inputs, _, _ = batch()
    with torch.no_grad():
        plain, whole = (
            model(**inputs, labels=inputs["input_ids"], use_cache=False, output_router_logits=asked)
            for asked in (False, True)
        )
    return float((whole.loss.double() - plain.loss.double()) / whole.aux_loss.double())


def _child(model_type: str, variant: str, connection: Connection) -> None:
    start = time.perf_counter()
    try:
        result = check(model_type, variant)
    except Exception as error:  # an error on the way of a model that was built counts as wrong
        traceback.print_exc()
        result = Result(model_type, variant).said(WRONG, f"{type(error).__name__}: {error}")
    result.seconds = time.perf_counter() - start
    connection.send(result)


def walk(types: Iterable[str], variants: Iterable[str]) -> Iterator[Result]:
    """A forked process for each: a crash or an endless loop costs one model, and nothing is imported twice."""
    context = multiprocessing.get_context("fork")
    build(shrink("llama", tied=False))  # imports what every model imports; no backward, which would start threads
    variants = tuple(variants)
    for model_type in types:
        for variant in variants:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(model_type, variant, sender))
            process.start()
            sender.close()
            in_time = receiver.poll(SECONDS)
            try:
                result = receiver.recv() if in_time else None
            except EOFError:
                result = None
            if result is None:
                process.kill()
                why = "its process died" if in_time else f"it took more than {SECONDS} s"
                result = Result(model_type, variant).said(WRONG, why)
            process.join()
            yield result


def worst(results: Iterable[Result]) -> Result:
    """Of one architecture's variants, the one to report: one that cannot be built says nothing about the other."""
    return max(results, key=lambda r: (OUTCOMES.index(r.outcome), r.nats))


def grouped(results: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.model_type, []).append(result)
    return groups


def render(results: list[Result]) -> str:
    """The list as Markdown."""
    groups = grouped(results)
    rows = []
    counts = dict.fromkeys(SHOWN, 0)
    joins: dict[str, Counter[str]] = {layout: Counter() for layout in layouts.LAYOUTS}
    for model_type, variants in sorted(groups.items()):
        result = worst(variants)
        counts[result.outcome] += 1
        embeddings = " and ".join(sorted({"tied" if r.tied else "untied" for r in variants if r.outcome == RIGHT}))
        reason = re.sub(r"([|<>])", r"\\\1", result.reason)
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        joined = [max((getattr(r, layout) for r in variants), default="") for layout in layouts.LAYOUTS]
        for layout, said in zip(layouts.LAYOUTS, joined, strict=True):
            joins[layout][said.partition(":")[0]] += 1
        columns = (model_type, name, result.outcome, result.transform, embeddings, *joined, reason)
        rows.append(f"| {' | '.join(columns)} |")
    right = [r for r in results if r.outcome == RIGHT]
    nats = max((r.nats for r in right), default=0.0)
    relative = max((r.relative for r in right), default=0.0)
    routers = len({r.model_type for r in right if r.aux_loss})
    versions = f"transformers {transformers.__version__} and torch {torch.__version__.partition('+')[0]}"
    total = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    two_calls = Counter(layout for r in results for layout in r.in_two_calls)
    of_layouts = "; ".join(
        f"{layout} rows: {', '.join(f'{found[outcome]} {outcome}' for outcome in layouts.OUTCOMES)}, of the right ones "
        f"{two_calls[layout]} in two calls without masks"
        for layout, found in joins.items()
    )
    return f"""# Architectures

Written by `python -m tests.support.architectures --write docs/architectures.md` with
{versions}.

Every model type of transformers' `MODEL_FOR_CAUSAL_LM_MAPPING`, built tiny and random, with tied and with untied
embeddings where it has both, and with every scale, cap, multiplier and head bias of its configuration set to something
unusual. Log-probabilities of chosen tokens and the gradients of all parameters are compared, in float32, between the
model's own logits and the fused head. *Right* means that no log-probability differs by more than {NATS:g} nats (the
largest seen: {nats:.1e}), no parameter's gradient by more than {RELATIVE:g} of its norm (largest: {relative:.1e};
gradients of less than a thousandth of the whole are held to that thousandth), and that the auxiliary loss of a router,
which {routers} of them return here, is the same number, with the coefficient that the model's own loss gives it. Models
that also read images or sound are run on text alone.

**{len(groups)} model types: {total}.**

*Transform* is what was measured behind the head's own linear map: *identity*, a scale, a softcap c tanh(z / c), a
vocabulary cut short, one of several streams; *bias* says that the head itself has one, *own forward* that it is more
than one weight, and that it is called as it is, a chunk of tokens at a time ([adapters.md](adapters.md)).

*Packed* and *shared* are layouts of [long-inputs.md](long-inputs.md): *right* means that `attach` took the model, and
that log-probabilities and all gradients are those of each candidate alone in a row, to {layouts.NATS:g} nats and
{layouts.RELATIVE:g} of a gradient's norm, with prompts longer than the windows; *refused* says what the refusal names;
*wrong* would be a model that was taken and differs. **{of_layouts}.**

| model type | class | result | transform | embeddings | packed | shared | reason |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--json", type=Path, help="write every result there")
    parser.add_argument("--write", type=Path, help="render the list as Markdown there")
    arguments = parser.parse_args()
    # Set before the first fork: OpenMP's threads do not survive one.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results = []
    for result in walk(arguments.types, arguments.variants):
        results.append(result)
        numbers = f"{result.nats:.1e} {result.relative:.1e} {result.parameters:9d} {result.seconds:5.1f}s"
        said = " | ".join(filter(None, (result.reason or result.transform, result.packed, result.shared)))
        print(f"{result.model_type:25} {result.variant:7} {result.outcome:13} {numbers} {said}", flush=True)
    outcomes = [worst(variants).outcome for variants in grouped(results).values()]
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in SHOWN))
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    if arguments.write:
        arguments.write.write_text(render(results))
    joined = {value for result in results for value in (result.packed, result.shared)}
    return int(WRONG in {*outcomes, *joined})


if __name__ == "__main__":
    sys.exit(main())

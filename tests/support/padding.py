"""Which architectures give a padded row other logits than the row alone: the models' own, without this library.

``python -m tests.support.padding`` builds every causal language model of transformers tiny and random, in evaluation
mode. It prints the largest difference of a token's log-probabilities, in nats over several draws, between a row of five
tokens alone and the same row padded on the right, masked, beside one of nine; and between the first five tokens of the
longer row alone and within it.
"""

from __future__ import annotations

import argparse
import warnings

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.architecture_configs import shrink
from tests.support.architectures import build

# Float32 models of this size agree to 1e-5; what does not is no rounding.
TOLERANCE = 1e-3
SHORT, LONG, DRAWS = 5, 9, 8


def logps(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    output = model(input_ids=ids, attention_mask=mask, use_cache=False)
    return output.logits.float().log_softmax(-1)


@torch.no_grad()
def differences(model: nn.Module, seed: int) -> tuple[float, float]:
    """(padded against alone, a prefix alone against the same prefix of a row), nats."""
    draw = torch.Generator().manual_seed(seed)
    short, long = (torch.randint(3, 20, (1, size), generator=draw) for size in (SHORT, LONG))
    padded = torch.cat([torch.cat([short, torch.zeros(1, LONG - SHORT, dtype=torch.long)], 1), long])
    mask = torch.ones_like(padded)
    mask[0, SHORT:] = 0
    alone, beside = logps(model, short, torch.ones_like(short)), logps(model, padded, mask)[:1, :SHORT]
    prefix = logps(model, long[:, :SHORT], torch.ones_like(long[:, :SHORT]))
    whole = logps(model, long, torch.ones_like(long))[:, :SHORT]
    return float((alone - beside).abs().max()), float((prefix - whole).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--all", action="store_true", help="print those that agree, too")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    counts = {"agree": 0, "differ": 0, "not run": 0}
    for kind in arguments.types:
        try:
            model = build(shrink(kind, False)).eval()
            found = [differences(model, seed) for seed in range(DRAWS)]
            padding, prefix = (max(values) for values in zip(*found, strict=True))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, ImportError) as error:
            counts["not run"] += 1
            print(f"{kind:22} not run: {type(error).__name__} {' '.join(str(error).split())[:80]}", flush=True)
            continue
        outcome = "agree" if max(padding, prefix) <= TOLERANCE else "differ"
        counts[outcome] += 1
        if arguments.all or outcome == "differ":
            print(f"{kind:22} {outcome}: padded {padding:.1e}, prefix {prefix:.1e}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


if __name__ == "__main__":
    main()

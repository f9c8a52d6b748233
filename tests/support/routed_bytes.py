"""What the routed backward's three products move through L2, by count: the table of docs/kernels.md, and what follows.

A program of its own (`python -m tests.support.routed_bytes`). A model, not a measurement: it supposes that the dense
128 x 256 tile, 85 operations a byte, is just what L2 can feed, and that a reducing store moves 4 bytes.
"""

from __future__ import annotations

from clha_fast.backends.triton.head import tiles
from clha_fast.backends.triton.routed import segments_together
from clha_fast.options import ROUTE_WORDS
from csrc_triton import configs

# Operations a (token, block) pair and unit of H.
OPERATIONS = 2 * ROUTE_WORDS
# Of a dense tile of 128 tokens x 256 words, 2 bytes an element: what a product at full speed is taken to need.
DENSE = 2 * 128 * 256 / (2 * (128 + 256))
MULTIPROCESSORS = {"sm_90": 132, "sm_100": 148, "sm_80": 108}


def recompute(arch: str) -> float:
    """Bytes a pair and unit of H of `routed_logit_grad`: rows for each tile of words, the weight for each of tokens."""
    tile = configs.select("routed_logit_grad", arch, "16-bit")
    return 2 * ROUTE_WORDS / tile["BLOCK_V"] + 2 * ROUTE_WORDS / tile["BLOCK_N"]


def weight_grad(arch: str) -> float:
    """Of `routed_weight_grad`: dlogits for each tile of H, rows for each tile of words."""
    tile = configs.select("routed_weight_grad", arch, "16-bit")
    return 2 * ROUTE_WORDS / tile["BLOCK_H"] + 2 * ROUTE_WORDS / tile["BLOCK_V"]


def hidden_grad(arch: str, pairs: float) -> float:
    """Of `routed_hidden_grad`, where a program has `pairs` of a block: dlogits for each tile of H, the weight, a sum.

    The weight's tile is loaded once a block if it has all its words, else once for every BLOCK_N pairs.
    """
    tile = configs.select("routed_hidden_grad", arch, "16-bit")
    sharing = pairs
    if tile["BLOCK_V"] < ROUTE_WORDS:
        sharing = pairs / tiles(round(pairs), tile["BLOCK_N"])
    return 2 * ROUTE_WORDS / tile["BLOCK_H"] + 2 * ROUTE_WORDS / sharing + 4


def gemms(bytes_a_pair: float) -> float:
    """The product's cost in GEMMs where all pairs are kept."""
    return DENSE * bytes_a_pair / OPERATIONS


def pairs_of(arch: str, tokens: int, width: int, kept_share: float) -> float:
    """Pairs of a block that one program of `routed_hidden_grad` has."""
    segment = configs.select("route_count", arch, "16-bit")["SEGMENT"]
    tile = configs.select("routed_hidden_grad", arch, "16-bit")
    at_once = tile["RESIDENT"] * MULTIPROCESSORS[arch]
    together = segments_together(tiles(tokens, segment), tiles(width, tile["BLOCK_H"]), at_once)
    return kept_share * min(tokens, segment * together)


def step(arch: str, tokens: int, width: int, kept_share: float) -> tuple[float, float]:
    """(dhidden's GEMMs over the kept share, GEMMs of forward and backward)."""
    dhidden = gemms(hidden_grad(arch, pairs_of(arch, tokens, width, kept_share)))
    others = gemms(recompute(arch)) + gemms(weight_grad(arch))
    return dhidden, 1 + kept_share * (others + dhidden)


def main() -> None:
    print("| N x H | kept share | pairs of a block a program | dhidden, over the share | forward and backward |")
    print("|---|---|---|---|---|")
    for tokens, width in ((2048, 4096), (8192, 2048), (8192, 4096), (4096, 8192), (65536, 4096)):
        for share in (0.05, 0.14, 0.4):
            dhidden, whole = step("sm_90", tokens, width, share)
            pairs = pairs_of("sm_90", tokens, width, share)
            print(f"| {tokens} x {width} | {share} | {pairs:.0f} | {dhidden:.1f} | {whole:.1f} |")


if __name__ == "__main__":
    main()

"""BLEU against the best reference answer: the published one over characters, and the corpus's own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from clha_fast.evaluation.intervals import Array, import_extra

# Of one answer: its length and the reference's in tokens, then matches and n-grams of each of the four orders.
STATISTICS = ("length", "reference", *(f"{kind}_{order}" for kind in ("match", "total") for order in range(1, 5)))


def published_bleu(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """The BLEU of the published code, 0 to 100 for each answer; reported as its mean over prompts.

    nltk's `sentence_bleu` with its defaults (four orders, no smoothing) is handed texts, not lists of words, so its
    n-grams are of characters. An empty answer has 0.

    Raises:
        ImportError: nltk is not installed.
    """
    nltk = import_extra("nltk.translate.bleu_score", "published BLEU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises smoothing, which the published code does not do
        return [
            100 * float(nltk.sentence_bleu([reference.strip()], answer.strip()))
            for answer, reference in zip(answers, references, strict=True)
        ]


def corpus_statistics(answers: Sequence[str], references: Sequence[str]) -> list[list[float]]:
    """What each answer adds to sacrebleu's corpus BLEU (tokenizer 13a), in the order of `STATISTICS`.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    # An answer's own score, which is not used, does without advice then.
    bleu = import_extra("sacrebleu.metrics", "corpus BLEU").BLEU(effective_order=True)
    found = []
    for answer, reference in zip(answers, references, strict=True):
        score = bleu.sentence_score(answer, [reference])
        found.append([float(number) for number in (score.sys_len, score.ref_len, *score.counts, *score.totals)])
    return found


def corpus_bleu(sums: Array) -> Array:
    """[..., 10] -> [...]: sacrebleu's corpus BLEU (its default smoothing), 0 to 100, of sums of `STATISTICS`."""
    bleu: Any = import_extra("sacrebleu.metrics", "corpus BLEU").BLEU
    rows = np.reshape(sums, (-1, len(STATISTICS))).astype(int).tolist()
    scores = [bleu.compute_bleu(row[2:6], row[6:], row[0], row[1], smooth_method="exp").score for row in rows]
    return np.reshape(np.array(scores), np.shape(sums)[:-1])

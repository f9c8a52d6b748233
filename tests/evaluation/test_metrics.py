"""Metrics in closed form: BLEU of both kinds, length, diversity, intervals, likelihood and order."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from nltk.translate.bleu_score import sentence_bleu
from scipy.stats import kendalltau, norm

from clha_fast.data import RankedRecord, record_from_row
from clha_fast.evaluation.bleu import STATISTICS, corpus_bleu, corpus_statistics, published_bleu
from clha_fast.evaluation.diversity import corpus_distinct_2, distinct_2, words
from clha_fast.evaluation.intervals import Estimate, difference, estimate, ratio
from clha_fast.evaluation.likelihood import candidate_scores, likelihood_values
from tests.support import forked
from tests.support.chat_templates import MESSAGES, SHAPES, chat_tokenizer
from tests.support.reward_models import spread
from tests.support.tiny import make_model, make_rows, make_tokenizer
from tests.support.trainers import trainer

POINT = "the same whatever prompts are drawn: the interval is a point"
TOKENIZER = make_tokenizer()
REFERENCE = (
    "Lower the egg into boiling water, wait for seven minutes, then cool it under cold water before you peel it. "
    "Salt in the water does not matter, but a fresh egg is harder to peel than an old one."
)


# ---- BLEU ----


def test_published_bleu_is_nltk_s_over_characters() -> None:
    mixed = REFERENCE.split()
    random.Random(0).shuffle(mixed)
    answers = [
        REFERENCE,
        " ".join(mixed),
        "I do not know anything about it, ask somebody else.",
        "abc",
        "",
        f" {REFERENCE}\n",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no advice of nltk's on the terminal
        found = published_bleu(answers, [REFERENCE] * len(answers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = [100 * sentence_bleu([list(REFERENCE)], list(answer.strip())) for answer in answers]
    assert found == pytest.approx(wanted)
    assert (found[0], found[5], found[4]) == (100, 100, 0)
    assert found[1] > 80, "shuffled words score high: that is what characters measure"
    assert found[3] < 1e-6


def test_published_bleu_by_hand() -> None:
    """ "abcd" against "abcde": every n-gram matches, the brevity penalty is exp(1 - 5/4)."""
    assert published_bleu(["abcd"], ["abcde"]) == pytest.approx([100 * math.exp(-0.25)])


def test_corpus_bleu_of_sums_is_sacrebleu_s() -> None:
    rows = make_rows(12, seed=3)
    best = [row["completions"][0] for row in rows]
    answers = [row["completions"][1] for row in rows] + [REFERENCE[:60], ""]
    best += [REFERENCE, "a dog"]
    rows_of = np.array(corpus_statistics(answers, best))
    assert rows_of.shape == (14, len(STATISTICS))
    for chosen in (list(range(14)), [12], [13], [3, 3, 5]):
        wanted = sacrebleu.corpus_bleu([answers[k] for k in chosen], [[best[k] for k in chosen]]).score
        assert float(corpus_bleu(rows_of[chosen].sum(0))) == pytest.approx(wanted)
    stacked = np.stack([rows_of[:4].sum(0), rows_of.sum(0)])
    assert corpus_bleu(stacked) == pytest.approx([float(corpus_bleu(part)) for part in stacked])


# ---- length and diversity ----


def test_words_and_distinct_2() -> None:
    assert words(["a b  c\nd", "", " one "]) == [4, 0, 1]
    assert distinct_2("a b a b") == pytest.approx(2 / 3)  # ab ba ab
    assert distinct_2("a b c") == 1
    assert distinct_2("a") is distinct_2("") is None
    assert corpus_distinct_2(["a b", "a b", "b c"]) == pytest.approx(2 / 3)
    assert corpus_distinct_2(["a", ""]) is None


# ---- intervals ----


def mean_rows(values: Any) -> np.ndarray:
    return np.column_stack([np.asarray(values, dtype=float), np.ones(len(values))])


def test_interval_of_a_mean_is_the_normal_one_for_many_prompts() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    found = estimate(ratio, mean_rows(values))
    half = norm.ppf(0.975) * values.std() / math.sqrt(2000)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert estimate(ratio, mean_rows(values)) == found, "the same every time"
    bca = estimate(ratio, mean_rows(values), method="BCa")
    assert bca.low == pytest.approx(found.low, abs=0.1 * half)


def test_an_interval_of_two_prompts_by_hand() -> None:
    """Resampled means of 0 and 1 are 0, 1/2, 1 with 1/4, 1/2, 1/4: the 95% interval is all of it."""
    found = estimate(ratio, mean_rows([0, 1]))
    assert found == Estimate(0.5, 0.0, 1.0, 2)


def test_a_ratio_weighs_prompts_by_what_they_hold() -> None:
    """A prompt without a pair adds nothing, and is not drawn: 1/1 and 1/9 give 1/9, 1/5 or 1."""
    found = estimate(ratio, np.array([[1.0, 1.0], [1.0, 9.0], [0.0, 0.0]]))
    assert found == Estimate(0.2, pytest.approx(1 / 9), 1.0, 2)


def test_a_figure_that_some_resamples_lack() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate(ratio, np.array([[1.0, 1.0], [1.0, 0.0]]))
    assert found == Estimate(2.0, None, None, 2, "undefined in some resamples: no interval")


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([], Estimate(None, None, None, 0, "no prompt has a value")),
        ([[math.nan, 1.0]], Estimate(None, None, None, 0, "no prompt has a value")),
        ([[0.0, 0.0]], Estimate(None, None, None, 0, "no prompt has a value")),
        ([[1.0, 0.0]] * 2, Estimate(None, None, None, 2, "no prompt has a value")),
        ([[3.0, 1.0], [math.nan, 1.0]], Estimate(3.0, None, None, 1, "one prompt: no interval")),
        ([[3.0, 1.0]] * 4, Estimate(3.0, 3.0, 3.0, 4, POINT)),
    ],
)
def test_degenerate_inputs_are_said(rows: list[list[float]], wanted: Estimate) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimate(ratio, np.array(rows).reshape(-1, 2)) == wanted


def test_pairing_takes_what_is_common_out() -> None:
    """A is B and one more everywhere: the difference is certain, though both vary."""
    generator = np.random.default_rng(0)
    base = generator.normal(0, 5, 200)
    noise = generator.normal(0, 0.1, 200)
    ours, theirs = mean_rows(base + 1 + noise), mean_rows(base)
    found = difference(ratio, ours, theirs)
    assert found.value == pytest.approx(1 + noise.mean())
    assert found.high - found.low < 0.05
    apart = [estimate(ratio, rows) for rows in (ours, theirs)]
    assert all(one.high - one.low > 1 for one in apart)
    assert difference(ratio, theirs, theirs) == Estimate(0.0, 0.0, 0.0, 200, POINT)


# ---- likelihood and order ----


@pytest.mark.parametrize("rewards", [True, False])
def test_scores_are_the_eager_ones(rewards: bool) -> None:
    model = spread(make_model(len(TOKENIZER)))
    records = [record_from_row(row) for row in make_rows(7, rewards=rewards)]
    before = model.forward
    scores, tokens = candidate_scores(model, TOKENIZER, records, batch_size=6)
    assert model.forward == before, "detached"
    for record, own, sizes in zip(records, scores, tokens, strict=True):
        prompt = TOKENIZER(record.prompt)["input_ids"]
        for completion, score, size in zip(record.completions, own, sizes, strict=True):
            ids = [*TOKENIZER(completion, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
            assert size == len(ids)
            with torch.no_grad():
                logps = model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
            wanted = sum(float(logps[len(prompt) - 1 + k, token]) for k, token in enumerate(ids)) / size
            assert score == pytest.approx(wanted, abs=1e-5)
    one = candidate_scores(model, TOKENIZER, records, batch_size=1)[0]
    shared = candidate_scores(model, TOKENIZER, records, batch_size=6, layout="shared")[0]
    for own, other in zip(scores, shared, strict=True):
        assert other == pytest.approx(own, abs=1e-5)
    assert [s for own in one for s in own] == pytest.approx([s for own in scores for s in own], abs=1e-5)


@pytest.mark.parametrize(("layout", "rows"), [("padded", 16), ("padded", 5), ("shared", 16)])
def test_the_same_response_twice_is_a_tie(layout: str, rows: int) -> None:
    """To the last bit, wherever in a batch the two stand."""
    draw = random.Random(0)
    records = []
    for number in range(20):
        texts = [" ".join(draw.choices(REFERENCE.split(), k=draw.randint(1, 9))) for _ in range(3)]
        texts.append(texts[0])
        draw.shuffle(texts)
        records.append(RankedRecord(" ".join(draw.choices(REFERENCE.split(), k=number + 1)), tuple(texts)))
    model = make_model(len(TOKENIZER), hidden_size=64, num_hidden_layers=3)
    scores, _ = candidate_scores(model, TOKENIZER, records, batch_size=rows, layout=layout)
    for record, own in zip(records, scores, strict=True):
        assert len(set(own)) == len(set(record.completions)) == 3


def test_what_was_cut_and_how_rows_were_laid_out_is_said() -> None:
    """A long prompt loses its beginning, a long response its end; single responses have no prompt to share."""
    model = spread(make_model(len(TOKENIZER), max_position_embeddings=40))
    long = " the cat sat on a mat" * 6
    records = [RankedRecord(f"say{long}", (" a cat", " a dog")), RankedRecord("say", (long, " a dog"))]
    for prefix in ("", "Good:"):
        notes: list[str] = []
        candidate_scores(model, TOKENIZER, records, max_prompt_length=12, answer_prefix=prefix, notes=notes)
        assert notes == [
            "likelihood and ranking: 1 of 2 prompts and 1 responses were cut (max_length 40, max_prompt_length 12)"
        ]
    notes = []
    records = [RankedRecord("say " * 9, (" a cat", " a dog", " a")), RankedRecord("say " * 9, (" a",))]
    candidate_scores(model, TOKENIZER, records, batch_size=3, layout="auto", notes=notes)
    assert notes == ["likelihood and ranking: auto took shared rows for 1 of 2 batches"]


def test_a_model_that_says_nan_is_refused() -> None:
    model = make_model(len(TOKENIZER))
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENIZER(" joy", add_special_tokens=False)["input_ids"][0]] = torch.nan
    records = [RankedRecord("a", ("x", "y")), RankedRecord("a", ("the joy of it", "y"), source="f:2")]
    with pytest.raises(ValueError, match=r"model: expected finite log-probabilities of its responses, got \["):
        candidate_scores(model, TOKENIZER, records)


@pytest.mark.parametrize("chat", [False, True])
def test_a_prefix_is_read_and_not_scored(chat: bool) -> None:
    prefix = "A helpful answer:"
    if chat:
        tokenizer = chat_tokenizer(SHAPES["mistral"])  # a blank of the template's stands in front
        prompt: Any = MESSAGES
        text, end = "<s>[INST] Hi [/INST] Yes?</s>[INST] Why? [/INST] A helpful answer:", "</s>"
    else:
        tokenizer, prompt = TOKENIZER, "a dog"
        text, end = "<s>a dogA helpful answer:", "</s>"
    model = spread(make_model(len(tokenizer)))
    record = RankedRecord(prompt, ("Yes, I think.", " Be kind."))
    scores, tokens = candidate_scores(model, tokenizer, [record], answer_prefix=prefix)
    for own, size, answer in zip(scores[0], tokens[0], (" Yes, I think.", " Be kind."), strict=True):
        front, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer + end))
        with torch.no_grad():
            logps = model(torch.tensor([[*front, *ids]])).logits[0].double().log_softmax(-1)
        wanted = sum(float(logps[len(front) - 1 + k, token]) for k, token in enumerate(ids)) / len(ids)
        assert (own, size) == (pytest.approx(wanted, abs=1e-5), len(ids))


def test_order_by_hand() -> None:
    records = [
        RankedRecord("a", ("x", "y", "z"), (5.0, 1.0, 1.0)),  # leads 4, 4, 0: two kept, two ordered
        RankedRecord("b", ("x", "y"), (0.0, 4.0)),  # ranked against its rewards
        RankedRecord("c", ("x", "y", "z")),
        RankedRecord("d", ("x",)),
        RankedRecord("e", ("x", "y")),
    ]
    scores = [[-1.0, -2.0, -0.5], [-1.0, -2.0], [-1.0, -2.0, -3.0], [-1.0], [-1.0, -1.0]]
    tokens = [[2, 1, 1], [1, 1], [4, 1, 1], [3], [1, 1]]
    found = likelihood_values(records, scores, tokens)
    assert found == {
        "nll": [2.0, 1.0, 4.0, 3.0, 1.0],
        "nll_tokens": [2.0, 1.0, 4.0, 3.0, 1.0],
        "pairs": [3.0, 1.0, 3.0, 0.0, 1.0],
        "kept": [2.0, 1.0, 3.0, 0.0, 1.0],
        "kept_correct": [1.0, 1.0, 3.0, 0.0, 0.5],
        "ordered": [2.0, 1.0, 3.0, 0.0, 1.0],
        "correct": [1.0, 0.0, 3.0, 0.0, 0.5],
        "concordance": [0.0, -1.0, 3.0, 0.0, 0.0],
        "tau": [0.0, -1.0, pytest.approx(1.0), None, None],
    }
    signed = likelihood_values(records, scores, tokens, noise_rule="signed", reward_margin=4.5)
    assert signed["kept"] == [0.0, 0.0, 3.0, 0.0, 1.0]


def test_tau_of_a_prompt_is_scipy_s() -> None:
    generator = random.Random(0)
    records, scores = [], []
    for number in range(20):
        size = generator.randint(2, 6)
        rewards = tuple(float(generator.randint(0, 4)) for _ in range(size))
        records.append(RankedRecord(f"p{number}", ("x",) * size, rewards))
        scores.append([generator.uniform(-3, 0) for _ in range(size)])
    found = likelihood_values(records, scores, [[1] * len(own) for own in scores])
    for record, own, tau in zip(records, scores, found["tau"], strict=True):
        wanted = kendalltau(record.rewards, own).statistic if len(set(record.rewards or ())) > 1 else None
        assert tau == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize("rewards", [(16777216.0, 16777217.0), (1.0, 1.0 + 1e-12)])
def test_rewards_that_only_float64_tells_apart_are_a_tie(rewards: tuple[float, float]) -> None:
    records = [RankedRecord("p", ("x", "y"), rewards), RankedRecord("q", ("x", "y", "z"), (*rewards, -1.0))]
    found = likelihood_values(records, [[-1.0, -2.0], [-1.0, -2.0, -3.0]], [[1] * 2, [1] * 3])
    assert (found["ordered"], found["tau"][0]) == ([0.0, 2.0], None)
    assert found["tau"][1] == pytest.approx(kendalltau([1, 1, 0], [3, 2, 1]).statistic)


def test_figures_are_the_trainer_s(tmp_path: Any) -> None:
    """Ranking accuracy and pooled tau of an evaluation by `CLHATrainer`, on the same rows."""
    model = spread(make_model(len(TOKENIZER)))
    ours = trainer(tmp_path, model, eval_drop_inert=False)
    wanted = ours.evaluate()
    records = [record_from_row(row) for row in make_rows(8, seed=6)]
    values = likelihood_values(records, *candidate_scores(model, TOKENIZER, records))
    sums = {name: sum(v for v in column if v is not None) for name, column in values.items()}
    assert sums["kept_correct"] / sums["kept"] == pytest.approx(wanted["eval_rewards/accuracies"])
    assert sums["concordance"] / sums["ordered"] == pytest.approx(wanted["eval_kendall_tau"])
    assert sums["kept"] / sums["pairs"] == pytest.approx(wanted["eval_kept_pair_share"])


def test_a_missing_package_is_named() -> None:
    calls = {
        "nltk": "bleu.published_bleu(['a'], ['a'])",
        "sacrebleu": "bleu.corpus_statistics(['a'], ['a'])",
        "scipy": "intervals.estimate(intervals.ratio, numpy.array([[0.0, 1.0], [1.0, 1.0]]))",
    }
    source = f"""
import sys
sys.modules.update(dict.fromkeys({list(calls)!r}))
import numpy
from clha_fast.evaluation import bleu, intervals
for call in {list(calls.values())!r}:
    try:
        eval(call)
    except ImportError as error:
        print(error)
"""
    for line, package in zip(forked.output("bare", source).splitlines(), calls, strict=True):
        assert line.endswith(f": {package} is not installed; pip install 'clha-fast[eval]' brings it")

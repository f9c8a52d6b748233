"""The names that users import: none may go without a word in the changelog."""

from __future__ import annotations

import importlib

import pytest

import clha_fast

NAMES = {
    "clha_fast": """
        METRIC_NAMES PRESETS PUBLISHED Attached BackendError CLHALoss CLHAMetrics CLHAOptions CPOOptions CoHOptions
        DPOOptions HeadOptions HingeOptions IPOOptions LinearLoss ORPOOptions Objective PROOptions PolicyOptions
        RRHFOptions RankingInputs SFTOptions SimPOOptions VocabShard __version__ attach linear_clha_loss linear_loss
        ranking_loss token_logps
    """,
    "clha_fast.hf": """
        CLHAConfig CLHATrainer CandidateBatch HeadInfo RankedCollator RankedDataset RankedStream Ranking RewardConfig
        RewardTrainer RolloutConfig RolloutTrainer Scorer TokenBudgetSampler TokenScores UnsupportedHeadError
        UnsupportedLayoutError fused_head inspect_head rank score
    """,
    "clha_fast.reference": """
        LOSSES clha_loss coh_loss cpo_loss dpo_loss hinge_loss ipo_loss logits loss orpo_loss policy_loss pro_loss
        rrhf_loss sft_loss simpo_loss token_logps token_statistics
    """,
    "clha_fast.objectives": """
        OBJECTIVES CLHAOptions CPOOptions CoHOptions DPOOptions Group HingeOptions IPOOptions ORPOOptions Objective
        PROOptions Plan PolicyOptions RRHFOptions SFTOptions SimPOOptions Terms Totals as_objective register
    """,
    "clha_fast.evaluation": "Comparison Estimate Evaluation compare evaluate",
    "clha_fast.generation": """
        Answer EncodedPrompt Generated Generation GenerationBackend GenerationError GenerationInterrupted
        GenerationSettings TransformersBackend encode_prompts generate_answers load_backend read_answers trained_lead
        trained_prefix write_answers
    """,
    "clha_fast.data": """
        FORMATS ConvertCounts RankedRecord RecordError convert iter_records make_record plain_template read_records
        record_from_row render_prompt
    """,
}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_there_and_no_other_is_promised(module):
    found = importlib.import_module(module)
    names = NAMES[module].split()
    assert sorted(found.__all__) == sorted(names)
    for name in names:
        assert getattr(found, name) is not None


def test_what_is_promised_can_be_found_by_looking():
    assert set(clha_fast.__all__) <= set(dir(clha_fast))

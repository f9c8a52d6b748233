"""Mixtures of experts, vision-language models and encoder-decoders: the text head right, or refused in a sentence."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedModel,
)

import clha_fast
from clha_fast.batching.batch import CandidateBatch
from clha_fast.models.attach import Attached
from clha_fast.models.heads import UnsupportedHeadError
from clha_fast.models.router import auxiliary_coefficient
from tests.support.adapters import (
    OPTIONS,
    TOKENIZER,
    Measured,
    attach,
    collate,
    compare,
    eager_loss,
    gradients,
    measure,
    stir,
)
from tests.support.versions import needs

V = len(TOKENIZER)
TEXT: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 1, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
QWEN_TOKENS = {
    "image_token_id": V - 1,
    "video_token_id": V - 2,
    "vision_start_token_id": V - 3,
    "vision_end_token_id": V - 4,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
VLMS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **VISION, "num_hidden_layers": 2},
        "image_token_index": V - 1,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "gemma3": {
        "text_config": {**TEXT, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": V - 1,
        "boi_token_index": V - 2,
        "eoi_token_index": V - 3,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "hidden_size": 16, "out_hidden_size": 32},
        **QWEN_TOKENS,
    },
    "idefics3": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": VISION,
        "image_token_id": V - 1,
        "scale_factor": 2,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "projection_dim": 32,
        "image_token_index": V - 1,
    },
    "qwen3_vl_moe": {
        "text_config": {
            **TEXT,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "router_aux_loss_coef": 0.37,
        },
        "vision_config": {**QWEN_VISION, "hidden_size": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    },
}
ROUTED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.37, "router_jitter_noise": 0.3},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8, "aux_loss_coef": 0.37},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.37},
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "router_aux_loss_coef": 0.37,
    },
}


def vlm(name: str) -> PreTrainedModel:
    if name == "paligemma":
        needs("transformers", "5.9", "wants token_type_ids of PaliGemma in training")
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **VLMS[name])
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.float32).train()


def routed(name: str) -> PreTrainedModel:
    if name == "dbrx":
        needs("transformers", "5.15", "gives DBRX's router the width of its experts")
    torch.manual_seed(0)
    own = {"vocab_size": V, "pad_token_id": 2} if name == "dbrx" else TEXT
    config = AutoConfig.for_model(name, **own, **ROUTED[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).train()
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize("name", [name for name in VLMS if name != "qwen3_vl_moe"])
def test_the_text_head_of_a_vision_language_model(name: str) -> None:
    measured = compare(vlm(name))
    assert measured.right, measured
    assert not measured.chunks


def test_images_go_to_the_model_with_the_batch() -> None:
    """16 places for an image in front of every prompt; its values are a further keyword."""
    model, batch = vlm("llava"), collate()
    rows, width = batch.input_ids.shape
    image = torch.full((rows, 16), V - 1)
    shifted = CandidateBatch(
        **{
            **batch.as_dict(),
            "input_ids": torch.cat([image, batch.input_ids], 1),
            "attention_mask": torch.cat([torch.ones_like(image), batch.attention_mask], 1),
            "row_index": batch.row_index + 16 * (batch.row_index // width + 1),
        }
    )
    pixels = {"pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    wanted = eager_loss(lambda **inputs: model(**inputs, **pixels), shifted)
    assert wanted.item() != pytest.approx(eager_loss(model, batch).item(), rel=1e-3)
    expected = gradients(model, wanted)
    with attach(model) as attached:
        loss = model(**shifted.as_dict(), **pixels).loss
        assert measure(wanted, expected, loss, gradients(model, loss), attached).right


def with_router(model: nn.Module, attached: Attached | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(loss, auxiliary loss) of a model that is asked for its router's logits."""
    batch = collate()
    torch.manual_seed(seed)
    if attached is not None:
        output = model(**batch.as_dict(), output_router_logits=True)
        return output.loss, output.aux_loss
    seen: list[Tensor] = []

    def call(**inputs: Any) -> Any:
        output = model(**inputs, output_router_logits=True)
        seen.append(output.aux_loss)
        return output

    loss = eager_loss(call, batch)
    return loss + 0.37 * seen[0], seen[0]


def routed_like_eager(model: nn.Module) -> Measured:
    wanted, auxiliary = with_router(model)
    assert auxiliary.item() > 0.5
    expected = gradients(model, wanted)
    with attach(model) as attached:
        loss, got = with_router(model, attached)
        assert got.item() == pytest.approx(auxiliary.item(), rel=1e-6)
        return measure(wanted, expected, loss, gradients(model, loss), attached)


@pytest.mark.parametrize("name", [*ROUTED, "qwen3_vl_moe"])
def test_the_routers_loss_has_its_coefficient(name: str) -> None:
    model = vlm(name) if name in VLMS else routed(name)
    measured = routed_like_eager(model)
    assert measured.right, measured
    # And it is the coefficient of the model's own loss, which it adds where it is given labels.
    model.eval()
    ids = collate().model_inputs()
    with torch.no_grad():
        plain, whole = (
            model(**ids, labels=ids["input_ids"], use_cache=False, output_router_logits=asked)
            for asked in (False, True)
        )
    assert float((whole.loss - plain.loss) / whole.aux_loss) == pytest.approx(auxiliary_coefficient(model), rel=1e-4)


def test_jitter_is_drawn_in_training_only() -> None:
    model = routed("mixtral")
    with attach(model) as attached:
        first, again, other = (float(with_router(model, attached, seed)[0].detach()) for seed in (1, 1, 2))
        assert first == again != other
        model.eval()
        assert float(with_router(model, attached, 1)[0].detach()) == float(with_router(model, attached, 2)[0].detach())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["body", "head"])
def test_adapters_on_a_mixture_of_experts(targets: list[str]) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    measured = routed_like_eager(stir(peft.get_peft_model(routed("mixtral"), config)).train())
    assert measured.right, measured
    assert measured.chunks == ("lm_head" in targets)


def test_an_unknown_coefficient_is_not_guessed() -> None:
    model = nn.Module()
    model.config = LlamaConfig(**TEXT)
    with pytest.raises(ValueError, match=r"aux_loss: expected its coefficient as router_aux_loss_coef"):
        auxiliary_coefficient(model)


def test_encoder_decoders_are_refused() -> None:
    config = AutoConfig.for_model("t5", vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(UnsupportedHeadError, match=r"T5ForConditionalGeneration .* whose decoder wants decoder_input"):
        clha_fast.attach(model, OPTIONS)


def test_a_model_that_needs_an_image_is_refused() -> None:
    text = {"model_type": "opt", "vocab_size": V, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    config = AutoConfig.for_model(
        "blip-2",
        text_config={**text, "num_attention_heads": 2, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        vision_config=VISION,
        qformer_config={**VISION, "encoder_hidden_size": 16},
        num_query_tokens=2,
        image_token_index=V - 1,
    )
    model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UnsupportedHeadError, match=r"does not run on token ids alone \(.*'pixel_values'\)"):
        clha_fast.attach(model, OPTIONS)

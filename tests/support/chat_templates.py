"""Chat templates in the shapes that models come with, and a tokenizer trained for each; holds no test."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Why is the sky blue on a clear day? system user assistant model",
    "Air scatters short wavelengths of sunlight most, so blue light reaches us from everywhere.",
    "Because it reflects the sea, I think. Be kind. Yes? Hi",
]


@dataclass(frozen=True)
class Shape:
    """`prompt` and `closing` are what must come of MESSAGES and stand behind the text of a response.

    Attributes:
        eos: the tokenizer's EOS. special: its other special tokens, BOS first where `has_bos`.
        before: a blank that the template itself puts between prompt and response.
    """

    template: str
    prompt: str
    closing: str
    special: tuple[str, ...] = ()
    eos: str = "</s>"
    has_bos: bool = False
    before: str = ""


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_PROMPT = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
)
IM = ("<|im_start|>", "<|im_end|>")
HEADS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

MESSAGES = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
)

SHAPES = {
    "chatml": Shape(CHATML, CHATML_PROMPT, "<|im_end|>", IM, "<|endoftext|>"),
    # The tokenizer's EOS is the end of turn itself, as it is in most chat models.
    "chatml, eos": Shape(CHATML, CHATML_PROMPT, "<|im_end|>", IM[:1], "<|im_end|>"),
    "default system prompt": Shape(
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML,
        "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML_PROMPT,
        "<|im_end|>",
        IM,
        "<|endoftext|>",
    ),
    "llama 3": Shape(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        HEADS,
        "<|end_of_text|>",
        has_bos=True,
    ),
    "gemma": Shape(
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{% if role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        has_bos=True,
    ),
    "mistral": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] Hi [/INST] Yes?</s>[INST] Why? [/INST]",
        "</s>",
        ("<s>",),
        has_bos=True,
        before=" ",
    ),
    "zephyr": Shape(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>\nHi</s>\n<|assistant|>\nYes?</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
        "</s>",
    ),
    "two ends": Shape(  # an end of turn, then one of the dialogue
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|user|>\nHi<|end|>\n<|assistant|>\nYes?<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
        "<|end|>",
        ("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "newline inside the turn": Shape(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        CHATML_PROMPT.replace("<|im_end|>", "\n<|im_end|>"),
        "\n<|im_end|>",
        IM,
    ),
    "generation marks": Shape(  # the template's author counts the newline as generated
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        CHATML_PROMPT,
        "<|im_end|>\n",
        IM,
    ),
    "generation marks without the end": Shape(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        CHATML_PROMPT,
        "<|im_end|>",
        IM,
    ),
    "empty thoughts": Shape(  # before an answer without thoughts, as the prompt for one has them
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        "{% if '</think>' in m['content'] %}{% set parts = m['content'].split('</think>') %}"
        "{{ '<think>\n' + parts[0].split('<think>')[1].strip() + '\n</think>\n\n' + parts[1].strip() }}"
        "{% else %}<think>\n\n</think>\n\n{{ m['content'] }}{% endif %}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        CHATML_PROMPT + "<think>\n\n</think>\n\n",
        "<|im_end|>",
        IM,
    ),
    "no generation prompt": Shape(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
        CHATML_PROMPT,
        "<|im_end|>",
        IM,
    ),
    "no end of turn": Shape(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "user: Hi\n\nassistant: Yes?\n\nuser: Why?\n\nassistant: ",
        "</s>",
    ),
}


def chat_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens and the template of `shape`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*shape.special, shape.eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    bos = {"bos_token": shape.special[0]} if shape.has_bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=shape.eos, **bos)
    fast.chat_template = shape.template
    return fast


def blank_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts a blank in front of every text, as Llama 2's and Mistral's do, with the Mistral template."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    byte = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *byte], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = SHAPES["mistral"].template
    return fast

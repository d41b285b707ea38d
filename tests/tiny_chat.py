"""Tiny language models with a tokenizer of their own, written as Transformers directories; and dialogues to learn."""

import json
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from tiny_text import WORDS

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["\n", "sort", "and", "then", "is", "it", "so", "system", "user", "assistant", "be", "brief", "again", "thanks"]
VOCABULARY = [*SPECIAL, *PLAIN, *WORDS, *(word for words in WORDS.values() for word in words)]
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(VOCABULARY),
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.3,
}


def tokenizer(template: str = "", bos: bool = False) -> tf.PreTrainedTokenizerFast:
    """One token for each word and each line break; white space beside is dropped."""
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s]+"), behavior="removed", invert=True)
    if bos:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[4:],
        model_max_length=64,
    )
    if template:
        fast.chat_template = template
    return fast


def causal(name: str, max_length: int = 64) -> torch.nn.Module:
    """A language model of this architecture, width 32, two layers."""
    torch.manual_seed(0)
    if name == "gpt2":
        config = tf.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=len(VOCABULARY),
            n_positions=max_length,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
            initializer_range=0.3,
        )
        return tf.GPT2LMHeadModel(config).eval()
    make = {
        "llama": (tf.LlamaForCausalLM, tf.LlamaConfig),
        "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config),
        "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config),
    }[name]
    more = {"head_dim": 8, "final_logit_softcapping": 2.0} if name == "gemma2" else {}
    return make[0](make[1](**_SIZES, **more, max_position_embeddings=max_length)).eval()


def tiny_causal(path: Path, name: str = "llama", template: str = "", bos: bool = False, max_length: int = 64) -> Path:
    """The directory of a language model with its tokenizer."""
    causal(name, max_length).save_pretrained(path)
    tokenizer(template, bos).save_pretrained(path)
    return path


def pairs(n_rows: int = 240, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts and answers: "sort rain and bread" is answered by the topics, "weather then food"."""
    generator = torch.Generator().manual_seed(seed)
    topics = list(WORDS)
    found = []
    for _ in range(n_rows):
        (one, first), (two, second) = (
            (topic := topics[int(torch.randint(3, (1,), generator=generator))], WORDS[topic]) for _ in range(2)
        )
        x, y = (words[int(torch.randint(10, (1,), generator=generator))] for words in (first, second))
        found.append((f"sort {x} and {y}", f"{one} then {two}"))
    return found


def chat_table(path: Path, n_rows: int = 240, seed: int = 0) -> Path:
    """`pairs` as JSON Lines with the columns prompt and completion."""
    rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs(n_rows, seed)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path

"""Real Transformers classes with random weights and a few thousand parameters, and inputs for them."""

from collections.abc import Callable

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 40
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # the same numbers in every run


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**_SIZES, **_QUIET))


def roberta() -> nn.Module:
    return tf.RobertaForSequenceClassification(tf.RobertaConfig(**_SIZES, **_QUIET))


def distilbert() -> nn.Module:
    config = tf.DistilBertConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=VOCABULARY, max_position_embeddings=32
    )
    return tf.DistilBertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = tf.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return tf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES, num_key_value_heads=1))


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(tf.T5Config(**_T5))


def mixtral() -> nn.Module:
    config = tf.MixtralConfig(**_SIZES, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    return tf.MixtralForCausalLM(config)


def vit() -> nn.Module:
    config = tf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        **_QUIET,
    )
    return tf.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "mixtral": mixtral,
    "vit": vit,
}
DECODERS = ("gpt2", "llama", "t5", "mixtral")


def batch(name: str, generator: torch.Generator, *, labels: bool = True, n: int = 3) -> dict[str, Tensor]:
    """A batch of keywords for the model of this name, with labels if wanted."""
    if name == "vit":
        found = {"pixel_values": torch.randn(n, 3, 8, 8, generator=generator)}
        return found | {"labels": torch.arange(n) % 2} if labels else found
    ids = torch.randint(3, VOCABULARY, (n, 7), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found["attention_mask"][0, :2] = 0  # padding on the left of one row
    if not labels:
        return found
    return found | {"labels": torch.arange(n) % 2 if name in ("bert", "roberta", "distilbert") else ids}

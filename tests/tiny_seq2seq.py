"""Tiny encoder-decoders with a tokenizer of their own, written as Transformers directories; and pairs to learn."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import processors

import tiny_chat

N_WORDS = len(tiny_chat.VOCABULARY)
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "vocab_size": N_WORDS,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 7,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 3,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": N_WORDS,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 3,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "init_std": 0.3,
}
MAKE: dict[str, Any] = {
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "t5_gated": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, scale_decoder_outputs=False)
    ),
    "mt5": lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**_T5)),
    "umt5": lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**_T5)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**_BART)),
    "m2m100": lambda: tf.M2M100ForConditionalGeneration(tf.M2M100Config(**_BART)),
    "led": lambda: tf.LEDForConditionalGeneration(tf.LEDConfig(**_BART, attention_window=[4, 4])),
}
PADDED = ("led",)


def seq2seq(name: str) -> Any:
    """An encoder-decoder of this architecture, width 32, frozen."""
    torch.manual_seed(0)
    model = MAKE[name]().eval().requires_grad_(False)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def tokenizer(end: bool = True) -> tf.PreTrainedTokenizerFast:
    """One token for each word; with `end` every text gets a </s>."""
    fast = tiny_chat.tokenizer()
    if end:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 3)]
        )
    return fast


def tiny_seq2seq(path: Path, name: str = "t5") -> Path:
    """The directory of an encoder-decoder with its tokenizer."""
    seq2seq(name).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def pair_table(path: Path, n_rows: int = 240, seed: int = 0) -> Path:
    """`tiny_chat.pairs` as JSON Lines with the columns source and target."""
    rows = [json.dumps({"source": source, "target": target}) for source, target in tiny_chat.pairs(n_rows, seed)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path

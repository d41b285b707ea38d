"""stories260K: a real Llama of 264,000 parameters that writes simple stories, from llama2.c's files, with its tokens.

Format: seven int32 (width, inner width, layers, heads, key heads, tokens, longest text), then float32 matrices, each
kind for all layers together. Its rotary embedding turns neighbours, Transformers' turns halves: rows of q and k move.
The tokenizer is SentencePiece's BPE: of each token a score, a length, its bytes.
"""

import struct
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sides.jobs import DATA

FOLDER = DATA / "stories260k"


def stories() -> tuple[Any, Any]:
    """Model and tokenizer."""
    raw = (FOLDER / "stories260K.bin").read_bytes()
    width, inner, n_layers, n_heads, n_keys, n_tokens, longest = struct.unpack("7i", raw[:28])
    flat = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=28).copy())
    narrow, half = width * n_keys // n_heads, width // n_heads // 2
    shapes = {
        "embed_tokens": (n_tokens, width),
        "input_layernorm": (n_layers, width),
        "self_attn.q_proj": (n_layers, width, width),
        "self_attn.k_proj": (n_layers, narrow, width),
        "self_attn.v_proj": (n_layers, narrow, width),
        "self_attn.o_proj": (n_layers, width, width),
        "post_attention_layernorm": (n_layers, width),
        "mlp.gate_proj": (n_layers, inner, width),
        "mlp.down_proj": (n_layers, width, inner),
        "mlp.up_proj": (n_layers, inner, width),
        "norm": (width,),
    }
    values: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        part, flat = flat[:size].view(shape), flat[size:]
        if name in ("embed_tokens", "norm"):
            values[f"model.{name}.weight"] = part
            continue
        if name.endswith(("q_proj", "k_proj")):
            part = part.view(n_layers, -1, half, 2, width).transpose(2, 3).reshape(shape)
        values |= {f"model.layers.{k}.{name}.weight": part[k] for k in range(n_layers)}
    config = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_keys,
        max_position_embeddings=longest,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    missing, more = model.load_state_dict(values, strict=False)
    assert missing == ["lm_head.weight"] and not more
    model.tie_weights()
    return model.eval(), _tokenizer(n_tokens, longest)


def _tokenizer(n_tokens: int, longest: int) -> Any:
    raw = (FOLDER / "tok512.bin").read_bytes()
    place, pieces = 4, list[tuple[str, float]]()
    for _ in range(n_tokens):
        score, size = struct.unpack_from("<fi", raw, place)
        pieces.append((raw[place + 8 : place + 8 + size].decode().replace(" ", "▁"), score))
        place += 8 + size
    pieces[:3] = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    numbers = {piece: k for k, (piece, _) in enumerate(pieces)}
    cuts = [
        (score, piece[:k], piece[k:])
        for piece, score in pieces[259:]
        for k in range(1, len(piece))
        if piece[:k] in numbers and piece[k:] in numbers
    ]
    merges = [(left, right) for _, left, right in sorted(cuts, key=lambda cut: -cut[0])]
    own = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    own.decoder = decoders.Sequence(strip)
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=longest, **marks)

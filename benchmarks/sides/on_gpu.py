"""The sides of gpu.py, each in a process of its own: lorakit's learner, and peft with Trainer at several settings.

All train the same Llama with random weights, on the same rows, with a rank for every matrix; a row's second half is
what is learned. `python -m sides.on_gpu SETTING` waits for numbers of steps on stdin, a line each.
"""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

RANK, BATCH, RATE, VOCABULARY, LONGEST, N_ROWS = 16, 16, 1e-4, 32000, 1024, 2048
Steps = Callable[[int], tuple[int, list[float]]]  # number of steps -> real tokens, losses


def base(shape: list[int], dtype: torch.dtype, device: str) -> Any:
    """A Llama of so many blocks and this width, random, the same for every side."""
    import transformers as tf

    tf.utils.logging.set_verbosity_error()
    depth, width = shape
    heads = max(2, width // 64)
    config = tf.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        intermediate_size=width * 11 // 4,
        vocab_size=VOCABULARY,
        max_position_embeddings=LONGEST,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return tf.LlamaForCausalLM(config).to(dtype).eval()


def rows() -> list[list[int]]:
    """Texts of random tokens; lengths as instructions have them: most short, a few long."""
    draw = random.Random(0)
    lengths = [min(LONGEST, max(16, round(draw.lognormvariate(5.2, 0.8)))) for _ in range(N_ROWS)]
    return [[draw.randrange(3, VOCABULARY) for _ in range(n)] for n in lengths]


def lorakit(setting: dict[str, Any]) -> Steps:
    """What `lorakit fit` runs for every step."""
    import lorakit as lk
    from lorakit.data.batches import Tokens, training_batches
    from lorakit.fit.budget import MOST_TOKENS
    from lorakit.fit.learner import Learner
    from lorakit.fit.settings import Settings
    from lorakit.tasks.generate import Generate
    from lorakit.trunk import Trunk

    device, dtype, texts = torch.device(setting["device"]), setting.get("dtype", "bf16"), rows()
    reads = [tuple(range(len(ids) // 2 - 1, len(ids) - 1)) for ids in texts]
    labels = [tuple(ids[place + 1] for place in places) for ids, places in zip(texts, reads)]
    tokens = Tokens(texts, labels, reads, range(len(texts)), 0)
    model = base(setting["shape"], torch.float32 if dtype == "fp32" else torch.bfloat16, setting.get("made_on", "cpu"))
    model.to(device)
    lk.attach(model, lk.plan(model, rank=RANK, scale=1.0), seed=0)
    trunk = Trunk(model, dtype=dtype, keep=False).__enter__()
    settings = Settings(learning_rate=RATE, batch_size=BATCH, tokens_per_pass=MOST_TOKENS[device.type], prefix="off")
    learner = Learner(model, Generate(), trunk, settings)
    batches = training_batches(tokens, BATCH, 0, 0, bool(trunk.why_padded))
    at = 0

    def steps(n: int) -> tuple[int, list[float]]:
        nonlocal at
        done = [learner.step(tokens, batches[(at + k) % len(batches)], RATE) for k in range(n)]
        at += n
        return sum(one.n_tokens for one in done), [one.loss for one in done]

    return steps


def peft(setting: dict[str, Any]) -> Steps:
    """peft with Trainer in bf16; `plain`: factors in bf16 too; `flat`: rows end to end, by flash attention 2."""
    import transformers as tf
    from peft import LoraConfig, get_peft_model

    if setting.get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if setting.get("unsloth"):
        model = _by_unsloth(setting)
    else:
        model = base(setting["shape"], torch.bfloat16, setting.get("made_on", "cpu")).to(setting["device"])
        model.set_attn_implementation("flash_attention_2" if setting.get("flat") else "sdpa")
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config, autocast_adapter_dtype=not setting.get("plain"))
    data = [{"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]} for ids in rows()]
    turn = 0

    def steps(n: int) -> tuple[int, list[float]]:
        nonlocal turn
        begin = (turn * n * BATCH) % (len(data) - n * BATCH)
        turn += 1
        pad = tf.DataCollatorWithFlattening() if setting.get("flat") else _padded
        seen: list[int] = []

        def collate(features: list[dict[str, Any]]) -> Any:
            seen.append(sum(len(entry["input_ids"]) for entry in features))
            return pad(features)

        args = tf.TrainingArguments(
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=BATCH,
            max_steps=n,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            bf16=setting["device"] != "cpu",
            use_cpu=setting["device"] == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            optim="adamw_torch_fused",
            train_sampling_strategy="random" if setting.get("flat") else "group_by_length",
        )
        part = data[begin : begin + n * BATCH]
        done = tf.Trainer(model=model, args=args, train_dataset=part, data_collator=collate).train()
        return sum(seen[:n]), [float(done.training_loss)]

    return steps


def _padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows filled up to a multiple of 8."""
    longest = -(-max(len(entry["input_ids"]) for entry in features) // 8) * 8
    filled = {"input_ids": (0, "input_ids"), "labels": (-100, "labels"), "attention_mask": (0, None)}
    return {
        name: torch.tensor(
            [
                (list(entry[key]) if key else [1] * len(entry["input_ids"]))
                + [fill] * (longest - len(entry["input_ids"]))
                for entry in features
            ]
        )
        for name, (fill, key) in filled.items()
    }


def _by_unsloth(setting: dict[str, Any]) -> Any:
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        base(setting["shape"], torch.bfloat16, setting.get("made_on", "cpu")).save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=False
        )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=RANK, target_modules=names)


def main() -> None:
    """Answers each number of steps with seconds, tokens, losses, and the peak of the GPU's memory."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    setting = json.loads(sys.argv[1])
    on_gpu = setting["device"] != "cpu"
    steps = {"lorakit": lorakit, "peft": peft}[setting["side"]](setting)
    for line in sys.stdin:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        n_tokens, losses = steps(int(line))
        if on_gpu:
            torch.cuda.synchronize()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - began, "tokens": n_tokens, "losses": losses}
        answer["peak"] = torch.cuda.max_memory_allocated() if on_gpu else 0
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

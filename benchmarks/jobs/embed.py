"""embed: bank questions (banking77: 77 classes); those of a class are to lie near each other. MiniLM.

The peer is sentence-transformers with its MultipleNegativesRankingLoss: pip install sentence-transformers datasets.
"""

import numpy as np
import torch

from lorakit.data import Splits
from lorakit.data.matches import Matches, load_matches
from lorakit.fit import fit
from lorakit.rules import plan
from lorakit.tasks.base import load_base
from lorakit.tasks.embed import Embed
from sides.clock import Clock
from sides.jobs import DATA, SCALE, package_model
from sides.recipe import arguments

PEER = "peft, sentence-transformers"
METRIC = "recall at 1"
STEPS = 40

_BATCH, _RANK, _RATE, _TEMPERATURE = 32, 8, 1e-3, 0.05


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    train, test = _rows()
    base = load_base("minilm")
    clock = Clock()
    fitted = fit(
        base,
        Splits(train, test.take(range(0, len(test), 20)), test),
        "embed",
        plan=plan(base.model, rank=_RANK, scale=SCALE),
        temperature=_TEMPERATURE,
        batch_size=_BATCH,
        learning_rate=_RATE,
        schedule="linear",
        warmup=0.0,
        max_steps=steps,
        seed=seed,
        consume=True,
        watch=clock,
    )
    return {"metric": fitted.metrics["recall_at_1"], **clock.spent}


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft and sentence-transformers, on the pairs of one epoch of ours."""
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, models
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    train, test = _rows()
    base = load_base("minilm")
    task = Embed(base.pool, base.max_length)
    examples = task.examples(train, base.tokenizer, truncate=False)
    examples.begin(seed, 0)
    text = dict(zip((own[0] for own in examples.members), train.queries))
    torch.manual_seed(seed)
    trunk = models.Transformer(package_model())
    pooling = models.Pooling(trunk.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[trunk, pooling, models.Normalize()], device="cpu")
    matrices = ["query", "key", "value", "dense"]
    lora = LoraConfig(r=_RANK, lora_alpha=int(SCALE * _RANK), target_modules=matrices, task_type="FEATURE_EXTRACTION")
    model.add_adapter(lora)
    args = Arguments(**arguments(_BATCH, steps, _RATE, seed))
    pairs = [{"anchor": text[one], "positive": text[other]} for one, other in examples.members]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(pairs),
        loss=MultipleNegativesRankingLoss(model, scale=1 / _TEMPERATURE),
    )
    clock = Clock()
    clock.begin()
    trainer.train()
    clock.end()
    vectors = torch.tensor(np.asarray(model.encode(list(test.queries))))
    held_out = task.examples(test, base.tokenizer, truncate=False)
    return {"metric": task.metrics(vectors, held_out)["recall_at_1"], **clock.spent}


def _rows() -> tuple[Matches, Matches]:
    """Questions to learn from, and those to find others of their class among."""
    train, test = (load_matches(DATA / "banking77" / f"{part}.csv") for part in ("train", "test"))
    return train, test

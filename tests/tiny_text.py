"""A tiny BERT with a tokenizer of its own, written as a Transformers directory; and small tables to learn from."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lorakit.data import load_splits
from lorakit.tasks.base import load_base

WORDS = {
    "weather": ["rain", "sun", "cloud", "storm", "snow", "wind", "fog", "hail", "frost", "heat"],
    "food": ["bread", "soup", "rice", "apple", "cheese", "salt", "bean", "cake", "plum", "honey"],
    "tools": ["saw", "nail", "drill", "hammer", "file", "screw", "bolt", "glue", "plane", "rope"],
}


def tiny_bert(path: Path, seed: int = 0, max_length: int = 24) -> Path:
    """Two layers, width 32, pooled by the mean. Its vocabulary is that of `WORDS`."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    corpus = [" ".join(words) for words in WORDS.values()] + ["i like the and a very much"]
    tokenizer.train_from_iterator(corpus, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
    )
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=max_length,
            initializer_range=0.3,  # wide, so that an untrained trunk tells words apart
        )
    )
    model.save_pretrained(path)
    fast.save_pretrained(path)
    (path / "1_Pooling").mkdir()  # as sentence-transformers writes it
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    return path


def table(path: Path, n_rows: int = 90, seed: int = 0) -> Path:
    """Labelled sentences: the label is the topic of their words."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    lines = ["text,label"]
    labels = list(WORDS)
    for row in range(n_rows):
        label = labels[row % 3]
        words = [WORDS[label][draw(10)] for _ in range(2 + draw(4))]
        lines.append(f"i like {' and '.join(words)},{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def told_topics(n_rows: int, seed: int = 0) -> list[tuple[str, str, str, str]]:
    """Pairs of texts: a text, a second text, the topic of each."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n_rows):
        topics = draw.choices(list(WORDS), k=2)
        own, other = (" and ".join(draw.choices(WORDS[topic], k=3)) for topic in topics)
        rows.append((f"i like {own}", f"the {other}", *topics))
    return rows


def small_task(n_rows: int, max_length: int = 24) -> tuple[Any, Any, Any]:
    """Fixtures for a module: `place`, a directory with base/ and data.csv; the loaded `base`; the split `data`."""

    @pytest.fixture(scope="module")
    def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("task")
        tiny_bert(folder / "base", max_length=max_length)
        table(folder / "data.csv", n_rows)
        return folder

    @pytest.fixture(scope="module")
    def base(place: Path) -> Any:
        return load_base(str(place / "base"))

    @pytest.fixture(scope="module")
    def data(place: Path) -> Any:
        return load_splits(place / "data.csv")

    return place, base, data

"""Bases: files that are missing, broken, or of different models are refused with the reason and the way out."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import lorakit as lk
from lorakit.errors import DataError, FitError, LorakitError, UsageError
from lorakit.tasks.base import Base, load_base
from tiny_image import tiny_vit
from tiny_text import small_task, tiny_bert

place, base, data = small_task(60)


def copy_of(place, name, *files):
    """A base of its own with these files of the usual one; all if none are named."""
    folder = place / name
    shutil.copytree(place / "base", folder, ignore=lambda _, names: [x for x in names if files and x not in files])
    return folder


def test_a_base_whose_files_do_not_go_together_is_refused(place):
    more = copy_of(place, "more_tokens")
    tokenizer = load_base(str(more)).tokenizer
    tokenizer.add_tokens(["alimentum"])
    tokenizer.save_pretrained(more)
    with pytest.raises(
        LorakitError, match=r"has 1 tokens, e.g. 'alimentum', beyond the \d+ rows of the model's embedding"
    ):
        load_base(str(more))
    other = copy_of(place, "other_shape")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(
        LorakitError, match=r"intermediate.dense.\w+' is 64.* in the files of .* its config.json wants 48"
    ):
        load_base(str(other))
    short = copy_of(place, "cut_short")
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(LorakitError, match="cannot load the base .*damaged, cut short or of another model"):
        load_base(str(short))
    with pytest.raises(LorakitError, match="is a file; the base is a Transformers directory"):
        load_base(str(place / "data.csv"))
    with pytest.raises(LorakitError, match=r"there is no directory '\./nothing'"):
        load_base("./nothing")


def test_a_weight_of_the_base_that_is_not_finite_is_named(place, data):
    broken = load_base(str(place / "base"))
    broken.model.encoder.layer[1].output.dense.weight.data[3, 4] = float("nan")
    with pytest.raises(
        FitError, match=r"the weight 'encoder\.layer\.1\.output\.dense\.weight' of the base is not finite"
    ):
        lk.fit(broken, data, epochs=1)


def test_a_base_that_cannot_read_or_write_is_refused(place):
    blank = copy_of(place, "blank", "config.json", "model.safetensors")
    with pytest.raises(LorakitError, match="the tokenizer of '.*blank' knows no word: its files"):
        load_base(str(blank))
    with pytest.raises(LorakitError, match="is a bert model, which does not write text"):
        load_base(str(place / "base"), head="causal")
    tiny_vit(place / "vit")
    for name, head in ((str(place / "vit"), "none"), (str(place / "vit"), "causal"), (f"{place / 'vit'}+b", "both")):
        with pytest.raises(
            LorakitError, match=r"vit' is a vit model, which takes images and reads no text.*TEXT\+IMAGE"
        ):
            load_base(name, head=head)
    with pytest.raises(LorakitError, match="cannot load the base 'no/such': .* check the name and the connection"):
        load_base("no/such")


def test_a_base_whose_files_lack_weights_is_refused(place):
    tiny_bert(place / "broken")
    config = json.loads((place / "broken" / "config.json").read_text())
    (place / "broken" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(LorakitError, match=r"lack \d+ weights of a BertModel.*random numbers"):
        load_base(str(place / "broken"))


def test_the_longest_text_is_what_the_positions_hold(place):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.RobertaConfig(vocab_size=100, max_position_embeddings=34, pad_token_id=1, **sizes)
    transformers.RobertaModel(config).save_pretrained(place / "roberta")
    words = load_base(str(place / "base")).tokenizer
    words.model_max_length = 10**30
    words.save_pretrained(place / "roberta")
    assert load_base(str(place / "roberta")).max_length == 32
    assert Base(None, words, "b", "cls", words.model_max_length).max_length == 1 << 20
    assert words(["rain " * 100], truncation=True, max_length=1 << 20)["input_ids"]


def test_a_base_of_the_hub_is_used_as_its_own_files_say(place, tmp_path):
    folder = tmp_path / "models--some--encoder"
    shutil.copytree(place / "base", folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / "1_Pooling" / "config.json").unlink()
    wishes = {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}
    wishes["sentence_bert_config.json"] = {"max_seq_length": 11}
    code = (
        "from lorakit.tasks.base import load_base; base = load_base('some/encoder'); print(base.pool, base.max_length)"
    )
    for written, told in (({}, f"cls {load_base(str(place / 'base')).max_length}"), (wishes, "mean 11")):
        for name, values in written.items():
            (folder / "snapshots" / "abc" / name).write_text(json.dumps(values))
        env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == told


def test_wishes_that_mean_nothing_for_a_base_are_refused(place):
    with pytest.raises(UsageError, match="head 'both' takes no pool, max_length; load each by itself and join them"):
        load_base("a+b", head="both", pool="cls", max_length=8)
    with pytest.raises(UsageError, match="head 'vision' takes no source_prefix"):
        load_base("a", head="vision", source_prefix="b")


def test_a_long_text_brings_no_warning_of_transformers_beside_our_own_words(place, base, monkeypatch):
    from transformers import AutoTokenizer, tokenization_utils_base

    warned = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda text, *_: warned.append(text))
    plain, long = AutoTokenizer.from_pretrained(place / "base"), "rain " * 200
    rows = {"train": [{"text": f"{long} {k}", "label": "ab"[k % 2]} for k in range(40)]}
    known = Base(base.model, AutoTokenizer.from_pretrained(place / "base"), "own", "cls", base.max_length)
    for found in (load_base(str(place / "base")), known):
        with pytest.raises(DataError, match="it has 203 tokens, and 24 are the most"):
            lk.fit(found, rows, max_steps=1)
    assert warned == []
    plain(long)
    assert "longer than the specified maximum" in warned[0]

"""Bases: files that are missing, broken, or of different models are refused with the reason and the way out."""

import json
import shutil

import pytest

import lorakit as lk
from lorakit.errors import FitError, LorakitError
from lorakit.tasks.base import load_base
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

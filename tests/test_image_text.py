"""The task image_text: two bases, one head; equal to plain torch, it needs both halves, and everything a run is for."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image as Pillow

import lorakit as lk
from lorakit.cli import main
from lorakit.data import load_splits
from lorakit.errors import DataError, UsageError
from lorakit.fit.use import open_run
from lorakit.tasks.base import load_base
from lorakit.tasks.image_text import ImageText, both
from lorakit.tasks.vision import image_base
from tiny_image import arrays, cnn, tiny_vit
from tiny_text import WORDS, tiny_bert

QUICK = {"epochs": 8, "batch_size": 8, "learning_rate": 1e-2, "dtype": "fp32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with bert/, vit/ and data.csv: what the text is about, and if the shape is flat."""
    path = tmp_path_factory.mktemp("pair")
    tiny_bert(path / "bert")
    tiny_vit(path / "vit")
    lines = ["image,text,label"]
    topics = list(WORDS)[:2]
    for k, (pixels, shape) in enumerate(zip(*arrays(180))):
        Pillow.fromarray(pixels).save(path / f"{k}.png")
        topic = topics[k // 3 % 2]
        words = f"i like {WORDS[topic][k % 10]} and {WORDS[topic][k // 7 % 10]}"
        lines.append(f"{k}.png,{words},{topic} {'flat' if shape == 'flat' else 'high'}")
    (path / "data.csv").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def data(place):
    return load_splits(place / "data.csv", read=ImageText.read)


def bases(place, name="vit"):
    image = image_base(cnn(), "cnn", size=(16, 16)) if name == "cnn" else load_base(str(place / "vit"), head="vision")
    return both(load_base(str(place / "bert")), image)


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_loss_and_gradients_are_those_of_plain_torch(place, data, name):
    base = bases(place, name)
    task = ImageText.of(data, base)
    task.prepare(base.model)
    paths = lk.attach(base.model, task.plan(base.model, rank=4, trained=("classifier",)), seed=0)
    assert {path.split(".")[0] for path in paths} == {"text", "image"}
    generator = torch.Generator().manual_seed(3)
    learning = {name: p for name, p in base.model.named_parameters() if p.requires_grad}
    for parameter in learning.values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    examples = task.examples(data.test, base.tokenizer, truncate=False)
    batch = examples.gather(range(8))
    ids, mask = batch.tokens.segments.padded(batch.tokens.ids, examples.pad)
    words = base.model.text(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[:, :, None].float()
    text = (words * weights).sum(1) / weights.sum(1)
    pixels = batch.pixels.pixels
    model = base.model.image
    image = model(pixels).mean((2, 3)) if name == "cnn" else model(pixel_values=pixels).last_hidden_state[:, 0]
    wanted = F.cross_entropy(base.model.classifier(torch.cat([text, image], -1)), batch.labels, reduction="sum")
    expected = torch.autograd.grad(wanted, list(learning.values()))
    with task.trunk(base.model, dtype="fp32", pad=examples.pad) as trunk:
        assert trunk.why_padded == ""
        loss = task.loss(base.model, batch.hidden(trunk), batch)
        found = torch.autograd.grad(loss, list(learning.values()))
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    size = max(float(g.abs().max()) for g in expected)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected)) < 1e-4 * size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_learns_from_both_halves_and_leaves_the_bases_as_they_were(place, data, dtype):
    base = bases(place)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    result = lk.fit(base, data, "image_text", **{**QUICK, "dtype": dtype})
    assert result.metrics["accuracy"] >= 0.8  # of 18 rows; neither half alone tells more than two thirds of them
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.slow
def test_a_run_is_used_and_passes_change_nothing(place, data, tmp_path):
    brief = {**QUICK, "epochs": 2}
    result = lk.fit(bases(place), data, "image_text", out=tmp_path / "run", **brief)
    small = lk.fit(bases(place), data, "image_text", tokens_per_pass=60, **brief)
    assert small.records[0]["loss"] == pytest.approx(result.records[0]["loss"], rel=1e-5)
    n = result.records[0]["n_tokens"]
    assert n > 8 * 17 + 8 * 6  # patches, and tokens of the texts
    found = lk.evaluate(tmp_path / "run", data.test)
    assert found.metrics == pytest.approx(result.metrics, abs=1e-2)
    asked = [(place / "0.png", "i like rain"), (Pillow.open(place / "1.png"), "i like soup")]
    guesses = lk.predict(tmp_path / "run", asked)
    assert [set(guess.probabilities) for guess in guesses] == [set(data.labels)] * 2
    assert guesses[0].text == f"{place / '0.png'} | i like rain"
    adapter, task = open_run(tmp_path / "run")
    assert type(task).from_note(json.loads(json.dumps(task.note()))) == task
    assert any(path.startswith("image.") for path in adapter.layers)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(place, data, tmp_path):
    def kill(record, total):
        if record.kind == "step" and record.step == 22:
            raise KeyboardInterrupt

    brief = {**QUICK, "epochs": 3}
    whole = lk.fit(bases(place), data, "image_text", **brief)
    with pytest.raises(KeyboardInterrupt):
        lk.fit(bases(place), data, "image_text", out=tmp_path / "run", watch=kill, **brief)
    again = lk.fit(bases(place), data, "image_text", out=tmp_path / "run", resume=True, **brief)
    assert again.adapter == whole.adapter


def test_the_report_names_a_command_that_can_work(place, tmp_path, capsys):
    run = str(tmp_path / "run")
    words = ["fit", f"{place / 'bert'}+{place / 'vit'}", str(place / "data.csv"), "--task", "image_text", "--out", run]
    assert main([*words, "--max-steps", "1"]) == 0
    assert f"lorakit predict {run} rows.csv  |" in capsys.readouterr().out
    (tmp_path / "rows.csv").write_text(f"image,text\n{place / '0.png'},i like rain\n")
    assert main(["predict", run, str(tmp_path / "rows.csv")]) == 0


def test_what_cannot_work_is_said(place, data, tmp_path):
    with pytest.raises(UsageError, match=r"does not name two bases; write TEXT\+IMAGE"):
        load_base(str(place / "bert"), head="both")
    with pytest.raises(UsageError, match="needs two bases, and this is one BertModel"):
        lk.fit(load_base(str(place / "bert")), data, "image_text", **QUICK)
    with pytest.raises(DataError, match="row 2 is no pair of an image and a text"):
        ImageText.asked([(place / "0.png", "x"), "only a text"])
    table = tmp_path / "bad.csv"
    table.write_text("image,text,label\nnowhere.png,hello,yes\n")
    with pytest.raises(DataError, match=r"row 2: column 'image' names 'nowhere.png'"):
        ImageText.read(table)
    table.write_text("image,text,label\nnowhere.png,,yes\n")
    with pytest.raises(DataError, match=r"row 2: column 'text' is empty"):
        ImageText.read(table)
    table.write_text(f"image,text,text2,label\n{place / '0.png'},hello,bye,yes\n")
    with pytest.raises(
        DataError, match="'text' and 'text2', and here each row is one text; name its column with --text"
    ):
        ImageText.read(table)
    assert ImageText.read(table, text="text2").texts.texts == ("bye",)
    with pytest.raises(DataError, match="'demo:support_train' has no column with a usual name for the image"):
        ImageText.read("demo:support_train")
    long = replace(data.train, texts=replace(data.train.texts, texts=("rain " * 40,) * len(data.train)))
    with pytest.raises(DataError, match="144 of 144 texts are longer than 24 tokens"):
        lk.fit(bases(place), replace(data, train=long), "image_text", **QUICK)


def test_rows_in_memory_and_a_dataset_directory_are_what_the_table_is(place, data, tmp_path, monkeypatch):
    import csv

    import pyarrow

    monkeypatch.chdir(place)
    with open("data.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert load_splits(rows, read=ImageText.read).train.digest() == data.train.digest()
    table = pyarrow.Table.from_pylist([{**row, "image": (place / row["image"]).read_bytes()} for row in rows])
    (tmp_path / "set").mkdir()
    with pyarrow.ipc.new_stream(str(tmp_path / "set" / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    assert load_splits(tmp_path / "set", read=ImageText.read).train.digest() == data.train.digest()


@pytest.mark.slow
def test_the_command_line_fits_predicts_evaluates_and_merges(place, tmp_path):
    def lorakit(*words):
        command = [sys.executable, "-m", "lorakit", *map(str, words)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out, table = tmp_path / "run", place / "data.csv"
    brief = ("--epochs", 3, "--learning-rate", 0.01, "--dtype", "fp32")
    lorakit("fit", f"{place / 'bert'}+{place / 'vit'}", table, "--task", "image_text", "--out", out, *brief)
    report = lorakit("evaluate", out, table, "--text", "text", "--image", "image")
    assert "180 rows" in report
    assert len(lorakit("predict", out, table).splitlines()) == 180
    lorakit("merge", out, "--out", tmp_path / "merged")
    assert (tmp_path / "merged" / "image" / "config.json").is_file()
    again = lorakit("evaluate", tmp_path / "merged", table)
    first, second = (float(text.split()[1].rstrip("%")) for text in (report, again))
    assert first == pytest.approx(second, abs=2)  # per cent; perhaps in bf16

"""The task image: equal to plain torch, it learns, the base stays as it was, and everything a run is used for."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from PIL import Image as Pillow
from torch import nn

import lorakit as lk
from lorakit.data import load_splits
from lorakit.data.images import load_images, make_images
from lorakit.data.rows import Rows
from lorakit.errors import DataError, LorakitError, PlanError, UsageError
from lorakit.fit.use import open_run
from lorakit.tasks.base import load_base
from lorakit.tasks.image import Image
from lorakit.tasks.vision import image_base, pooled
from lorakit.trunk import Trunk
from tiny_image import arrays, cnn, cnn_base, folder, tiny_convnext, tiny_resnet, tiny_vit

QUICK = {"epochs": 8, "batch_size": 8, "learning_rate": 1e-2, "dtype": "fp32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with vit/, resnet/, convnext/ and images/."""
    path = tmp_path_factory.mktemp("image")
    tiny_vit(path / "vit")
    tiny_resnet(path / "resnet")
    tiny_convnext(path / "convnext")
    folder(path / "images", 150)
    return path


@pytest.fixture(scope="module")
def data(place):
    return load_splits(place / "images", read=Image.read)


def base_of(place, name):
    if name == "cnn":
        return image_base(cnn(), "cnn", size=(16, 16))
    base = load_base(str(place / name), head="vision")
    if base.tokenizer.size != (16, 16):  # a ResNet's configuration says no size
        base = replace(base, tokenizer=replace(base.tokenizer, size=(16, 16)))
    return base


def perturbed(model):
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def plainly(name, model, pixels):
    """The logits, written out."""
    if name == "cnn":
        vectors = model(pixels).mean((2, 3))
        return model.classifier.linear(vectors)
    found = model(pixel_values=pixels)
    vectors = found.last_hidden_state[:, 0] if name == "vit" else found.pooler_output.flatten(1)
    return model.classifier(vectors)


@pytest.mark.parametrize("name", ["vit", "resnet", "convnext", "cnn"])
def test_loss_and_gradients_are_those_of_plain_torch(place, data, name):
    base = base_of(place, name)
    task = Image.of(data, base)
    pixels = task.examples(data.test, base.tokenizer, truncate=False)
    task.prepare(base.model)
    lk.attach(base.model, task.plan(base.model, rank=4, trained=("classifier",)), seed=0)
    perturbed(base.model)
    batch = pixels.gather(range(8))
    learning = {name: p for name, p in base.model.named_parameters() if p.requires_grad}
    logits = plainly(name, base.model, batch.pixels)
    assert float(logits.detach().std()) > 0.01
    wanted = F.cross_entropy(logits, batch.labels, reduction="sum")
    expected = torch.autograd.grad(wanted, list(learning.values()))
    with task.trunk(base.model, dtype="fp32", pad=0) as trunk:
        assert bool(trunk.why_padded) is False
        hidden = batch.hidden(trunk)
        loss = task.loss(base.model, hidden, batch)
        found = torch.autograd.grad(loss, list(learning.values()))
        scores = task.scores(base.model, batch.hidden(trunk), batch)
    assert torch.allclose(scores, logits, atol=1e-4)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    size = max(float(g.abs().max()) for g in expected)
    assert size > 0.01
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected)) < 1e-4 * size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["vit", "resnet", "cnn"])
def test_it_learns_and_leaves_the_base_as_it_was(place, data, name, dtype):
    base = base_of(place, name)
    base.model.train()  # as somebody may have left it: batch norms must not gather statistics
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    result = lk.fit(base, data, "image", **{**QUICK, "epochs": 16, "dtype": dtype})
    assert result.before["accuracy"] <= 0.5
    assert result.metrics["accuracy"] >= 0.8  # of 15 images
    assert result.summary["padded"] == ""
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert base.model.training and not hasattr(base.model, "classifier")


def test_digits_are_learned_by_a_small_network():
    data = load_splits("demo:digits", read=Image.read)
    base = cnn_base(channels=1)  # nothing but random convolutions: what is learned is in rank 8 and the head
    result = lk.fit(base, data, "image", epochs=6, learning_rate=2e-2, batch_size=32)
    assert result.metrics["accuracy"] > 0.9


def test_half_precision_keeps_statistics_in_full(place, data):
    base = base_of(place, "resnet")
    task = Image.of(data, base)
    norm = next(m for m in base.model.modules() if isinstance(m, nn.BatchNorm2d))
    conv = next(m for m in base.model.modules() if isinstance(m, nn.Conv2d))
    with task.trunk(base.model, dtype="bf16", pad=0) as trunk:
        assert norm.running_var.dtype == norm.weight.dtype == torch.float32
        assert conv.weight.dtype == torch.bfloat16
        states = trunk.seen(torch.zeros(2, 3, 16, 16)).last_hidden_state
        assert states.dtype == torch.bfloat16
    assert conv.weight.dtype == torch.float32


@pytest.mark.slow
def test_passes_are_cut_by_patches_with_the_same_result(place, data):
    few, many = (
        lk.fit(base_of(place, "vit"), data, "image", **{**QUICK, "epochs": 2}, tokens_per_pass=n) for n in (40, 4096)
    )
    assert few.records[0]["n_tokens"] == 8 * 17  # 16 patches and a class token each
    assert few.records[0]["loss"] == pytest.approx(many.records[0]["loss"], rel=1e-5)
    for (path, a), b in zip(few.adapter.layers.items(), many.adapter.layers.values()):
        assert torch.allclose(a.factors["b"], b.factors["b"], atol=2e-3), path


@pytest.mark.slow
def test_the_run_directory_serves_predict_and_evaluate(place, data):
    out = place / "run"
    result = lk.fit(str(place / "vit"), str(place / "images"), "image", out=out, **QUICK)
    assert lk.evaluate(out, data.test).metrics == pytest.approx(result.metrics, abs=1e-2)  # perhaps in bf16
    assert lk.evaluate(out, place / "images").n_rows == 150
    some = sorted((place / "images" / "tall").iterdir())[:4]
    found = lk.predict(out, some)
    assert [one.label for one in found].count("tall") >= 3
    assert found[0].text == str(some[0])
    assert sum(found[0].probabilities.values()) == pytest.approx(1, abs=1e-5)
    again = lk.predict(out, [Pillow.open(some[0]), np.asarray(Pillow.open(some[1])), some[2].read_bytes()])
    for one, other in zip(found, again):
        assert one.probability == pytest.approx(other.probability, abs=1e-4)


def test_the_adapter_of_a_vit_gives_the_same_logits_in_peft(place, data):
    from peft import PeftModel

    out = place / "for_peft"
    lk.fit(str(place / "vit"), data, "image", out=out, **QUICK)
    adapter, task = open_run(out)
    ours, theirs = (load_base(str(place / "vit"), head="vision") for _ in range(2))
    batch = task.examples(data.test, ours.tokenizer, truncate=False).gather(range(len(data.test)))
    for base in (ours, theirs):
        task.prepare(base.model)
    lk.attach(ours.model, adapter)
    peft_model = PeftModel.from_pretrained(theirs.model, str(out / "adapter")).eval()
    with torch.no_grad(), task.trunk(ours.model, dtype="fp32", pad=0) as trunk:
        expected = task.scores(ours.model, batch.hidden(trunk), batch)
        states = peft_model(pixel_values=batch.pixels).last_hidden_state
        found = peft_model.base_model.model.classifier(states[:, 0])
    assert float((expected - found).abs().max()) < 1e-4
    assert float(expected.std()) > 0.1


def test_a_network_of_ones_own_runs_as_a_whole_whatever_its_parts_are_called():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model, self.neck = cnn(), nn.Conv2d(32, 20, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.neck(self.base_model(x)))

    own, pixels = Own().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad(), Trunk(own, shape=(3, 16, 16)) as trunk:
        found = trunk.seen(pixels)
    torch.testing.assert_close(found, own(pixels), rtol=1e-4, atol=1e-5)


class Dense(nn.Module):
    """As DenseNet: it runs its own classifier."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.maps, self.classifier = cnn(), classifier

    def forward(self, x):
        return self.classifier(self.maps(x).mean((2, 3)))


@pytest.mark.parametrize("own", [nn.Identity(), nn.Linear(32, 3), nn.Linear(32, 8)])
def test_a_network_with_a_classifier_of_its_own_is_refused_as_it_is_and_goes_in_wrapped(data, own):
    torch.manual_seed(0)
    net = Dense(own)
    with pytest.raises(UsageError, match=r"'classifier' of its own, .*; wrap it, .*: nn\.Sequential\(model\)"):
        lk.fit(image_base(net, "dense", size=(16, 16)), data, "image", **QUICK)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = lk.fit(image_base(nn.Sequential(net), "dense", size=(16, 16)), data, "image", **QUICK, max_steps=4)
    assert "0.maps.0" in result.adapter.layers and "classifier.linear.weight" in result.adapter.trained
    assert net.classifier is own and net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_patches_that_a_network_does_not_pool_are_pooled_by_their_mean():
    patches = torch.randn(2, 5, 3)
    assert torch.equal(pooled(patches, "own"), patches.mean(1))
    assert torch.equal(pooled(patches, "mean"), patches.mean(1))
    assert torch.equal(pooled(patches, "cls"), patches[:, 0])


def test_a_network_of_ones_own_is_used_again_by_giving_it(place, data, tmp_path):
    result = lk.fit(base_of(place, "cnn"), data, "image", out=tmp_path / "run", **QUICK)
    assert {layer.kind for layer in result.adapter.layers.values()} == {"conv2d"}
    assert "classifier.linear.weight" in result.adapter.trained
    found = lk.evaluate(tmp_path / "run", data.test, base=base_of(place, "cnn"))
    assert found.metrics == pytest.approx(result.metrics, abs=1e-2)
    model = cnn()  # layer paths are those of the network itself
    task = open_run(tmp_path / "run")[1]
    task.prepare(model)
    lk.attach(model, result.adapter)
    assert not torch.equal(model(torch.ones(1, 3, 16, 16)), cnn()(torch.ones(1, 3, 16, 16)))


def test_a_killed_run_goes_on_to_the_same_end(place, data, tmp_path):
    def kill(record, total):
        if record.kind == "step" and record.step == 20:
            raise KeyboardInterrupt

    brief = {**QUICK, "epochs": 3}
    whole = lk.fit(base_of(place, "resnet"), data, "image", **brief)
    with pytest.raises(KeyboardInterrupt):
        lk.fit(base_of(place, "resnet"), data, "image", out=tmp_path / "run", watch=kill, **brief)
    again = lk.fit(base_of(place, "resnet"), data, "image", out=tmp_path / "run", resume=True, **brief)
    assert again.adapter == whole.adapter and again.metrics == whole.metrics


@pytest.mark.parametrize(
    ("name", "kinds"), [("vit", {"linear"}), ("resnet", {"conv2d"}), ("convnext", {"linear"}), ("cnn", {"conv2d"})]
)
def test_what_holds_the_weights_is_adapted(place, name, kinds):
    model = base_of(place, name).model
    chosen = Image.plan(model).layers
    assert {spec.kind for spec in lk.describe(model) if spec.path in chosen} == kinds
    assert Image.plan(model, 2, "all-conv").layers.keys() == lk.plan(model, 2, "all-conv").layers.keys()


def test_vision_bases_say_how_they_are_pooled(place, tmp_path):
    assert load_base(str(place / "vit"), head="vision").pool == "cls"
    assert load_base(str(place / "vit"), head="vision", pool="mean").pool == "mean"
    assert load_base(str(place / "resnet"), head="vision").pool == "own"
    with pytest.raises(UsageError, match="a matrix, whose place the head takes"):
        load_base(str(place / "vit"), head="vision", pool="own")
    with pytest.raises(UsageError, match="unknown pooling 'max'"):
        load_base(str(place / "vit"), head="vision", pool="max")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sight = {**small, "image_size": 16, "patch_size": 8}
    config = tf.CLIPConfig(text_config={**small, "vocab_size": 40}, vision_config=sight, projection_dim=8)
    tf.CLIPModel(config).save_pretrained(tmp_path / "clip")
    clip = load_base(str(tmp_path / "clip"), head="vision")
    assert clip.pool == "own" and clip.tokenizer.size == (16, 16)
    task = Image.for_images(("a", "b"), make_images([np.zeros((5, 5), np.uint8)]), clip)
    assert (task.width, task.cost, task.shape) == (16, 5, (3, 16, 16))
    text = tf.BertModel(tf.BertConfig(**small, vocab_size=40))
    text.save_pretrained(tmp_path / "bert")
    with pytest.raises(LorakitError, match="is a bert model, which takes no images"):
        load_base(str(tmp_path / "bert"), head="vision")


def test_what_cannot_work_is_said(place, data, tmp_path):
    wrong = image_base(nn.Sequential(nn.Flatten(), nn.Linear(7, 4)), "wrong", channels=3)
    with pytest.raises(LorakitError, match=r"takes no images of 3 x 16 x 16 \(channels, height, width\)"):
        lk.fit(wrong, data, "image", **QUICK)
    with pytest.raises(UsageError, match="no class token"):
        lk.fit(replace(base_of(place, "cnn"), pool="cls"), data, "image", **QUICK)
    own = nn.Sequential(cnn())
    own.add_module("classifier", nn.Identity())
    with pytest.raises(UsageError, match="has a 'classifier' of its own"):
        lk.fit(image_base(own, "own"), data, "image", **QUICK)
    pixels, labels = arrays(30)
    rows = [*pixels[:29], pixels[29][:10]]
    mixed = make_images(rows)
    mixed = replace(mixed, labels=tuple(labels))
    with pytest.raises(DataError, match="'image 30' has 10 x 16 pixels, and the first image 16 x 16"):
        lk.fit(cnn_base(), replace(data, train=mixed), "image", **QUICK)
    with pytest.raises(PlanError, match="no matrix but its head"):
        lk.plan(base_of(place, "resnet").model)
    lk.fit(base_of(place, "cnn"), data, "image", out=tmp_path / "run", **{**QUICK, "epochs": 1})
    stranger = replace(load_images(place / "images"), labels=("cat",) * 150)
    with pytest.raises(DataError, match="label 'cat' was not in the training data"):
        lk.evaluate(tmp_path / "run", stranger, base=base_of(place, "cnn"))
    with pytest.raises(DataError, match="takes Images, and these are Rows"):
        lk.evaluate(tmp_path / "run", Rows(("x",), ("flat",), "x", (1,)), base=base_of(place, "cnn"))


def lorakit(*words):
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_the_command_line_fits_predicts_evaluates_and_merges(place, tmp_path):
    out, merged = tmp_path / "run", tmp_path / "merged"
    images = place / "images"
    brief = ("--epochs", 4, "--learning-rate", 0.01, "--dtype", "fp32", "--rank", 4)
    done = lorakit("fit", place / "vit", images, "--task", "image", "--out", out, *brief)
    assert "3 labels; first image: flat/" in done.stderr and "held-out accuracy" in done.stdout
    assert json.loads((out / "summary.json").read_text())["shape"] == [3, 16, 16]
    one = images / "tall" / "001.png"
    assert "tall/001.png" in lorakit("predict", out, "--say", one).stdout
    assert len(lorakit("predict", out, images / "tall").stdout.splitlines()) == 50
    report = lorakit("evaluate", out, images).stdout
    assert "150 rows" in report
    lorakit("merge", out, "--out", merged)
    assert (merged / "preprocessor_config.json").is_file()
    again = lorakit("evaluate", merged, images).stdout
    first, second = (float(text.split()[1].rstrip("%")) for text in (report, again))
    assert first == pytest.approx(second, abs=2)  # per cent; perhaps in bf16
    assert "all-linear" not in lorakit("plan", place / "convnext", "--task", "image").stderr

"""Images as they lie: folders, tables, archives; what is wrong with them; and what a base gets to see."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.data import load_splits
from lorakit.data.images import load_images, make_images
from lorakit.data.memory import in_memory
from lorakit.data.pixels import Lens, Pixels
from lorakit.errors import DataError, LorakitError
from tiny_image import KINDS, arrays, folder, tiny_vit


def png(pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def read(rows):
    """What a plain base of 16 x 16 would see."""
    return Pixels.of(rows, [0] * len(rows), Lens((16, 16)), 1).kept


def test_every_form_gives_the_same_images(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pixels, labels = arrays(6)
    place = folder(tmp_path / "folders", 6)
    files = [f"folders/{label}/{k:03}.png" for k, label in enumerate(labels)]
    lines = ["image,label", *(f"{file},{label}" for file, label in zip(files, labels))]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    (tmp_path / "table.jsonl").write_text(
        "\n".join(json.dumps({"file_name": file, "category": label}) for file, label in zip(files, labels))
    )
    blobs = [png(one) for one in pixels]
    pyarrow.parquet.write_table(pyarrow.table({"image": blobs, "label": labels}), tmp_path / "bytes.parquet")
    hugging = [{"bytes": blob, "path": None} for blob in blobs]
    pyarrow.parquet.write_table(pyarrow.table({"image": hugging, "label": labels}), tmp_path / "hf.parquet")
    np.savez(tmp_path / "arrays.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "floats.npz", x=np.moveaxis(pixels / 255, 3, 1), y=np.array(labels)[:, None])
    wanted = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for name in ("table.csv", "table.jsonl", "bytes.parquet", "hf.parquet", "arrays.npz", "floats.npz"):
        rows = load_images(tmp_path / name)
        assert list(rows.labels) == labels, name
        assert torch.equal(read(rows), wanted), name
    rows = load_images(place)  # by class
    order = sorted(range(6), key=lambda k: (labels[k], k))
    assert [rows.labels[i] for i in range(6)] == [labels[k] for k in order]
    assert torch.equal(read(rows), wanted[order])
    assert rows.names[0] == "flat/000.png"
    assert load_images(place, labels=False).labels is None
    assert torch.equal(
        read(make_images([*pixels[:1], pixels[1] / 255, blobs[2], Image.fromarray(pixels[3])])), wanted[:4]
    )


def test_rows_in_memory_have_paths_bytes_and_pictures(tmp_path, monkeypatch):
    pixels, labels = arrays(6)
    place = folder(tmp_path / "folders", 6)
    files = [place / label / f"{k:03}.png" for k, label in enumerate(labels)]
    monkeypatch.chdir(place)
    forms = [str(files[0]), str(files[1].relative_to(place)), files[2], png(pixels[3]), Image.open(files[4]), pixels[5]]
    rows = [{"image": form, "label": label} for form, label in zip(forms, labels)]
    found = load_images(in_memory(rows))
    assert list(found.labels) == labels
    assert torch.equal(read(found), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with pytest.raises(DataError, match=r"row 1: column 'image' is float64 4 x 4; give a path.*\n.*row 2: .*is empty"):
        load_images(in_memory([{"image": np.full((4, 4), 2.0), "label": "a"}, {"image": None, "label": "a"}]))


def test_parts_that_are_there_are_used(tmp_path):
    for part, n in (("train", 12), ("val", 6), ("test", 9)):
        folder(tmp_path / "data" / part, n)
    data = load_splits(tmp_path / "data", read=load_images)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [12, 6, 9]
    pixels, labels = arrays(30)
    np.savez(
        tmp_path / "med.npz",
        train_images=pixels[:20],
        train_labels=labels[:20],
        test_images=pixels[20:],
        test_labels=labels[20:],
    )
    data = load_splits(tmp_path / "med.npz", read=load_images)
    assert (len(data.train) + len(data.valid), len(data.test)) == (20, 10)
    np.savez(tmp_path / "keras.npz", x_train=pixels[:20], y_train=labels[:20], x_test=pixels[20:], y_test=labels[20:])
    assert len(load_splits(tmp_path / "keras.npz", read=load_images).test) == 10
    assert load_images(f"{tmp_path / 'keras.npz'}:test").labels == tuple(labels[20:])


def test_a_class_may_be_called_like_a_part(tmp_path):
    pixels, _ = arrays(24)
    for k, one in enumerate(pixels):
        place = tmp_path / ("train", "plane", "car")[k % 3]
        place.mkdir(exist_ok=True)
        Image.fromarray(one).save(place / f"{k}.png")
    assert load_splits(tmp_path, read=load_images).labels == ("car", "plane", "train")
    (tmp_path / "plane").rename(tmp_path / "test")
    (tmp_path / "car").rename(tmp_path / "valid")
    with pytest.raises(DataError, match="train' holds no folders of classes"):
        load_splits(tmp_path, read=load_images)


def test_the_same_image_never_stands_in_two_parts(tmp_path):
    pixels, labels = arrays(60)
    twice, again = np.concatenate([pixels, pixels]), [*labels, *labels]
    np.savez(tmp_path / "twice.npz", images=twice, labels=again)
    data = load_splits(tmp_path / "twice.npz", read=load_images)
    assert not set(data.train.inputs) & {*data.valid.inputs, *data.test.inputs}
    assert data.train.digest() != data.test.digest()
    assert data.labels == tuple(sorted(KINDS))


@pytest.mark.parametrize("picture", [(20, 31, 3), (31, 20, 3), (16, 16)], ids=str)
def test_a_base_sees_what_its_processor_makes(tmp_path, picture):
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(tiny_vit(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, picture, dtype=np.uint8)
    lens = Lens.of(processor)
    assert not lens.exact
    seen = lens.see(pixels)
    assert seen.dtype == np.uint8
    wanted = processor(images=Image.fromarray(pixels).convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.allclose(lens.floats(torch.from_numpy(seen)[None]), wanted, atol=1e-6)


def test_a_processor_with_arithmetic_of_its_own_is_taken_at_its_word():
    class Odd:
        rescale_factor, image_mean, image_std = 1 / 255, [0.5], [0.5]

        def __call__(self, images, return_tensors, **_):
            pixels = np.asarray(images.resize((8, 8)), dtype=np.float32).transpose(2, 0, 1)
            return {"pixel_values": (pixels / 255)[None] ** 2}

    lens = Lens.of(Odd())
    assert lens.exact and lens.size == (8, 8)
    pixels = arrays(1)[0][0]
    seen = lens.floats(torch.from_numpy(lens.see(pixels))[None])
    wanted = np.asarray(Image.fromarray(pixels).resize((8, 8)), dtype=np.float32).transpose(2, 0, 1) / 255
    assert np.allclose(seen[0].numpy(), wanted**2)


def test_a_processor_with_images_of_many_sizes_is_refused():
    class Wide:
        def __call__(self, images, return_tensors, **_):
            return {"pixel_values": np.asarray(images, dtype=np.float32).transpose(2, 0, 1)[None]}

    with pytest.raises(LorakitError, match="Wide makes images of several sizes"):
        Lens.of(Wide())


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1"])
def test_images_of_other_modes_come_in_the_channels_of_the_base(tmp_path, mode):
    gray = arrays(1)[0][0][:, :, 0]
    image = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    image.save(tmp_path / "one.png")
    seen = Pixels.of(make_images([tmp_path / "one.png"]), [0], Lens((16, 16)), 1).kept
    assert seen.shape == (1, 3, 16, 16)
    if mode != "1":
        assert torch.equal(seen[0, 0], torch.from_numpy(gray))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "P clear", "CMYK", "YCbCr", "I;16", "I"])
def test_a_picture_of_pillow_is_seen_as_its_file_is(tmp_path, mode, channels):
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    kind = mode.split()[0]
    if kind.startswith("I"):
        deep = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16 if kind == "I;16" else np.int32)
        image = Image.fromarray(deep)
    else:
        image = colours.convert("LA").convert("PA") if kind == "PA" else colours.convert(kind)
    file = tmp_path / ("one.tif" if kind in ("CMYK", "YCbCr", "PA", "I") else "one.png")
    image.save(file, **({"transparency": bytes(range(256))} if mode == "P clear" else {}))
    opened = Image.open(file)
    assert opened.mode == kind
    seen = [Pixels.of(make_images([one]), [0], Lens((16, 16), channels), 1).kept for one in (file, opened)]
    assert torch.equal(*seen)
    if channels == 3:
        with Image.open(file) as again:
            plain = again if kind.startswith("I") else again.convert("RGBA" if mode == "P clear" else "RGB")
        wanted = np.stack([deep >> 8] * 3, 2) if kind.startswith("I") else np.asarray(plain)[..., :3]
        assert torch.equal(seen[0][0].permute(1, 2, 0), torch.from_numpy(wanted.astype(np.uint8)))


def test_sixteen_bits_become_eight_alike_in_every_image(tmp_path):
    for top in (255, 256, 65535):
        values = np.full((8, 8), 1024, np.uint16) if top > 256 else np.zeros((8, 8), np.uint16)
        values[0, 0], values[1, 1] = top, 200
        Image.fromarray(values).save(tmp_path / f"{top}.png")
        seen = Pixels.of(make_images([tmp_path / f"{top}.png"]), [0], Lens((8, 8)), 1).kept[0, 0]
        assert (int(seen[0, 0]), int(seen[1, 1])) == (top >> 8, 0)
    for values in (np.full((8, 8), 200, np.int32), np.full((8, 8), 65536, np.int32), np.full((8, 8), 0.5, np.float32)):
        Image.fromarray(values).save(tmp_path / "odd.tif")
        with pytest.raises(DataError, match=r"'odd.tif' is an image of (int|float)32 from .*save it with 8 or 16 bits"):
            read(load_images(tmp_path, labels=False).take([3]))


def test_what_does_not_fit_in_memory_is_decoded_by_the_batch(tmp_path, monkeypatch):
    rows = load_images(folder(tmp_path, 9))
    now = Pixels.of(rows, range(9), Lens((8, 8)), 3)
    monkeypatch.setattr("lorakit.data.pixels.available_memory", lambda: 0)
    later = Pixels.of(rows, range(9), Lens((8, 8)), 3)
    assert later.kept is None and now.kept.dtype == torch.uint8
    for places in ([4, 1], [8]):
        assert torch.equal(later.gather(places).pixels, now.gather(places).pixels)
        assert later.gather(places).labels.tolist() == places
    assert later.gather([0, 1]).n_tokens == 6


def spoiled(tmp_path, name):
    """A source with a fault."""
    place = tmp_path / name
    if name == "flat":
        folder(tmp_path / "other", 3)
        place.mkdir()
        Image.fromarray(arrays(1)[0][0]).save(place / "x.png")
    elif name == "parts":
        folder(place / "train", 3)
    elif name == "tables":
        place.mkdir()
        (place / "train.csv").touch()
        (place / "test.npz").touch()
    elif name == "hollow":
        folder(place, 3)
        (place / "none").mkdir()
    elif name == "missing.csv":
        place.write_text("image,label\nnot/here.png,flat\n,tall\n")
    elif name == "unnamed.csv":
        place.write_text("a,b\n1,2\n")
    elif name == "uneven.npz":
        np.savez(place, images=np.zeros((3, 4, 4), np.uint8), labels=[1, 2])
    elif name == "floats.npz":
        np.savez(place, images=np.full((3, 4, 4), 7.0), labels=[1, 2, 3])
    elif name == "other.npz":
        np.savez(place, pictures=np.zeros((3, 4, 4), np.uint8))
    elif name == "parted.npz":
        np.savez(place, x_train=arrays(3)[0], y_train=[1, 2, 3], x_test=arrays(3)[0], y_test=[1, 2, 3])
    elif name == "broken.npz":
        place.write_bytes(b"no archive")
    elif name in ("cut.npz", "torn.npz"):
        np.savez(place, images=arrays(3)[0], labels=[1, 2, 3])
        content = bytearray(place.read_bytes())
        content[500] ^= 1
        place.write_bytes(content[: len(content) // 2] if name == "cut.npz" else content)
    return place


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("flat", "holds no folders of classes; put the images of each class"),
        ("parts", r"holds the parts train; name one of them, as '.*train'"),
        ("tables", r"holds test.npz, train.csv, and no images in folders; name one of them, as '.*test.npz'"),
        ("hollow", "the folder 'none' holds no images"),
        ("missing.csv", r"row 2: column 'image' names 'not/here.png', which is not in"),
        ("unnamed.csv", "no column with a usual name for the image"),
        ("uneven.npz", "3 images and 2 labels"),
        ("floats.npz", "uint8 from 0 to 255 or floats from 0 to 1"),
        ("other.npz", "no array images or image or x for its images; it has pictures"),
        ("parted.npz", "no array images or image or x .*; name one of its parts, as '.*parted.npz:test'"),
        ("broken.npz", "is not a readable NumPy archive"),
        ("cut.npz", "is not a readable NumPy archive"),
        ("torn.npz", "array 'images' cannot be read"),
        ("gone.npz", "does not exist"),
    ],
)
def test_faults_are_named_with_the_way_out(tmp_path, name, told):
    with pytest.raises(DataError, match=told):
        load_images(spoiled(tmp_path, name))


def test_all_damaged_images_are_named_before_training(tmp_path):
    place = folder(tmp_path, 9)
    for name in ("flat/000.png", "tall/001.png"):
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"2 faults(.|\n)*flat/000.png(.|\n)*tall/001.png"):
        read(load_images(place))


def test_python_values_that_are_no_images_are_refused():
    with pytest.raises(DataError, match=r"image 2 is float64 4 x 4; give a path"):
        make_images([np.zeros((4, 4), np.uint8), np.full((4, 4), 2.0)])
    with pytest.raises(DataError, match="there is no image 'nowhere.png'"):
        make_images(["nowhere.png"])


def test_the_demo_has_its_digits():
    rows = load_images("demo:digits")
    assert len(rows) == 1797 and len(set(rows.labels)) == 10
    assert rows.images[0].shape == (8, 8) and rows.images[0].max() > 200

"""Any number of labels for each text: tables, loss and metrics against plain computations, threshold, use, errors."""

import json
from dataclasses import replace

import pyarrow
import pytest
import torch
from pyarrow import parquet

import lorakit as lk
from lorakit.cli import main
from lorakit.data import LabelSets, Rows, Splits, load_label_sets, load_splits
from lorakit.data.batches import Tokens
from lorakit.data.rows import split
from lorakit.errors import DataError, UsageError
from lorakit.fit.learner import Learner
from lorakit.fit.settings import Settings
from lorakit.fit.use import open_run
from lorakit.tasks.base import load_base
from lorakit.tasks.labels import Labels
from lorakit.trunk import Trunk
from tiny_text import tiny_bert, told_topics

QUICK = {"epochs": 10, "batch_size": 16, "learning_rate": 1e-2, "threads": 1}
THREE = (("good and bad", ("a", "b")), ("good", ()), ("bad", ("b",)))

HARD = "saw and drill and rope"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Texts of one or two topics, or of none of them."""
    folder = tmp_path_factory.mktemp("labels")
    tiny_bert(folder / "base")
    lines = []
    for text, other, *topics in told_topics(200):
        found = sorted(set(topics) - {"tools"})  # tools are no label: a row may have none
        lines.append(json.dumps({"text": f"{text} and {other}", "labels": found}))
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(place):
    return load_base(str(place / "base"))


@pytest.fixture(scope="module")
def data(place):
    return load_splits(place / "data.jsonl", read=Labels.read)


@pytest.fixture(scope="module")
def run(place, base, data):
    result = lk.fit(base, data, "labels", out=place / "run", **QUICK)
    assert result.metrics["micro_f1"] > 0.9
    shares = [sum(label in own for own in data.train.labels) / len(data.train) for label in ("food", "weather")]
    truth = [[float(label in own) for label in ("food", "weather")] for own in data.test.labels]
    wanted = torch.nn.functional.binary_cross_entropy(torch.tensor([shares] * len(truth)), torch.tensor(truth))
    assert result.metrics["loss"] < result.before["loss"] == pytest.approx(float(wanted), abs=1e-3)
    return result


@pytest.mark.parametrize("form", ["semicolon", "bar", "comma", "told", "json", "python", "jsonl", "parquet", "flags"])
def test_every_form_gives_the_same_rows(tmp_path, form):
    path, more = tmp_path / "a.csv", {}
    texts, labels = [text for text, _ in THREE], [list(own) for _, own in THREE]
    marks = {"semicolon": "; ", "bar": "|", "comma": ",", "told": " / "}
    if form in marks:
        rows = [f'{text},"{marks[form].join(own)}"' for text, own in THREE]
        path.write_text("\n".join(["text,labels", *rows]), encoding="utf-8")
        more = {"delimiter": "/"} if form == "told" else {}
    elif form in ("json", "python"):
        quoted = [(json.dumps(own).replace('"', '""') if form == "json" else repr(own)) for own in labels]
        path.write_text("\n".join(["text,tags", *(f'{t},"{own}"' for t, own in zip(texts, quoted))]), encoding="utf-8")
    elif form == "jsonl":
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": t, "topics": own}) for t, own in zip(texts, labels)))
    elif form == "parquet":
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table({"text": texts, "labels": labels}), path)
    else:
        path.write_text("text,a,b,c\n" + "".join(f"{t},{int('a' in own)},{int('b' in own)},0\n" for t, own in THREE))
        more = {"labels": "a, b"}
    rows = load_label_sets(path, **more)
    assert rows.texts == tuple(texts)
    assert rows.labels == tuple(own for _, own in THREE)
    assert rows.columns == (("a", "b") if form == "flags" else ())


def test_label_numbers_of_a_dataset_directory_become_names(tmp_path):
    table = pyarrow.table({"text": ["x", "y"], "labels": [[1, 0], []]})
    with pyarrow.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    names = {"_type": "ClassLabel", "names": ["joy", "fear"]}
    for feature in ({"_type": "Sequence", "feature": names}, [names]):
        (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {"labels": feature}}))
        assert load_label_sets(tmp_path).labels == (("fear", "joy"), ())


@pytest.mark.parametrize(
    ("content", "columns", "words"),
    [
        (
            "text,labels\nx,a;b\ny,a|b\nz,a\n",
            {},
            r"column 'labels' has ';' in 1 and '\|' in 1 of 3 rows; .*--delimiter",
        ),
        ("text,labels\nx,a\n", {"delimiter": ""}, "the delimiter is empty"),
        (
            "text,mood\nx,a\n",
            {},
            r"usual name for labels .* its columns are text, mood: .*--label COLUMN, .*--labels A,B",
        ),
        ("text,labels\nx,a\n", {"label": "lables"}, "did you mean 'labels'"),
        (
            "text,a,b\nx,1,2\ny,,0\n",
            {"labels": "a,b"},
            r"row 2: column 'b' is '2'; it must be 0 or 1\n.*row 3: column 'a'",
        ),
        ("text,a,b\nx,1,0\n", {"labels": ["a", "q"]}, "no column 'q'"),
        ("text,a,b\nx,1,0\n", {"labels": "a,a"}, "names 'a' twice"),
        ("text,a,b\nx,1,0\n", {"labels": "a", "label": "b"}, "label is for one column of all; give one of them"),
        ('text,labels\nx,"[a, b"\ny,"[a, b]"\n', {}, r"row 3: column 'labels' is '\[a, b\]', which is no list"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path, content, columns, words):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"(?s){words}"):
        load_label_sets(tmp_path / "a.csv", **columns)


@pytest.mark.parametrize(
    ("cell", "more", "labels"),
    [
        ('"[""\\ud83d\\ude00"", ""b""]"', {}, ("\U0001f600", "b")),
        ("[A];[B]", {"delimiter": ";"}, ("[A]", "[B]")),
        ("[A]", {"delimiter": ";"}, ("[A]",)),
    ],
)
def test_labels_in_brackets_are_json_or_what_a_delimiter_makes_of_them(tmp_path, cell, more, labels):
    (tmp_path / "a.csv").write_text(f"text,labels\nx,{cell}\n", encoding="utf-8")
    assert load_label_sets(tmp_path / "a.csv", **more).labels == (labels,)


def test_null_and_numbers_are_no_labels(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "labels": null}\n{"text": "y", "labels": {"a": 1}}\n')
    with pytest.raises(DataError, match=r"(?s)row 1: column 'labels' is null; .*row 2: column 'labels' is \{'a': 1\}"):
        load_label_sets(tmp_path / "a.jsonl")


def sets(labels, source="s", columns=()):
    n = len(labels)
    return LabelSets(tuple(f"t{k}" for k in range(n)), tuple(labels), source, tuple(range(1, n + 1)), None, columns)


def test_what_cannot_be_learned_or_measured_is_refused():
    train = sets([("a",), ("a", "b")])
    for own, held, words in (
        (train, sets([("c",)], "v"), "'v' row 1: label 'c' does not occur in the training rows; .*--delimiter"),
        (sets([(), ()]), train, "no training row has any label"),
        (sets([("a",)], columns=("a", "z")), sets([("a",)]), "column 'z' is 0 in every training row"),
        (train, replace(train, labels=None), "has no labels"),
        (sets([(), ()]), replace(train, others=train.texts), "^2 faults:\n  - '.*' has pairs of texts, and"),
    ):
        with pytest.raises(DataError, match=words):
            Splits(own, held, held).checked()


def test_a_split_gives_every_part_rows_of_rare_labels():
    rows = sets([("often", "rare") if k % 40 == 0 else ("often",) if k % 3 else () for k in range(200)])
    parts = split(rows, seed=3)
    for part in (parts.train, parts.valid, parts.test):
        assert part.known == {"often", "rare"}
        assert any(not own for own in part.labels)
    with pytest.raises(DataError, match="label 'once' has 1 row; at least 3"):
        split(sets([("often",)] * 20 + [("often", "once")]))


def test_loss_and_gradient_equal_those_of_the_padded_model(base, data):
    """One step of everything that learns, against autograd through Transformers' own forward."""
    import transformers

    task = Labels.of(data, base)
    rows = data.train.take(range(9))
    twin = transformers.AutoModel.from_pretrained(base.name)
    task.prepare(base.model)
    try:
        weight = base.model.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        bias = base.model.classifier.bias.data
        tokens = task.examples(rows, base.tokenizer, truncate=False)
        lk.attach(base.model, lk.plan(base.model, trained=("classifier",)), seed=0)
        with Trunk(base.model, head=task.head, pad=tokens.pad) as trunk:
            learner = Learner(base.model, task, trunk, Settings(learning_rate=1e-3, tokens_per_pass=40, threads=1))
            loss, _ = learner.gradients(tokens, range(9))
            names = learner.flat.named
            found = {n: names[n].grad.clone() for n in names if "classifier" in n}
            learner.close()
        lk.detach(base.model)
    finally:
        del base.model._modules[task.head]
    head = torch.nn.Linear(32, 2)
    head.weight.data.copy_(weight)
    head.bias.data.copy_(bias)
    padded = base.tokenizer(list(rows.texts), padding=True, return_tensors="pt")
    mask = padded["attention_mask"][..., None]
    vectors = (twin(**padded).last_hidden_state * mask).sum(1) / mask.sum(1)
    truth = torch.tensor([[float(label in own) for label in task.labels] for own in rows.labels])
    wanted = torch.nn.BCEWithLogitsLoss()(head(vectors), truth)
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    for name, gradient in found.items():
        own = head.weight.grad if gradient.dim() == 2 else head.bias.grad
        assert torch.allclose(gradient, own, atol=1e-5), name
    assert len(found) == 2


def labelled(tokens, labels):
    """The same texts with other labels."""
    return Tokens(tokens.ids, labels, tokens.reads, tokens.lines, tokens.pad)


def test_metrics_equal_their_definition():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(60, 4, generator=generator)
    truth = torch.rand(60, 4, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.0])
    task = Labels(("a", "b", "c", "d"), threshold=0.6)
    rows = tuple(tuple(map(float, row)) for row in truth.tolist())
    tokens = Tokens(((1,),) * 60, rows, ((),) * 60, tuple(range(60)), 0)
    found = task.metrics(scores, tokens)
    pairs = [
        (1 / (1 + 2.718281828459045**-x) >= 0.6, y)
        for s, t in zip(scores.tolist(), truth.tolist())
        for x, y in zip(s, t)
    ]

    def f1(some):
        hits = sum(said and true for said, true in some)
        return 2 * hits / (sum(said for said, _ in some) + sum(true for _, true in some))

    assert found["micro_f1"] == pytest.approx(f1(pairs))
    assert found["macro_f1"] == pytest.approx(sum(f1(pairs[k::4]) for k in range(4)) / 4)
    right = [all(said == true for said, true in pairs[4 * k : 4 * k + 4]) for k in range(60)]
    assert found["subset_accuracy"] == pytest.approx(sum(right) / 60)
    assert found["loss"] == pytest.approx(float(torch.nn.BCEWithLogitsLoss()(scores, truth.float())))
    none = task.metrics(torch.full((60, 4), -9.0), labelled(tokens, ((0.0,) * 4,) * 60))
    assert (none["micro_f1"], none["macro_f1"], none["subset_accuracy"]) == (0.0, 0.0, 1.0)


def test_the_threshold_is_the_best_on_the_validation_rows():
    scores = torch.tensor([[0.31], [0.29], [0.1], [-2.0]]).logit(eps=1e-6)
    tokens = Tokens(((1,),) * 4, ((1.0,), (1.0,), (0.0,), (0.0,)), ((),) * 4, (1, 2, 3, 4), 0)
    chosen = Labels(("a",)).calibrated(tokens, lambda examples: scores)
    assert chosen.threshold == 0.25  # from 0.15 to 0.25 all is right; nearest to 1/2
    assert Labels.from_note(chosen.note()) == chosen


def test_predict_and_evaluate_a_run(place, base, data, run):
    asked = list(data.test.texts)
    found = lk.predict(place / "run", asked, base=base)
    right = [set(one.labels) == set(own) for one, own in zip(found, data.test.labels)]
    assert run.metrics["subset_accuracy"] == pytest.approx(sum(right) / len(right))
    assert sum(right) > 0.7 * len(right)
    for one in found:
        assert [one.probabilities[name] for name in one.labels] == sorted(
            (value for value in one.probabilities.values() if value >= run.summary["threshold"]), reverse=True
        )
    assert all(one.labels == () for one in lk.predict(place / "run", asked, base=base, threshold=1.0))
    with pytest.raises(UsageError, match="threshold is 2; it must be a probability"):
        lk.predict(place / "run", asked, base=base, threshold=2)
    told = lk.evaluate(place / "run", data.test, base=base)
    assert told.metrics == run.metrics
    assert told.threshold == run.summary["threshold"]
    low, high = told.micro_f1_interval
    assert low <= told.metrics["micro_f1"] <= high
    assert set(told.per_label) == {"food", "weather"}
    none = replace(data.test.take(range(2)), labels=((), ()))
    adapter, task = open_run(place / "run")
    assert "labels right" in str(lk.evaluate((adapter, replace(task, threshold=1.0)), none, base=base))
    strange = replace(data.test, labels=(("music",), *data.test.labels[1:]))
    with pytest.raises(DataError, match="label 'music' does not occur in the training rows"):
        lk.evaluate(place / "run", strange, base=base)
    with pytest.raises(DataError, match="has pairs of texts, and single texts were learned"):
        lk.evaluate(place / "run", replace(strange, others=strange.texts), base=base)
    with pytest.raises(DataError, match="longer than 24 tokens"):
        lk.predict(place / "run", ["rain " * 40], base=base)
    with pytest.raises(DataError, match="task 'labels' takes LabelSets, and these are Rows"):
        lk.evaluate(place / "run", Rows(("a",), ("b",), "r", (1,)), base=base)


@pytest.mark.slow
def test_the_command_line_fits_merges_and_serves(place, tmp_path, capsys):
    rows = load_label_sets(place / "data.jsonl")
    lines = [f"{t},{int('food' in own)},{int('weather' in own)}" for t, own in zip(rows.texts, rows.labels)]
    (tmp_path / "flags.csv").write_text("\n".join(["text,food,weather", *lines]), encoding="utf-8")
    words = ["fit", place / "base", tmp_path / "flags.csv", "--task", "labels", "--labels", "food,weather"]
    words += ["--out", tmp_path / "run", "--epochs", 4, "--learning-rate", 0.02, "--threads", 1]
    assert main(list(map(str, words))) == 0
    streams = capsys.readouterr()
    assert "held-out micro_f1" in streams.out
    assert "the best on the validation rows" in streams.out
    assert "2 labels" in streams.err
    assert (
        main(["evaluate", str(tmp_path / "run"), str(tmp_path / "flags.csv"), "--labels", "food,weather", "--json"])
        == 0
    )
    wanted = json.loads(capsys.readouterr().out)["metrics"]
    assert wanted["micro_f1"] > 0.7
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "merged"), str(place / "data.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["micro_f1"] == pytest.approx(wanted["micro_f1"], abs=0.01)
    assert main(["predict", str(tmp_path / "run"), "--say", HARD, "--threshold", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"(none)  {HARD}")
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "flags.csv"), "--delimiter", ";"]) == 0


def test_a_run_that_was_killed_ends_with_the_same_numbers(place, base, data, run):
    class HaltError(Exception):
        pass

    def watch(record, _):
        if record.kind == "valid" and record.epoch == 2:
            raise HaltError

    with pytest.raises(HaltError):
        lk.fit(base, data, "labels", out=place / "killed", watch=watch, **QUICK)
    again = lk.fit(base, data, "labels", out=place / "killed", resume=True, **QUICK)
    assert again.metrics == run.metrics
    assert again.adapter.meta["task"] == run.adapter.meta["task"]

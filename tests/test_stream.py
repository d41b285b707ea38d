"""A file whose rows stay in it gives what it gives in memory: splits, digests, tokens, losses, a resumed run."""

import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import lorakit as lk
import tiny_chat
import tiny_image
import tiny_seq2seq
import tiny_text
from lorakit.cache import cache_folder
from lorakit.data import load_splits
from lorakit.data import streamed as module
from lorakit.data.streamed import Streamed
from lorakit.errors import DataError, FitError
from lorakit.fit import mapped
from lorakit.fit.tokenised import tokenised
from lorakit.tasks.base import load_base
from lorakit.tasks.task import TASKS

N = 150


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_ROWS", 37)


def rows_of(task):
    if task in ("classify", "tag", "regress"):
        with tempfile.TemporaryDirectory() as folder:
            lines = tiny_text.table(Path(folder) / "a.csv", N).read_text().splitlines()[1:]
        rows = [dict(zip(("text", "label"), line.split(","))) for line in lines]
        if task == "tag":
            return [
                {"words": row["text"], "tags": " ".join("O" for _ in row["text"].split()[1:]) + " B-x"} for row in rows
            ]
        return [{"text": row["text"], "score": len(row["text"])} for row in rows] if task == "regress" else rows
    if task == "pairs":
        told = tiny_text.told_topics(N)
        return [{"text": a, "text2": b, "label": "yes" if c == d else "no"} for a, b, c, d in told]
    asked = tiny_chat.pairs(N)
    if task == "prefer":
        return [{"prompt": a, "chosen": b, "rejected": f"{b} again"} for a, b in asked]
    if task == "complete":
        return [{"text": f"{a} {b}"} for a, b in asked]
    first, second = ("prompt", "completion") if task == "generate" else ("source", "target")
    return [{first: a, second: b} for a, b in asked]


def written(rows, file):
    """Rows in a file of the form that its name asks for."""
    name = file.name
    if name.endswith(".parquet") or name == "arrow":
        import pyarrow as arrow

        table = arrow.Table.from_pylist(rows)
        if name == "arrow":
            file.mkdir()
            with arrow.ipc.new_stream(str(file / "data-00000.arrow"), table.schema) as stream:
                stream.write_table(table, max_chunksize=40)
        else:
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, file, row_group_size=40)
        return file
    with (gzip.open if name.endswith(".gz") else open)(file, "wt", encoding="utf-8", newline="") as stream:
        if ".jsonl" in name:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if ".tsv" in name else ",")
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    tiny_text.tiny_bert(folder / "bert")
    tiny_chat.tiny_causal(folder / "llama")
    tiny_seq2seq.tiny_seq2seq(folder / "t5")
    names = {
        "generate": ("llama", "causal"),
        "complete": ("llama", "causal"),
        "prefer": ("llama", "causal"),
        "translate": ("t5", "seq2seq"),
    }

    def base(task):
        name, head = names.get(task, ("bert", "none"))
        return load_base(str(folder / name), head=head)

    base.folder = folder
    return base


def both(task, file, most):
    read = TASKS["classify" if task == "pairs" else task].read
    return load_splits(file, read=read), load_splits(file, read=read, most_in_memory=most)


def parts(data):
    return data.train, data.valid, data.test


CASES = [("classify", "a.csv"), ("classify", "a.tsv.gz"), ("classify", "a.parquet"), ("classify", "arrow")]
CASES += [("pairs", "a.jsonl"), ("pairs", "a.csv.gz"), ("generate", "a.jsonl.gz"), ("generate", "a.parquet")]
CASES += [
    ("translate", "a.jsonl"),
    ("translate", "a.csv"),
    ("tag", "a.jsonl"),
    ("regress", "a.csv"),
    ("prefer", "a.jsonl"),
    ("complete", "a.jsonl"),
]


@pytest.mark.parametrize(("task", "name"), CASES)
def test_rows_and_tokens_are_those_in_memory(task, name, tmp_path, bases):
    file = written(rows_of(task), tmp_path / name)
    whole, streamed = both(task, file, 0)
    base, kind = bases(task), TASKS["classify" if task == "pairs" else task]
    assert whole.labels == streamed.labels
    assert whole.n_leaks == streamed.n_leaks
    goal, other = kind.of(whole, base), kind.of(streamed, base)
    assert goal.note() == other.note()
    for rows, left in zip(parts(whole), parts(streamed)):
        assert isinstance(left, Streamed)
        assert not isinstance(rows, Streamed)
        assert (rows.digest(), list(rows.lines), tuple(rows.inputs)) == (left.digest(), list(left.lines), left.inputs)
        assert (rows.classes() is None) is (left.classes() is None)
        assert list(rows.classes() or ()) == list(left.classes() or ())
        kind.refuse_other(left)
        tokens, mapped_ones = (tokenised(goal, one, base.tokenizer, truncate=False) for one in (rows, left))
        assert type(tokens) is type(mapped_ones)
        for field in ("ids", "labels", "reads", "types", "lengths", "pad", "each"):
            assert getattr(tokens, field) == getattr(mapped_ones, field), field
        assert list(tokens.lines) == list(mapped_ones.lines)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), [CASES[0], CASES[5], CASES[6], CASES[8]])
def test_a_fit_is_the_same_to_the_bit(task, name, tmp_path, bases):
    file = written(rows_of(task), tmp_path / name)
    whole, streamed = both(task, file, module._TAKEN * file.stat().st_size * (4 if "gz" in name else 1) - 1)
    assert isinstance(streamed.train, Streamed)
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "threads": 1}
    job = "classify" if task == "pairs" else task
    one, other = (lk.fit(bases(task), data, job, **settings) for data in (whole, streamed))
    losses = [[record["loss"] for record in found.records] for found in (one, other)]
    assert losses[0] == losses[1]
    assert (one.adapter, one.before, one.metrics) == (other.adapter, other.before, other.metrics)
    assert one.summary["streamed"] == {}
    assert other.summary["streamed"]["train"] == streamed.train.about()
    assert streamed.train.about().startswith(f"{len(whole.train)} rows, which stay in their file; 3")


def test_documents_of_unlike_lengths_are_read_alike_in_every_chunk(tmp_path, bases):
    rows = [{"text": row["text"] * (8 if k > 100 else 1)} for k, row in enumerate(rows_of("complete"))]
    whole, streamed = both("complete", written(rows, tmp_path / "a.jsonl"), 0)
    base = bases("complete")
    goal = TASKS["complete"].of(whole, base).chosen({"window": 32, "overlap": 5})
    for one, other in zip(parts(whole), parts(streamed)):
        tokens, mapped_ones = (tokenised(goal, rows, base.tokenizer, truncate=False) for rows in (one, other))
        assert tokens.reads == mapped_ones.reads
        batch = mapped_ones.gather(range(len(mapped_ones)))
        assert len(batch.labels) == len(batch.reads)
    assert len(set(tokens.reads.lengths)) > 1, "short documents and long ones"


def test_a_part_that_is_small_is_in_memory(tmp_path):
    file = written(rows_of("classify"), tmp_path / "a.csv")
    size = module._TAKEN * file.stat().st_size
    assert not any(isinstance(part, Streamed) for part in parts(load_splits(file, most_in_memory=size)))
    some = load_splits(file, most_in_memory=size - 1)
    assert [isinstance(part, Streamed) for part in parts(some)] == [True, False, False]
    assert some.valid.texts == load_splits(file).valid.texts
    given = load_splits(file, valid=file, test=file, most_in_memory=0)
    assert given.train.digest() == given.valid.digest() == load_splits(file, valid=file, test=file).test.digest()


def test_by_itself_when_the_file_is_large_for_what_is_free(tmp_path, monkeypatch):
    file = written(rows_of("classify"), tmp_path / "a.csv")
    assert not isinstance(load_splits(file).train, Streamed)
    monkeypatch.setattr(module, "available_memory", lambda: file.stat().st_size)
    assert isinstance(load_splits(file).train, Streamed)


@pytest.mark.parametrize("task", ["embed", "labels", "recommend"])
def test_a_task_that_needs_all_rows_gets_them(task, tmp_path):
    rows = {
        "embed": [{"query": f"a {k}", "positive": f"b {k}"} for k in range(60)],
        "labels": [{"text": f"a {k}", "labels": "x,y" if k % 2 else "x"} for k in range(60)],
        "recommend": [{"user": f"u{k % 6}", "item": f"i{k % 11}"} for k in range(60)],
    }[task]
    whole, same = both(task, written(rows, tmp_path / "a.csv"), 0)
    assert [part.digest() for part in parts(whole)] == [part.digest() for part in parts(same)]
    assert not isinstance(same.train, Streamed)


@pytest.mark.parametrize("task", ["image", "image_text"])
@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_images_beside_a_large_table_are_found(task, name, tmp_path):
    from PIL import Image

    for k, pixels in enumerate(tiny_image.arrays(9)[0]):
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    rows = [{"image": f"{k % 9}.png", "text": f"a {k}", "label": "ab"[k % 2]} for k in range(60)]
    whole, same = both(task, written(rows, tmp_path / name), 0)
    assert [part.digest() for part in parts(whole)] == [part.digest() for part in parts(same)]


@pytest.mark.parametrize("wanted", [5, 6])
def test_ratings_that_count_may_begin_in_a_later_chunk(wanted, tmp_path):
    rows = [{"user": f"u{k % 6}", "item": f"i{k % 11}", "rating": 1 if k < 50 else 5} for k in range(120)]
    file = written(rows, tmp_path / "a.csv")

    def read(most):
        found = load_splits(file, read=TASKS["recommend"].read, rating=f">={wanted}", most_in_memory=most)
        return [part.digest() for part in parts(found)]

    if wanted == 5:
        assert read(0) == read(None)
        return
    for most in (None, 0):
        with pytest.raises(DataError, match="has no row with rating >= 6"):
            read(most)


@pytest.mark.parametrize("bad", [range(37, 74), range(144, 150), range(150)], ids=["middle", "end", "all"])
def test_all_rows_of_a_chunk_may_be_bad(bad, tmp_path):
    rows = rows_of("classify")
    for k in bad:
        rows[k]["text"] = ""
    file = written(rows, tmp_path / "a.csv")
    told = []
    for most in (None, 0):
        with pytest.raises(DataError) as caught:
            load_splits(file, most_in_memory=most)
        told.append(str(caught.value))
        if len(bad) == N:
            assert "no other row is there" in told[-1]
            continue
        found = load_splits(file, skip_bad=len(bad), most_in_memory=most)
        assert [one.row for one in found.skipped] == [k + 2 for k in bad]
        told[-1] += found.train.digest()
    assert told[0] == told[1]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz"])
def test_a_bad_row_in_a_later_chunk_is_named_with_its_file(name, tmp_path):
    rows = rows_of("classify")
    rows[90]["text"] = ""
    file = written(rows, tmp_path / name)
    told = []
    for most in (None, 0):
        with pytest.raises(DataError) as caught:
            load_splits(file, most_in_memory=most)
        told.append(str(caught.value))
    line = 91 if "jsonl" in name else 92
    assert (
        told[0]
        == told[1]
        == f"'{file}': row {line}: column 'text' is empty; mend or remove these rows; or leave it out with "
        "--skip-bad 1 or more"
    )


def test_too_long_texts_of_all_chunks_are_named_at_once(tmp_path, bases):
    rows = rows_of("classify")
    for k in (5, 60, 90):
        rows[k]["text"] = "rain " * 90
    file = written(rows, tmp_path / "a.csv")
    short = written(rows_of("classify"), tmp_path / "short.csv")
    data = load_splits(file, valid=short, test=short, most_in_memory=0)
    with pytest.raises(DataError, match=r"(?s)3 faults:.*row 7: it has 92 .*row 62: .*row 92: .*--skip-bad 3$"):
        lk.fit(bases("classify"), data, max_steps=1)
    assert lk.fit(bases("classify"), data, max_steps=1, skip_bad=3).summary["skipped"]["rows"] == 3


def test_faults_of_all_rows_are_found_by_a_few(tmp_path, bases):
    one = written([{"text": f"a {k}", "label": "x"} for k in range(90)], tmp_path / "one.csv")
    with pytest.raises(DataError, match=r"one class only \('x'\)"):
        load_splits(one, most_in_memory=0)
    same = written([{"text": f"a {k}", "score": 3} for k in range(90)], tmp_path / "same.csv")
    with pytest.raises(DataError, match="every training row has the number 3"):
        load_splits(same, read=TASKS["regress"].read, most_in_memory=0)
    file = written(rows_of("classify"), tmp_path / "a.csv")
    rows = [{"text": "a", "label": "weather"}] * 60 + [{"text": "a", "label": "other"}]
    with pytest.raises(DataError, match="row 62: label 'other' does not occur in the training rows"):
        load_splits(file, valid=written(rows, tmp_path / "valid.csv"), most_in_memory=0)
    valid = written([*rows, *rows[-1:] * 3], tmp_path / "more.csv")  # of which one at a time is looked at
    found = load_splits(file, valid=valid, most_in_memory=0, skip_bad=4)
    assert [one.row for one in found.skipped] == [62, 63, 64, 65]


def test_a_file_that_changes_meanwhile_is_told(tmp_path, bases):
    rows = rows_of("classify")
    file = written(rows, tmp_path / "a.csv")
    data = load_splits(file, most_in_memory=0)
    for changed in (rows[:100], [{**row, "text": "i like hail"} if k > 70 else row for k, row in enumerate(rows)]):
        written(changed, file)
        with pytest.raises(DataError, match=r"a\.csv' was changed while it was read, at or after row \d+"):
            list(data.train.chunks())
    with pytest.raises(ValueError, match="in their order"):
        data.train.take([3, 1])


@pytest.fixture
def streamed(tmp_path, bases):
    data = load_splits(written(rows_of("classify"), tmp_path / "a.csv"), most_in_memory=0)
    base = bases("classify")
    return TASKS["classify"].of(data, base), data.train, base.tokenizer


def folders():
    return sorted(entry for entry in (cache_folder() / mapped.FOLDER).iterdir() if entry.is_dir())


def test_tokens_are_found_again_and_not_removed_while_they_are_used(streamed, monkeypatch):
    task, rows, tokenizer = streamed
    first = tokenised(task, rows, tokenizer, truncate=False)
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "_make", None)
        assert tokenised(task, rows, tokenizer, truncate=False).ids == first.ids
    monkeypatch.setattr(mapped, "_MOST", 0)
    other = tokenised(task, rows, tokenizer, truncate=True)
    assert len(folders()) == 2  # both are in use
    del first
    third = tokenised(task, rows.take(range(60)), tokenizer, truncate=True)
    assert len(folders()) == 2  # one of them is new
    assert other.gather([3]).ids.tolist() == tokenised(task, rows, tokenizer, truncate=True).gather([3]).ids.tolist()
    assert len(third) == 60


def test_a_damaged_folder_is_made_anew(streamed):
    task, rows, tokenizer = streamed
    wanted = list(tokenised(task, rows, tokenizer, truncate=False).ids)
    (folder,) = folders()
    (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-4])
    assert list(tokenised(task, rows, tokenizer, truncate=False).ids) == wanted
    (folder / "about.json").unlink()
    assert list(tokenised(task, rows, tokenizer, truncate=False).ids) == wanted


def test_a_tokenizer_that_does_not_say_what_it_does_is_asked_every_time(streamed):
    task, rows, tokenizer = streamed

    def plain(*given, **named):
        return tokenizer(*given, **named)

    plain.pad_token_id = tokenizer.pad_token_id
    one, other = (tokenised(task, rows, plain, truncate=False) for _ in range(2))
    assert len(folders()) == 2
    assert one.ids == other.ids


def test_a_full_disk_is_told_before_much_is_written_and_nothing_is_left(streamed, monkeypatch):
    task, rows, tokenizer = streamed
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    told = (
        rf"the tokens of {len(rows)} rows of '.*a\.csv' go into '.*streams', where they need 0 MiB, and 0 MiB are free"
    )
    with pytest.raises(FitError, match=told + "; free some space, or let XDG_CACHE_HOME"):
        tokenised(task, rows, tokenizer, truncate=False)
    assert not folders()


FULL = """
import resource, signal, sys
import lorakit.data.streamed as module
module._ROWS = 8
from lorakit.data import load_splits
from lorakit.errors import FitError
from lorakit.fit.tokenised import tokenised
from lorakit.tasks.base import load_base
from lorakit.tasks.classify import Classify
base = load_base(sys.argv[1])
data = load_splits(sys.argv[2], most_in_memory=0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
try:
    tokenised(Classify.of(data, base), data.train, base.tokenizer, truncate=False)
except FitError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_meanwhile_is_told_and_nothing_is_left(tmp_path, bases):
    """A size limit on files stands in for a full disk: the same errors come from the same calls."""
    file = written(rows_of("classify"), tmp_path / "a.csv")
    command = [sys.executable, "-c", FULL, str(bases.folder / "bert"), str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "where they cannot be written: File too large; free some space" in done.stdout
    assert not folders()


RUN = """
import sys
import lorakit.data.streamed as module
module._ROWS = 37
import lorakit as lk
from lorakit.data import load_splits
base, file, out, how, most = sys.argv[1:]
def watch(record, total):
    print(record.kind, record.step, flush=True)
    if how == "slow":
        import time; time.sleep(0.05)
data = load_splits(file, most_in_memory=int(most))
lk.fit(base, data, out=out, resume=how == "resume", watch=watch, threads=1,
       epochs=3, batch_size=8, learning_rate=1e-2, checkpoint_steps=4)
"""


@pytest.mark.slow
def test_a_streamed_run_killed_and_resumed_ends_as_one_in_memory(tmp_path, bases):
    file = written(rows_of("classify"), tmp_path / "a.jsonl.gz")

    def start(out, how, most):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        words = [str(bases.folder / "bert"), str(file), str(tmp_path / out), how, str(most)]
        return subprocess.Popen([sys.executable, "-c", RUN, *words], stdout=subprocess.PIPE, text=True, env=environment)

    whole = start("whole", "fresh", 10**9)
    whole.communicate(timeout=120)
    assert whole.returncode == 0
    killed = start("killed", "slow", 0)
    for line in killed.stdout:
        if line.split() == ["step", "18"]:  # between two checkpoints, in the second epoch
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate(timeout=60)
    resumed = start("killed", "resume", 0)
    out, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0
    assert "step 1\n" not in out, "it began anew instead of going on"
    assert lk.load(tmp_path / "killed" / "adapter") == lk.load(tmp_path / "whole" / "adapter")
    one, two = (
        [
            {key: value for key, value in json.loads(line).items() if key != "step_s"}
            for line in (tmp_path / name / "records.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "killed")
    )
    assert one == two


def test_a_task_whose_examples_are_no_tokens_is_refused_with_numbers(streamed, monkeypatch):
    task, rows, tokenizer = streamed
    monkeypatch.setattr(type(task), "examples", lambda *given, **named: object())
    told = rf"{len(rows)} rows would take about 0 MiB of memory, where 0 MiB may be taken, and task 'classify' cannot"
    with pytest.raises(
        DataError, match=told + " leave them in their file; give it fewer rows, or load them with a larger"
    ):
        tokenised(task, rows, tokenizer, truncate=False)

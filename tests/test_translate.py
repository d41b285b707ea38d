"""From text to text end to end: data in its forms, learning, what is written, metrics, PEFT, resume, bad input."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.cli import main
from lorakit.data import Splits, Translations, load_splits, load_translations
from lorakit.errors import DataError, LorakitError, UsageError
from lorakit.fit.use import used
from lorakit.tasks.base import Base, load_base
from lorakit.tasks.decode import rewritten
from lorakit.tasks.overlap import overlap
from lorakit.tasks.translate import Translate, Translation
from tiny_chat import tiny_causal
from tiny_seq2seq import pair_table, seq2seq, tiny_seq2seq, tokenizer

QUICK = {"epochs": 14, "batch_size": 16, "learning_rate": 1e-2}
BRIEF = {**QUICK, "epochs": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translate")
    tiny_seq2seq(folder / "t5", "t5")
    tiny_seq2seq(folder / "bart", "bart")
    pair_table(folder / "data.jsonl")
    return folder


@pytest.fixture(scope="module")
def data(place: Path) -> Splits[Translations]:
    return load_splits(place / "data.jsonl", read=load_translations)


@pytest.fixture(scope="module")
def run(place: Path) -> Any:
    """A finished run of the T5, by the command line."""
    words = ["fit", place / "t5", place / "data.jsonl", "--task", "translate", "--out", place / "run"]
    words += ["--epochs", "14", "--batch-size", "16", "--lr", "0.01", "--source-prefix", "again: "]
    assert main([str(word) for word in words]) == 0
    return json.loads((place / "run" / "summary.json").read_text())


def base_of(name: str) -> Base:
    return Base(seq2seq(name), tokenizer(), name, "mean", 64)


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    return code, streams.out, streams.err


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    "names", [("source", "target"), ("src", "tgt"), ("Input", "Output"), ("text", "summary"), ("article", "highlights")]
)
def test_usual_names_of_columns_are_found(tmp_path: Path, names: tuple[str, str]) -> None:
    file = tmp_path / "data.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("id", *names), (1, "a, b", "c\nd"), (2, " e", "f")])
    rows = load_translations(file)
    assert (rows.texts, rows.targets, rows.lines) == (("a, b", " e"), ("c\nd", "f"), (2, 3))
    swapped = load_translations(file, source=names[1], target=names[0])
    assert (swapped.texts, swapped.targets) == (rows.targets, rows.texts)
    assert load_translations(file, targets=False).targets is None


@pytest.mark.parametrize("as_text", [False, True])
def test_two_languages_of_one_column_are_named(tmp_path: Path, as_text: bool) -> None:
    said = [{"en": "rain", "de": "Regen", "fr": "pluie"}, {"en": "sun", "de": "Sonne", "fr": "soleil"}]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"translation": json.dumps(one) if as_text else one}) for one in said))
    rows = load_translations(file, source="en", target="de")
    assert (rows.texts, rows.targets) == (("rain", "sun"), ("Regen", "Sonne"))
    assert load_translations(file, source="fr", targets=False).texts == ("pluie", "soleil")
    with pytest.raises(DataError, match="--source en --target de"):
        load_translations(file)
    with pytest.raises(DataError, match=r"row 1: column 'translation' has no 'es'"):
        load_translations(file, source="en", target="es")
    with pytest.raises(DataError, match="source and target are both 'en'"):
        load_translations(file, source="en", target="en")


BAD = [
    ({"source": "a", "target": " "}, {}, "row 2: column 'target' is empty"),
    ({"source": "a", "target": 3}, {}, "row 2: column 'target' is 3; it must be text"),
    ({"source": "a\x00", "target": "b"}, {}, "row 2: column 'source' has a NUL character"),
    ({"translation": "{"}, {"source": "en", "target": "de"}, "row 2: column 'translation' is a text, and no object"),
    ({"translation": ["a"]}, {"source": "en", "target": "de"}, "must be an object with a text for each language"),
    ({"a": "x", "b": "y"}, {}, "its columns are a, b: name two with --source COLUMN and --target COLUMN"),
    ({"source": "a", "target": "b"}, {"source": "sourc"}, "no column 'sourc'; did you mean 'source'"),
    ({"source": "a", "target": "b"}, {"source": "target", "target": "target"}, "both 'target'"),
]


@pytest.mark.parametrize(("row", "columns", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], columns: dict[str, str], message: str) -> None:
    first = {key: {"en": "a", "de": "b"} if key == "translation" else "x" for key in row}
    (tmp_path / "data.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(row))
    with pytest.raises(DataError) as caught:
        load_translations(tmp_path / "data.jsonl", **columns)
    assert message in str(caught.value)


def test_targets_must_be_known_to_learn(data: Splits[Translations]) -> None:
    part = Translations(data.test.texts, None, "here", data.test.lines)
    with pytest.raises(DataError, match="'here' has no targets"):
        Splits(data.train, data.valid, part).checked()
    assert data.train.digest() != Translations(data.train.texts, None, "here", data.train.lines).digest()
    assert "different texts; first row: 'sort" in data.train.about()


# ---------------------------------------------------------------- examples


def test_a_source_that_is_too_long_is_refused_or_cut_and_a_target_keeps_its_end() -> None:
    goal = Translate("sort ", 6, 0, (3,), 1.0)
    words = tokenizer()
    rows = Translations(("rain " * 8, "sun"), ("snow", "soup " * 9), "here", (1, 2))
    with pytest.raises(DataError, match=r"1 of 2 texts are longer than 6 tokens, the longest in row 1 with 10"):
        goal.examples(rows, words, truncate=False)
    with pytest.raises(DataError, match=r"the longest in row 2 with 10"):
        goal.examples(Translations(("a", "b"), rows.targets, "here", (1, 2)), words, truncate=False)
    for end in (True, False):  # a tokenizer that sets ends, and one that does not
        tokens = goal.examples(rows, tokenizer(end), truncate=True)
        assert [len(ids) for ids in tokens.ids] == [6, 2, 3 if end else 2, 6]
        assert [labels[-1:] for labels in tokens.labels] == [(), (3,), (), (3,)]
        assert tokens.ids[3] == (0, *tokens.labels[3][:-1])
        assert words.decode(tokens.ids[0][:2]) == "sort rain"
        assert tokens.lengths == [8, 9 if end else 8]
    with pytest.raises(DataError, match="row 1: the tokenizer finds no token"):
        Translate("", 6, 0, (3,), 1.0).examples(
            Translations(("\u200b \t",), ("a",), "here", (1,)), _Deaf(), truncate=True
        )


class _Deaf:
    pad_token_id = 0

    def __call__(self, texts: Any = None, text_target: Any = None, **_: Any) -> Any:
        return {"input_ids": [[] for _ in texts or text_target]}


def test_a_base_without_a_bound_takes_long_texts_and_may_be_asked_to_cut(place: Path) -> None:
    words = tokenizer()
    words.model_max_length = 10**30
    base = Base(seq2seq("t5"), words, "t5", "mean", words.model_max_length)
    rows = Translations(("rain " * 100, "sun"), ("snow", "soup"), "here", (1, 2))
    goal = Translate.of(Splits(rows, rows, rows), base)
    assert goal.max_length == 1 << 20
    for truncate in (False, True):
        assert len(goal.examples(rows, words, truncate=truncate).ids[0]) == 101
    assert Translate.from_note(json.loads(json.dumps(goal.note()))) == goal


def test_bases_that_cannot_are_refused(place: Path, data: Splits[Translations]) -> None:
    tiny_causal(place / "llama", "llama")
    with pytest.raises(LorakitError, match=r"is a llama model, which has no encoder and decoder.*generate"):
        load_base(str(place / "llama"), head="seq2seq")
    with pytest.raises(UsageError, match="is no encoder-decoder with a head that writes"):
        lk.fit(load_base(str(place / "llama"), head="causal"), data, "translate", **BRIEF)
    base = base_of("t5")
    base.model.config.decoder_start_token_id = base.model.generation_config.decoder_start_token_id = None
    with pytest.raises(UsageError, match="'t5' has no decoder_start_token_id"):
        lk.fit(base, data, "translate", **BRIEF)


# ---------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "mt5", "bart"])
def test_it_learns_and_leaves_the_base_as_it_was(name: str, data: Splits[Translations]) -> None:
    base = base_of(name)
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    wishes = base.model.generation_config
    result = lk.fit(base, data, "translate", **QUICK)
    assert result.summary["padded"] == ""
    assert result.summary["prefix"].startswith("off: sources and targets")
    assert result.metrics["loss"] < 0.5 * result.before["loss"]
    assert result.metrics["token_accuracy"] > 0.75
    assert result.summary["ends_by_itself"] >= 0.6
    after = base.model.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    assert base.model.generation_config is wishes


def test_a_fit_is_the_same_packed_and_padded(data: Splits[Translations], monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.trunk import trunk as trunk_module
    from lorakit.trunk.packing import CannotPackError

    few = Splits(data.train.take(range(48)), data.valid, data.test)
    settings = {"epochs": 1, "batch_size": 48, "learning_rate": 1e-2, "dtype": "fp32", "schedule": "constant"}
    packed = lk.fit(base_of("t5"), few, "translate", **settings)

    def refuse(*_: Any) -> Any:
        raise CannotPackError("this test wants it so")

    monkeypatch.setattr(trunk_module, "packed", refuse)
    padded = lk.fit(base_of("t5"), few, "translate", **settings)
    assert (packed.summary["padded"], padded.summary["padded"]) == ("", "this test wants it so")
    assert padded.metrics["loss"] == pytest.approx(packed.metrics["loss"], rel=1e-4)


def test_the_run_by_the_command_line_says_how_answers_end(place: Path, run: dict[str, Any]) -> None:
    assert (run["task"], run["metric"], run["source_prefix"]) == ("translate", "loss", "again: ")
    assert run["start"] == 0
    assert run["ends"] == [3]
    assert 0 <= run["ends_by_itself"] <= 1
    assert run["example"].keys() == {"prompt", "answer", "expected"}
    assert (place / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_numbers(place: Path, data: Splits[Translations], tmp_path: Path) -> None:
    whole = lk.fit(str(place / "t5"), data, "translate", out=tmp_path / "whole", **BRIEF)

    def stop(record: Any, total: int) -> None:
        if record.step == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lk.fit(str(place / "t5"), data, "translate", out=tmp_path / "cut", watch=stop, **BRIEF)
    resumed = lk.fit(str(place / "t5"), data, "translate", out=tmp_path / "cut", resume=True, **BRIEF)
    assert resumed.metrics == whole.metrics


def test_peft_loads_the_adapter_and_gives_the_same_logits(place: Path, run: dict[str, Any]) -> None:
    import peft
    from transformers import AutoModelForSeq2SeqLM

    config = json.loads((place / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    plain, ours = (AutoModelForSeq2SeqLM.from_pretrained(place / "t5").eval() for _ in range(2))
    asked = {"input_ids": torch.tensor([[4, 8, 12, 3]]), "decoder_input_ids": torch.tensor([[0, 9, 10]])}
    with torch.no_grad():
        before = plain(**asked).logits
        lk.attach(ours, lk.load(place / "run" / "adapter"))
        theirs = peft.PeftModel.from_pretrained(plain, place / "run" / "adapter").eval()
        assert isinstance(theirs, peft.PeftModelForSeq2SeqLM)
        wanted, found = theirs(**asked).logits, ours(**asked).logits
    assert float((wanted - before).abs().max()) > 0.1
    assert torch.allclose(found, wanted, atol=1e-4)


# ---------------------------------------------------------------- in use


def test_long_targets_are_written_to_their_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(place / "t5"), head="seq2seq", max_length=400)
    rows = Translations(("sort rain",) * 2, ("soup " * 300, "sun"), "here", (1, 2))
    goal, asked = Translate.of(Splits(rows, rows, rows), base), list[int]()
    found = Translation("sort rain", "sun", True)

    def predict(self: Any, some: Any, *_: Any, max_new_tokens: int, **__: Any) -> list[Translation]:
        asked.append(max_new_tokens)
        return [found] * len(some)

    monkeypatch.setattr(Translate, "predict", predict)
    goal.evaluate(rows, base, lambda tokens: torch.ones(len(tokens), 3), truncate=False)
    assert asked == [301]


def test_predict_tells_how_far_it_is(place: Path, run: dict[str, Any], data: Splits[Translations]) -> None:
    told: list[tuple[int, int]] = []
    texts = list(data.test.texts[:18])
    lk.predict(place / "run", texts, watch=lambda done, total: told.append((done, total)), max_new_tokens=2)
    assert told == [(16, 18), (18, 18)]


def test_predict_writes_what_generate_does(place: Path, run: dict[str, Any], data: Splits[Translations]) -> None:
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(place / "t5").eval()
    lk.attach(model, lk.load(place / "run" / "adapter"))
    texts = list(data.test.texts[:6])
    words = tokenizer()
    for beams in (1, 3):
        found = lk.predict(place / "run", texts, beams=beams, max_new_tokens=9)
        for text, one in zip(texts, found):
            ids = torch.tensor([words("again: " + text)["input_ids"]])
            out = model.generate(input_ids=ids, num_beams=beams, max_new_tokens=9, use_cache=False)[0]  # 3 blocks for 2
            assert one.target == words.decode(out, skip_special_tokens=True)
            assert one.stopped == (3 in out[1:].tolist())
            assert one.text == text
    (cut,) = lk.predict(place / "run", texts[:1], max_new_tokens=1)
    assert (cut.target, cut.stopped) == (found[0].target.split()[0], False)
    with pytest.raises(UsageError, match="beams 0; both must be at least 1"):
        lk.predict(place / "run", texts, beams=0)
    with pytest.raises(DataError, match="row 2: it is empty"):
        lk.predict(place / "run", ["a", " "])
    with pytest.raises(UsageError, match="takes no option 'beam'; did you mean 'beams'"):
        lk.predict(place / "run", texts, beam=2)
    with pytest.raises(TypeError, match="beam"), used(place / "run", None) as (task, base, scores):
        task.predict(task.asked(texts), base, scores, beam=2)


def test_what_a_base_says_may_be_written_is_kept() -> None:
    model = seq2seq("t5")
    how = {"start": 0, "ends": [3], "pad": 0, "most": 4}
    ((plain, _),) = rewritten(model, [[5, 6, 3]], **how)
    model.generation_config.forced_bos_token_id = 7
    model.generation_config.bad_words_ids = [[token] for token in plain]
    model.generation_config.repetition_penalty = 9.0  # how to search is asked of the caller
    ((forced, _),) = rewritten(model, [[5, 6, 3]], **how)
    assert forced[0] == 7
    assert not set(forced[1:]) & set(plain)


@pytest.mark.slow
def test_evaluate_measures_what_is_written(
    place: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    import sacrebleu
    from rouge_score import rouge_scorer as scorer

    rows = load_translations(place / "data.jsonl")
    found = lk.evaluate(place / "run", rows)
    targets: dict[str, list[str]] = {}
    assert rows.targets is not None
    for text, target in zip(rows.texts, rows.targets):
        targets.setdefault(text, []).append(target)
    answers = [one.target for one in lk.predict(place / "run", list(targets))]
    most = max(map(len, targets.values()))
    assert most > 1  # several references
    streams = [[own[min(k, len(own) - 1)] for own in targets.values()] for k in range(most)]
    assert found.metrics["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score)
    assert found.metrics["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, streams).score)
    one = scorer.RougeScorer(["rougeL"])
    each = [max(one.score(t, answer)["rougeL"].fmeasure for t in own) for answer, own in zip(answers, targets.values())]
    assert found.metrics["rouge_l"] == pytest.approx(sum(each) / len(each))
    for name in ("loss", "bleu", "rouge_l"):
        low, high = found.intervals[name]
        assert low <= found.metrics[name] <= high
    assert (found.n_rows, found.n_texts) == (240, len(targets))
    assert "tok:13a" in found.signature
    code, out, err = told(capsys, "evaluate", place / "run", place / "data.jsonl")
    assert code == 0, err
    assert "bleu" in out
    assert "95 % interval" in out
    assert f"of {len(targets)} answers" in out


def test_without_the_extra_evaluate_says_what_is_missing(
    place: Path, run: dict[str, Any], data: Splits[Translations], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    found = lk.evaluate(place / "run", data.test)
    assert found.metrics.keys() == {"loss", "perplexity", "token_accuracy"}
    assert found.missing == "sacrebleu and rouge-score not installed: pip install 'lorakit[translate]'"
    assert found.missing in str(found)


def test_the_interval_of_bleu_is_that_of_resampled_corpora() -> None:
    import numpy as np
    import sacrebleu

    answers = ["the cat sat on the mat", "a dog ran", "it rains today in the town", "snow falls on the hill"]
    known = [
        ["the cat sat on a mat"],
        ["a dog ran away", "the dog ran"],
        ["it rains in town today"],
        ["snow is falling"],
    ]
    found = overlap(answers, known)
    scores = []
    for draw in np.random.default_rng(0).integers(0, 4, (1000, 4)):
        streams = [[known[i][k] if k < len(known[i]) else None for i in draw] for k in range(2)]
        streams = [stream for stream in streams if any(stream)]
        scores.append(sacrebleu.metrics.BLEU().corpus_score([answers[i] for i in draw], streams).score)
    assert found.intervals["bleu"] == pytest.approx(np.quantile(scores, [0.025, 0.975]).tolist())


@pytest.mark.slow
def test_the_columns_are_named_on_the_command_line(
    place: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    said = [dict(zip(("en", "de"), row.values())) for row in rows]
    file = tmp_path / "two.jsonl"
    file.write_text("\n".join(json.dumps({"translation": one}) for one in said))
    columns = ["--source", "en", "--target", "de"]
    words = ["fit", place / "t5", file, "--task", "translate", "--out", tmp_path / "run", "--max-steps", "1"]
    code, _, err = told(capsys, *words, *columns)
    assert code == 0, err
    code, out, err = told(capsys, "evaluate", tmp_path / "run", file, *columns, "--json")
    assert (code, json.loads(out)["n_rows"]) == (0, len(rows)), err
    code, out, err = told(capsys, "predict", tmp_path / "run", file, *columns, "--max-new-tokens", "1", "--json")
    assert (code, len(json.loads(out))) == (0, len(rows)), err


def test_predict_merge_and_inspect_by_the_command_line(
    place: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    say = ["--say", "sort rain and soup"]
    code, out, err = told(capsys, "predict", place / "run", *say, "--json", "--beams", "2")
    assert code == 0, err
    (one,) = json.loads(out)
    assert one.keys() == {"text", "target", "stopped"}
    code, first, _ = told(capsys, "predict", place / "run", *say)
    code, both, _ = told(capsys, "predict", place / "run", *say, *say)
    assert both == f"> sort rain and soup\n{first.strip()}\n\n> sort rain and soup\n{first.strip()}\n"
    code, out, err = told(capsys, "merge", place / "run", "--out", tmp_path / "merged")
    assert code == 0, err
    assert told(capsys, "predict", tmp_path / "merged", *say)[1] == first
    code, out, err = told(capsys, "predict", place / "run", place / "data.jsonl", "--json")
    assert (code, len(json.loads(out))) == (0, 240)
    assert (
        "encoder.block.0.layer.0.SelfAttention.q" in told(capsys, "inspect", place / "run", "--base", place / "t5")[1]
    )
    code, out, _ = told(capsys, "plan", place / "t5", "--task", "translate", "--layers", "attention")
    assert "decoder.block.2.layer.1.EncDecAttention.o" in lk.Plan.parse(out).layers
    assert told(capsys, "predict", place / "run", "--say", "x", "--temperature", "1")[0] == 2
    assert told(capsys, "predict", place / "run", "--say", "sort " * 80)[0] == 1


def test_a_plain_adapter_from_its_directory_finds_its_base(place: Path, run: dict[str, Any], tmp_path: Path) -> None:
    """Without the note the task_type says which model it was made on."""
    from lorakit.fit.use import load_base_of

    adapter = lk.load(place / "run" / "adapter")
    bare = adapter.with_meta(task=None)
    assert type(load_base_of(bare).model).__name__ == "T5ForConditionalGeneration"


E2E = Path(os.environ.get("LORAKIT_DATA", "nowhere")) / "e2e_official" / "devset.csv.gz"


@pytest.mark.skipif(not E2E.is_file(), reason="runs where LORAKIT_DATA leads to the real data")
def test_a_real_table_is_read() -> None:
    rows = load_translations(E2E)
    assert len(rows) == 4672
    assert rows.texts[0].startswith("name[")

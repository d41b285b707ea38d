"""The command line as a person uses it: exit codes, one sentence on stderr, JSON for machines."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import lorakit as lk
from lorakit.cli import VERBS, main, parser_of
from lorakit.tasks.base import load_base
from tiny_text import table, tiny_bert


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny_bert(folder / "base")
    table(folder / "data.csv")
    code = main(fit_words(folder, folder / "run"))
    assert code == 0
    return folder


def fit_words(folder, out, *more):
    words = ["fit", str(folder / "base"), str(folder / "data.csv"), "--out", str(out)]
    return [*words, "--epochs", "4", "--batch-size", "8", "--learning-rate", "0.01", *more]


def told(capsys, *words):
    """Exit code, stdout, stderr."""
    code = main([str(word) for word in words])
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    return code, streams.out, streams.err


def test_every_verb_explains_itself_with_an_example():
    for verb in VERBS:
        text = parser_of(verb).format_help()
        assert f"example: lorakit {verb}" in text, verb
        assert "--json" in text, verb


def test_the_overview_names_every_verb(capsys):
    code, out, _ = told(capsys, "--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)
    assert told(capsys)[0] == 2


def test_unknown_verbs_and_flags_name_the_nearest(capsys):
    code, _, err = told(capsys, "fitt")
    assert (code, "did you mean 'fit'" in err) == (2, True)
    code, _, err = told(capsys, "plan", "x", "--rnak", "3")
    assert (code, "did you mean '--rank'" in err) == (2, True)


def test_plan_prints_a_plan_that_can_be_edited_and_trained_by(place, capsys, tmp_path):
    code, out, _ = told(capsys, "plan", place / "base", "--rank", "4", "--layers", "attention=2", "--layers", "mlp")
    assert code == 0
    plan = lk.Plan.parse(out)
    assert {layer.rank for layer in plan.layers.values()} == {2, 4}
    file = tmp_path / "plan.toml"
    assert told(capsys, "plan", place / "base", "--out", file)[0] == 0
    file.write_text(file.read_text().replace("rank = 8", "rank = 3"))
    code, _, err = told(capsys, *fit_words(place, tmp_path / "run", "--plan", file))
    assert code == 0, err
    assert {layer.rank for layer in lk.load(tmp_path / "run" / "adapter").layers.values()} == {3}
    code, _, err = told(capsys, *fit_words(place, tmp_path / "run2", "--plan", file, "--rank", "4"))
    assert (code, "--rank" in err) == (2, True)


def test_plan_counts_what_is_trained_whole(place, capsys):
    words = ("plan", place / "base", "--rank", "4", "--json")
    counts = []
    for more in ((), ("--bias", "all"), ("--trained", "*")):
        code, out, err = told(capsys, *words, *more)
        assert code == 0, err
        counts.append(json.loads(out)["parameters"])
    whole = sum(p.numel() for p in load_base(str(place / "base")).model.parameters())
    assert counts[0] < counts[1] < counts[2] == counts[0] + whole


def test_fit_tells_accuracy_before_and_after_and_the_size_beside_the_base(place, capsys, tmp_path):
    code, out, err = told(capsys, *fit_words(place, tmp_path / "run"))
    assert code == 0
    assert "held-out accuracy" in out
    assert "->" in out
    assert "of the base's" in out
    assert "epoch 1:" in err
    assert re.search(r"the model sees: \[CLS\] i like .* \[SEP\]", err)
    assert re.search(r"memory: about [\d.]+ [MG]B at the peak, [\d.]+ [MG]B free; passes of up to 4,096 tokens", err)
    assert re.search(r"memory +peak [\d.]+ [MG]B, estimated [\d.]+ [MG]B", out)
    code, out, _ = told(capsys, *fit_words(place, tmp_path / "run", "--overwrite", "--json"))
    summary = json.loads(out)
    assert summary["adapter_bytes"] < summary["base_bytes"]


def test_fit_says_which_learning_rate_it_took_and_why(place, capsys, tmp_path):
    code, out, err = told(capsys, *fit_words(place, tmp_path / "run", "--lr", "auto"))
    assert code == 0, err
    assert "learning rate" in out and "by trial" in out
    code, out, _ = told(capsys, *fit_words(place, tmp_path / "run", "--lr", "default", "--overwrite"))
    assert "by rule: width 32" in out
    code, out, _ = told(capsys, *fit_words(place, tmp_path / "run", "--overwrite"))
    assert "learning rate" not in out


def test_convert_refuses_a_file_as_its_place_and_an_adapter_without_pairs(place, capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = told(capsys, "convert", place / "run", "--to", "peft", "--out", tmp_path / "file")
    assert (code, "is a file; name another directory" in err) == (2, True)
    adapter = lk.load(place / "run" / "adapter")
    replace(adapter, layers={}).save(tmp_path / "heads")
    code, _, err = told(capsys, "convert", tmp_path / "heads", "--to", "portable", "--out", tmp_path / "out")
    assert (code, "has no low-rank layers" in err) == (1, True)


def test_settings_can_come_from_a_file_and_flags_win(place, capsys, tmp_path):
    (tmp_path / "s.toml").write_text("epochs = 1\nseed = 3\nbatch-size = 8\n")
    words = ["fit", place / "base", place / "data.csv", "--out", tmp_path / "run", "--settings", tmp_path / "s.toml"]
    code, out, err = told(capsys, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["epochs"] == 1
    (tmp_path / "s.toml").write_text("epoch = 1\n")
    code, _, err = told(capsys, *words, "--overwrite")
    assert (code, "did you mean 'epochs'" in err) == (2, True)


def test_predict_evaluate_inspect_truncate_convert_merge(place, capsys, tmp_path):
    run = place / "run"
    code, out, _ = told(capsys, "predict", run, "--say", "i like rain and storm")
    assert code == 0
    assert out.split()[0] == "weather"
    code, out, _ = told(capsys, "predict", run, place / "data.csv", "--json")
    assert code == 0
    assert len(json.loads(out)) == 90
    code, out, _ = told(capsys, "evaluate", run, place / "data.csv", "--json")
    assert code == 0
    accuracy = json.loads(out)["metrics"]["accuracy"]
    assert accuracy > 0.8
    code, out, _ = told(capsys, "inspect", run, "--base", place / "base")
    assert code == 0
    assert "encoder.layer.0.attention.self.query" in out
    code, out, _ = told(capsys, "truncate", run, "--rank", "8", "--out", tmp_path / "same")
    assert (code, "note: nothing was cut" in out) == (0, True)
    code, out, _ = told(capsys, "truncate", run, "--rank", "4", "--out", tmp_path / "small")
    assert (code, "note: " in out) == (0, False)
    assert lk.load(tmp_path / "same") == lk.load(run / "adapter")
    code, _, err = told(capsys, "convert", run, "--to", "peft", "--out", tmp_path / "peft")
    assert code == 0, err
    assert sorted(os.listdir(tmp_path / "peft")) == ["adapter_config.json", "adapter_model.safetensors"]
    code, _, err = told(capsys, "merge", run, "--out", tmp_path / "merged")
    assert code == 0, err
    assert (tmp_path / "merged" / "lorakit_task.json").is_file()
    code, out, err = told(capsys, "evaluate", tmp_path / "merged", place / "data.csv", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["accuracy"] == accuracy
    assert told(capsys, "merge", run, "--out", tmp_path / "merged")[0] == 2


def test_the_merged_model_gives_the_same_logits_as_the_adapter(place, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel

    from lorakit.data import load_rows
    from lorakit.fit.use import open_run
    from lorakit.trunk import Trunk

    assert main(["merge", str(place / "run"), "--out", str(tmp_path / "m")]) == 0
    adapter, task = open_run(place / "run")
    base = load_base(str(place / "base"))
    tokens = task.examples(load_rows(place / "data.csv"), base.tokenizer, truncate=False)
    batch = tokens.gather(range(12))
    task.prepare(base.model)
    lk.attach(base.model, adapter)
    plain = AutoModel.from_pretrained(tmp_path / "m").eval()
    head = load_file(tmp_path / "m" / "lorakit_head.safetensors")
    ids, mask = batch.segments.padded(batch.ids, tokens.pad)
    with torch.no_grad(), Trunk(base.model, head="classifier") as trunk:
        expected = task.scores(base.model, trunk.hidden(batch.ids, batch.segments, batch.reads), batch)
        hidden = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        pool = hidden[:, 0] if task.pool == "cls" else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found = pool @ head["classifier.weight"].T + head["classifier.bias"]
    assert float((expected - found).abs().max()) < 1e-4  # fp32 sums in another order, through two layers


def test_a_pruned_base_stays_pruned_where_that_is_asked(place, capsys, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    matrices = [name for name, x in weights.items() if "layer.0" in name and x.ndim == 2]
    pruned = {name: x * (x.abs() > x.abs().median()) if name in matrices else x for name, x in weights.items()}
    save_file(pruned, file, {"format": "pt"})
    run = tmp_path / "run"
    short = ["--max-steps", "4", "--lr", "0.01"]
    assert told(capsys, "fit", tmp_path / "base", place / "data.csv", "--out", run, *short)[0] == 0
    assert told(capsys, "merge", run, "--zeros", "--out", tmp_path / "sparse")[0] == 0
    assert told(capsys, "merge", run, "--out", tmp_path / "dense")[0] == 0
    sparse, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "dense"))
    for name in matrices:
        zero = pruned[name] == 0
        assert bool((sparse[name][zero] == 0).all())
        assert bool((dense[name][zero] != 0).any())
        assert torch.equal(sparse[name][~zero], dense[name][~zero])


def test_a_base_in_half_precision_is_merged_in_half_precision(place, capsys, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel

    shutil.copytree(place / "base", tmp_path / "base")
    AutoModel.from_pretrained(place / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    shutil.copy(place / "data.csv", tmp_path)
    assert told(capsys, *fit_words(tmp_path, tmp_path / "run"))[0] == 0
    assert told(capsys, "merge", tmp_path / "run", "--out", tmp_path / "m")[0] == 0
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "m"))
    assert merged.keys() <= base.keys() and {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for path, layer in lk.load(tmp_path / "run" / "adapter").layers.items():
        a, b = (layer.factors[name].double() for name in "ab")
        exact = base[f"{path}.weight"].double() + layer.scale * b @ a
        error = (merged[f"{path}.weight"].double() - exact).abs()
        assert bool((error <= 2**-8 * 1.0001 * exact.abs()).all()), "half of the last of eight digits"
        assert not torch.equal(merged[f"{path}.weight"], base[f"{path}.weight"])
    head = load_file(tmp_path / "m" / "lorakit_head.safetensors")
    assert {tensor.dtype for tensor in head.values()} == {torch.float32}
    code, out, err = told(capsys, "evaluate", tmp_path / "m", place / "data.csv", "--json")
    assert (code, json.loads(out)["n_rows"]) == (0, 90), err


def test_rules_that_no_model_could_have_are_refused_before_anything_is_read(capsys, tmp_path):
    for words, part in (
        (["--rank", "0"], "rank is 0; use a whole number, 1 or more"),
        (["--layers", "attention=0"], "rank is 0;"),
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--start", "kaming"], "did you mean 'kaiming'"),
        (["--scale", "16/x"], "scale '16/x' is neither"),
        (["--bias", "all-of-it"], "bias is 'all-of-it'"),
    ):
        code, _, err = told(capsys, "fit", tmp_path / "no base", tmp_path / "no.csv", "--out", tmp_path / "x", *words)
        assert code in (1, 2)
        assert part in err
        assert "no base" not in err and "no.csv" not in err


def test_progress_is_a_bar_on_a_terminal_and_now_and_then_a_line_in_a_pipe(capsys, monkeypatch):
    from lorakit.cli import common

    monkeypatch.setattr(common, "_PAUSE_S", 0.0)
    move = common.bar(30_000, "row")
    move(1_200, 30_000)
    assert capsys.readouterr().err == "1,200 of 30,000 rows\n"
    common.bar(6, "row")(12, 24)  # windows
    assert capsys.readouterr().err == "3 of 6 rows\n"
    monkeypatch.setattr(common, "_PAUSE_S", 60.0)
    common.bar(30_000, "row")(1_200, 30_000)
    assert capsys.readouterr().err == ""
    master, slave = os.openpty()  # of no width
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        common.bar(90, "row")(90, 90)
    shown = b""
    with os.fdopen(master, "rb", 0) as terminal, suppress(OSError):  # EIO at its end
        while part := terminal.read(1000):
            shown += part
    assert b"0/90" in shown and b"90/90" in shown


BAD = [
    (["fit", "BASE", "missing.csv", "--out", "OUT"], 1, ["missing.csv", "does not exist"]),
    (["fit", "BASE", "DATA", "--out", "OUT", "--label", "topic"], 1, ["topic", "label"]),
    (["fit", "nowhere/model", "DATA", "--out", "OUT"], 1, ["nowhere/model"]),
    (["fit", "BASE", "DATA", "--out", "OUT", "--rank", "64"], 1, ["rank 64 exceeds", "32 x 32", "clip_rank"]),
    (["fit", "BASE", "DATA", "--out", "OUT", "--layers", "c_attn"], 1, ["'c_attn' matches none"]),
    (["fit", "BASE", "DATA", "--out", "OUT", "--epochs", "0"], 2, ["epochs", "at least 1"]),
    (["fit", "BASE", "DATA", "--out", "OUT", "--method", "lorra"], 2, ["lorra", "lora"]),
    (["fit", "BASE", "DATA", "--out", "DATA/run"], 2, ["DATA/run"]),
    (["predict", "BASE", "--say", "hi"], 1, ["BASE' is a model without an adapter; name a run of fit"]),
    (["inspect", "MERGED"], 1, ["MERGED' is a merged model", "name the run that it was merged from"]),
    (
        ["predict", "STOPPED", "--say", "hi"],
        1,
        ["STOPPED' holds a run that was interrupted, and no adapter", "--resume"],
    ),
    (["evaluate", "STOPPED", "DATA"], 1, ["the same fit command with --resume goes on"]),
    (
        ["merge", "BEGUN", "--out", "OUT"],
        1,
        ["ended before its first checkpoint, and no adapter; fit it anew with --over"],
    ),
    (["convert", "EMPTY", "--to", "peft", "--out", "OUT"], 1, ["EMPTY' holds no adapter_model.safetensors"]),
    (["predict", "RUN"], 2, ["--say"]),
    (["evaluate", "RUN", "DATA", "--label", "text"], 1, ["text and label are both 'text'"]),
    (["evaluate", "RUN", "DATA", "--limit", "3"], 2, ["--limit goes with --harness TASK"]),
    (["evaluate", "RUN", "DATA", "--harness-chat"], 2, ["--harness-chat goes with --harness TASK"]),
    (
        ["evaluate", "RUN", "--harness", "x", "--text", "a", "--skip-bad", "3"],
        2,
        ["--text, --skip-bad goes with a file"],
    ),
    (["truncate", "RUN", "--out", "OUT"], 2, ["one of rank, energy"]),
    (["truncate", "RUN", "--energy", "1.5", "--out", "OUT"], 2, ["1.5"]),
    (["merge", "PLAIN", "--out", "OUT"], 2, ["--base"]),
    (["convert", "RUN", "--to", "gguf", "--out", "OUT"], 2, ["gguf"]),
    (["inspect", "nothing"], 1, ["nothing", "not an adapter directory"]),
]


@pytest.mark.parametrize(("words", "code", "parts"), BAD, ids=[" ".join(words[:2] + words[-2:]) for words, _, _ in BAD])
def test_bad_input_gets_one_sentence_and_the_right_exit_code(place, capsys, tmp_path, words, code, parts):
    import torch

    if "PLAIN" in words:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        lk.attach(model, lk.plan(model, rank=2))
        lk.collect(model).save(tmp_path / "plain")
    names = {"BASE": place / "base", "DATA": place / "data.csv", "RUN": place / "run", "PLAIN": tmp_path / "plain"}
    names["OUT"] = tmp_path / "out"
    for name, file in (
        ("MERGED", "lorakit_task.json"),
        ("STOPPED", "checkpoint/state.json"),
        ("BEGUN", "records.jsonl"),
        ("EMPTY", "note"),
    ):
        names[name] = tmp_path / name.lower()
        (names[name] / file).parent.mkdir(parents=True)
        (names[name] / file).touch()

    def real(word):
        for name, path in names.items():
            word = word.replace(name, str(path)) if word.startswith(name) else word
        return word

    found, _, err = told(capsys, *map(real, words))
    assert found == code, err
    for part in parts:
        assert real(part) in err
    out = tmp_path / "out"
    assert not (out / "adapter").exists()
    assert not list(tmp_path.glob(".*")), "something half-written was left"


@pytest.mark.slow
def test_an_unwritable_directory_and_a_full_disk_are_told(place, tmp_path):
    """A size limit on files stands in for a full disk: the same error comes from the same call."""
    script = (
        "import resource, signal, sys; from lorakit.cli import main\n"
        "import lorakit as lk\n"
        f"adapter = lk.load({str(place / 'run' / 'adapter')!r})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        f"sys.exit(main(['convert', {str(place / 'run')!r}, '--to', 'lorakit', '--out', {str(tmp_path / 'full')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "full").exists()
    assert not list(tmp_path.glob(".full*"))


def test_an_interrupt_is_not_a_traceback(place, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("lorakit.fit.run"), "train", stop)
    code, _, err = told(capsys, *fit_words(place, tmp_path / "run"))
    assert code == 130
    assert "interrupted; no checkpoint was written yet, --overwrite begins anew" in err
    (tmp_path / "run" / "checkpoint").mkdir()
    code, _, err = told(capsys, *fit_words(place, tmp_path / "run", "--overwrite"))
    assert (code, "interrupted; no checkpoint was written yet" in err) == (130, True)
    (tmp_path / "run" / "checkpoint").mkdir()
    with monkeypatch.context() as before:
        before.setattr(import_module("lorakit.fit.run"), "Learner", stop)
        code, _, err = told(capsys, *fit_words(place, tmp_path / "run", "--overwrite"))
    assert (code, "interrupted; it had not begun yet, give the same command again" in err) == (130, True)

    def keep(*args):
        (tmp_path / "run" / "checkpoint").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("lorakit.fit.run"), "train", keep)
    code, _, err = told(capsys, *fit_words(place, tmp_path / "run", "--overwrite"))
    assert code == 130
    assert "the same command with --resume, and without --overwrite, goes on from its checkpoint" in err
    monkeypatch.setattr(import_module("lorakit.cli.doctor"), "run", stop)
    code, _, err = told(capsys, "doctor")
    assert (code, err) == (130, "lorakit: interrupted\n")


@pytest.mark.parametrize(("code", "heard"), [(130, "said"), (1, "said late\n")])
def test_an_interrupted_process_does_not_wait_for_the_end_of_python(code, heard):
    script = (
        "import atexit; import lorakit.__main__ as own; atexit.register(print, ' late')\n"
        f"own.main = lambda: {code}; print('said', end=''); own.run()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, heard, "")


def test_doctor_names_every_extra(capsys):
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = {name: list(needs) for name, needs in project["optional-dependencies"].items() if needs}
    wanted = re.search(r"\[(.*)\]", extras.pop("all")[0])[1].split(",")
    found = json.loads(told(capsys, "doctor", "--json")[1])["extras"]
    assert [*found] == [name for name in wanted if name in extras]
    for name, libraries in found.items():
        assert [*libraries] == [re.match(r"[\w-]+", need)[0] for need in extras[name]], name
    out = told(capsys, "doctor")[1]
    assert all(re.search(rf"^\[{name}\] +(missing )?[a-z-]+ ", out, re.M) for name in found)


def test_memory_that_runs_out_is_one_sentence(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(import_module("lorakit.cli.doctor"), "run", lambda _: torch.empty(1 << 50))
    code, _, err = told(capsys, "doctor")
    assert code == 1
    assert err.startswith("lorakit: memory ran out: 4,294,967,296 MiB more were asked for; ")


def test_help_does_not_import_torch_and_is_quick():
    script = "import sys; from lorakit.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done


def test_python_dash_m_works():
    done = subprocess.run([sys.executable, "-m", "lorakit", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("lorakit 0."), done
    assert Path(sys.executable).exists()

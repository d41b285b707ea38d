"""Talking: turns are remembered, adapters take turns on one base, and an answer is heard as it is written."""

import io
import json

import pytest

import lorakit as lk
from lorakit.cli import main
from lorakit.errors import DataError, UsageError
from lorakit.fit.talk import Talk
from lorakit.tasks.base import load_base
from tiny_chat import CHATML, chat_table, tiny_causal
from tiny_text import table, tiny_bert

ROWS = [("sort rain and soup", "weather then food"), ("sort saw and sun", "tools then weather")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk")
    tiny_causal(folder / "base", "llama", CHATML)
    chat_table(folder / "data.jsonl")
    for name, epochs in (("well", 12), ("hardly", 1)):
        settings = {"epochs": epochs, "batch_size": 8, "learning_rate": 1e-2, "max_steps": 0 if epochs > 1 else 3}
        lk.fit(str(folder / "base"), folder / "data.jsonl", "generate", out=folder / name, **settings)
    return folder


def test_it_answers_as_predict_does_and_is_heard_piece_by_piece(place):
    base = load_base(str(place / "base"), head="causal")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    pieces = []
    with Talk({"well": place / "well", "hardly": place / "hardly"}, base) as talk:
        for name in ("well", "hardly", ""):
            talk.use(name)
            talk.forget()
            found = talk.say(ROWS[0][0], pieces.append, max_new_tokens=8)
            assert found == "".join(pieces)
            if name:
                assert found == lk.predict(place / name, [ROWS[0][0]], max_new_tokens=8)[0].answer
            else:
                assert found != lk.predict(place / "well", [ROWS[0][0]], max_new_tokens=8)[0].answer
            pieces.clear()
    assert base.model.state_dict().keys() == before.keys()


def test_what_was_said_before_is_remembered_until_it_is_forgotten(place):
    with Talk({"well": place / "well"}, system="i like rain") as talk:
        first = talk.say(ROWS[0][0], max_new_tokens=4)
        talk.say(ROWS[1][0], max_new_tokens=4)
        assert [turn.role for turn in talk.turns] == ["system", "user", "assistant", "user", "assistant"]
        assert talk.turns[2].content == first
        messages = [{"role": turn.role, "content": turn.content} for turn in talk.turns[:4]]
        (wanted,) = lk.predict(place / "well", [messages], max_new_tokens=4, truncate=True)
        assert talk.turns[4].content == wanted.answer
        talk.forget()
        assert [turn.role for turn in talk.turns] == ["system"]
        with pytest.raises(UsageError, match="no adapter 'wel'; did you mean 'well'"):
            talk.use("wel")
        with pytest.raises(UsageError, match="takes no option 'max_tokens'; did you mean 'max_new_tokens'"):
            talk.say(ROWS[0][0], max_tokens=4)


@pytest.mark.parametrize("name", ["train", "type", "half", "v1.2"])
def test_a_run_may_be_called_what_a_module_has_already(place, name):
    base = load_base(str(place / "base"), head="causal")
    with Talk({name: place / "well", "eval": place / "hardly"}, base) as talk:
        found = talk.say(ROWS[0][0], max_new_tokens=4)
        talk.use("eval")
        assert (talk.names, talk.name) == ([name, "eval"], "eval")
    assert found == lk.predict(place / "well", [ROWS[0][0]], base=base, max_new_tokens=4)[0].answer


def test_the_earliest_turns_are_dropped_where_there_is_no_room_and_a_long_text_is_refused(place):
    with Talk({"well": place / "well"}, system="i like rain") as talk:
        while not talk.n_dropped:
            before = talk.turns
            found = talk.say(ROWS[len(before) % 2][0], max_new_tokens=4)
        assert talk.n_dropped % 2 == 0
        assert talk.turns[:-2] == [before[0], *before[1 + talk.n_dropped :]]
        messages = [{"role": turn.role, "content": turn.content} for turn in talk.turns[:-1]]
        assert found == lk.predict(place / "well", [messages], max_new_tokens=4)[0].answer
        known = talk.turns
        with pytest.raises(DataError, match=r"the system text have \d{3} tokens, and 63 are the most; shorten it"):
            talk.say("sort " * 90)
        assert talk.turns == known
        talk.forget()
        assert (talk.n_dropped, len(talk.turns)) == (0, 1)


def test_other_runs_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no run to talk to"):
        Talk({})
    tiny_bert(tmp_path / "bert")
    table(tmp_path / "labelled.csv")
    lk.fit(str(tmp_path / "bert"), tmp_path / "labelled.csv", out=tmp_path / "labels", epochs=1)
    with pytest.raises(UsageError, match="'labels' was fitted to classify, which does not talk"):
        Talk({"labels": tmp_path / "labels"})


def test_the_command_reads_lines_and_prints_answers(place, capsys, monkeypatch):
    asked = ROWS[0][0]
    lines = [asked, "/use hardly", "", asked, "/forget", "/use base", asked, "/quit", "x"]
    answer = lk.predict(place / "well", [asked], max_new_tokens=4)[0].answer
    words = ["chat", str(place / "well"), str(place / "hardly"), "--max-new-tokens", "4"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == answer
    assert len(out.splitlines()) == 3
    assert not err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([asked] * 9)))
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 9
    assert "turns left no room for an answer and were dropped" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["adapter"] for one in found] == ["well", "hardly", ""]
    assert found[0]["answer"] == answer


def test_a_line_that_fails_is_told_and_spoils_no_other(place, capsys, monkeypatch):
    asked = ROWS[0][0]
    lines = [asked, "", b"caf\xe9", "/use nobody", "/what", ("sort " * 90).strip(), asked]
    given = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    reasons = {
        3: "what is asked has '\\udce9' at character 3, half of a character that was cut",
        4: "there is no adapter 'nobody'; known: well",
        5: "'/what' is no command; ",
        6: "tokens, and 63 are the most; shorten it",
    }
    words = ["chat", str(place / "well"), "--max-new-tokens", "4"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    for (number, reason), told in zip(reasons.items(), err.splitlines(), strict=True):
        assert told.startswith(f"lorakit: line {number}: ")
        assert reason in told
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    assert main([*words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["asked"] for one in found] == [asked, r"caf\udce9", *lines[3:]]
    assert ["answer" in one for one in found] == [True, False, False, False, False, True]
    assert all(reason in one["error"] for reason, one in zip(reasons.values(), found[1:5], strict=True))


@pytest.mark.parametrize(
    ("said", "why"), [("caf\udce9", "half of a character"), (" ", "is empty"), (3, "must be text")]
)
def test_what_is_no_text_is_refused_and_not_remembered(place, said, why):
    with Talk({"well": place / "well"}) as talk:
        with pytest.raises(DataError, match=f"what is asked .*{why}"):
            talk.say(said)
        assert talk.turns == []

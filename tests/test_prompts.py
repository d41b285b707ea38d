"""Prompts: rows in front of every text do what words there would do, packed and padded, and leave no trace."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lorakit as lk
import tiny
import tiny_chat
import tiny_seq2seq
from lorakit.adapter import Adapter
from lorakit.cli import main
from lorakit.errors import AdapterError, AttachError, BaseMismatchError, DataError, PlanError, UsageError
from lorakit.prompt import PROMPTS, PromptPlan
from lorakit.reading import body_of, reader_of
from lorakit.trunk import Segments, Trunk
from lorakit.trunk.pairs import PairTrunk
from tiny_text import small_task

place, base, data = small_task(180)
WORDS = (7, 3, 11, 5)
LOOKING_BACK = {"gpt2": tiny.gpt2, "llama": tiny.llama}
READING = {"bert": tiny.bert, "roberta": tiny.roberta, **LOOKING_BACK}


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return make().eval().to(dtype)


def ids(*shape: int) -> Tensor:
    return torch.randint(3, tiny.VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def states(model: nn.Module, **given: Tensor) -> Tensor:
    return body_of(model)(**given).last_hidden_state


def behind(model: nn.Module, words: tuple[int, ...], text: Tensor) -> Tensor:
    """The text's states where these words stand in front of it."""
    front = torch.tensor(words).expand(len(text), -1)
    return states(model, input_ids=torch.cat([front, text], 1))[:, len(words) :]


@pytest.mark.parametrize("name", READING)
def test_rows_that_are_words_do_what_the_words_do(name):
    model, text = made(READING[name], torch.float64), ids(2, 6)
    wanted = behind(model, WORDS, text)
    lk.attach(model, lk.plan(model, soft_prompt=PromptPlan("soft", 4, words=WORDS)))
    torch.testing.assert_close(states(model, input_ids=text), wanted)
    rows = model.get_input_embeddings()(text)
    if name != "roberta":  # it counts positions otherwise where it is given rows
        torch.testing.assert_close(states(model, inputs_embeds=rows), wanted)


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_a_prefix_of_words_does_what_the_words_do_where_attention_looks_back(name):
    model, text = made(LOOKING_BACK[name], torch.float64), ids(2, 6)
    wanted = behind(model, WORDS, text)
    lk.attach(model, lk.plan(model, soft_prompt=PromptPlan("prefix", 4, words=WORDS)))
    torch.testing.assert_close(states(model, input_ids=text).double(), wanted, atol=1e-6, rtol=1e-6)


def test_words_are_repeated_or_cut_to_the_length():
    model = made(tiny.gpt2)
    table = model.get_input_embeddings().weight.detach()
    for length, tokens in ((6, [7, 3, 11, 5, 7, 3]), (2, [7, 3])):
        plan = lk.plan(model, soft_prompt=PromptPlan("soft", length, words=WORDS))
        assert torch.equal(lk.init(model, plan).prompt.rows, table[tokens])


@pytest.mark.parametrize(("name", "method"), [*product(READING, PROMPTS.names())])
def test_packed_texts_are_padded_ones_in_value_and_gradient(name, method):
    model = made(READING[name])
    lk.attach(model, lk.plan(model, soft_prompt=f"{method}:5"), seed=1)
    segments, flat = Segments.of([7, 3, 5]), ids(15)
    reads = torch.tensor([0, 6, 9, 12])
    asked = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    learning = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert learning and all(".prompts." in f".{key}" for key in learning)
    with Trunk(model, pad=0) as trunk:
        assert trunk.why_padded == ""
        assert trunk.trims
        every, some = trunk.hidden(flat, segments), trunk.hidden(flat, segments, reads)
        found = torch.autograd.grad((some * asked).sum(), list(learning.values()))
    rows, mask = segments.padded(flat, 0)
    wanted = states(model, input_ids=rows, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(every, wanted, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(some, wanted[reads], atol=2e-6, rtol=1e-4)
    right = torch.autograd.grad((wanted[reads] * asked).sum(), list(learning.values()))
    for x, y in zip(found, right):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-3)


def test_token_types_of_packed_texts_stay_with_their_tokens():
    model = made(tiny.bert).bert
    lk.attach(model, lk.plan(model, soft_prompt="soft:3"), seed=1)
    segments, flat, types = Segments.of([6, 4]), ids(10), torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 1, 1])
    with Trunk(model, pad=0) as trunk:
        found = trunk.hidden(flat, segments, types=types)
    rows, mask = segments.padded(flat, 0)
    kinds = segments.padded(types, 0)[0]
    wanted = states(model, input_ids=rows, attention_mask=mask, token_type_ids=kinds)[mask.bool()]
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_and_its_decoder_both_see_the_rows(kind):
    model = tiny_seq2seq.seq2seq(kind).eval()
    lk.attach(model, lk.plan(model, soft_prompt="soft:5"), seed=1)
    segments, flat = Segments.of([7, 3, 5, 4]), ids(19)
    with PairTrunk(model, pad=0) as trunk:
        assert trunk.why_padded == ""
        found = trunk.hidden(flat, segments)
    (asked, seen), (given, known) = (
        Segments.of(lengths).padded(torch.cat(parts), 0)
        for lengths, parts in (([7, 5], (flat[:7], flat[10:15])), ([3, 4], (flat[7:10], flat[15:])))
    )
    out = model(
        input_ids=asked,
        attention_mask=seen,
        decoder_input_ids=given,
        decoder_attention_mask=known,
        output_hidden_states=True,
    )
    encoded, decoded = out.encoder_last_hidden_state[:, 5:], out.decoder_hidden_states[-1]
    wanted = torch.cat([encoded[0], decoded[0, :3], encoded[1, :5], decoded[1]])
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "method"), [*product(LOOKING_BACK, ("soft", "prefix"))])
def test_generate_writes_what_a_loop_without_a_cache_writes(name, method):
    model = made(LOOKING_BACK[name])
    lk.attach(model, lk.plan(model, soft_prompt=f"{method}:4"), seed=3)
    short, long = ids(1, 4), ids(1, 7)
    alone = []
    for text in (short, long):
        known = text
        for _ in range(6):
            known = torch.cat([known, model(input_ids=known).logits[:, -1:].argmax(-1)], 1)
        alone.append(known[0, text.shape[1] :])
    both = torch.cat([torch.nn.functional.pad(short, (3, 0)), long])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    config = tf.GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = model.generate(input_ids=both, attention_mask=mask, generation_config=config)[:, 7:]
    assert found.tolist() == [row.tolist() for row in alone]


def test_an_encoder_decoder_writes_with_its_prompt():
    model = made(tiny.t5)
    text = ids(2, 5)
    mask = torch.ones_like(text)
    lk.attach(model, lk.plan(model, soft_prompt="soft:4"), seed=3)
    known = torch.zeros(2, 1, dtype=torch.int64)
    for _ in range(4):
        logits = model(input_ids=text, attention_mask=mask, decoder_input_ids=known).logits
        known = torch.cat([known, logits[:, -1:].argmax(-1)], 1)
    config = tf.GenerationConfig(max_new_tokens=4, do_sample=False, decoder_start_token_id=0, pad_token_id=0)
    assert torch.equal(model.generate(input_ids=text, attention_mask=mask, generation_config=config), known)


@pytest.mark.parametrize("method", PROMPTS.names())
def test_detaching_leaves_the_model_as_it_was(method):
    model, text = made(tiny.llama), ids(2, 5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain, hooks = model(input_ids=text).logits, [len(m._forward_hooks) for m in model.modules()]
    lk.attach(model, lk.plan(model, soft_prompt=f"{method}:4"), seed=1)
    assert not torch.equal(model(input_ids=text).logits, plain)
    with lk.disabled(model):
        assert torch.equal(model(input_ids=text).logits, plain)
    lk.detach(model)
    assert torch.equal(model(input_ids=text).logits, plain)
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert not any(m._forward_pre_hooks or "lorakit_prompts" in m.__dict__ for m in model.modules())
    assert model.state_dict().keys() == before.keys()


def test_prompts_of_several_adapters_stand_one_behind_the_other():
    model, text = made(tiny.llama, torch.float64), ids(2, 5)
    first, second = WORDS[:2], WORDS[2:]
    for name, words in (("one", first), ("two", second)):
        lk.attach(model, lk.plan(model, soft_prompt=PromptPlan("soft", 2, words=words)), name=name)
    lk.activate(model, ["one", "two"])
    found = model(input_ids=text).logits
    lk.detach(model, "two")
    lk.activate(model, "one")
    lone = model(input_ids=text).logits
    lk.detach(model)
    for words, logits in ((WORDS, found), (first, lone)):
        front = torch.tensor(words).expand(2, -1)
        wanted = model(input_ids=torch.cat([front, text], 1)).logits[:, len(words) :]
        torch.testing.assert_close(logits, wanted)


def test_a_copy_and_a_pickle_of_the_model_have_the_prompt_as_their_own():
    model, text = made(tiny.gpt2), ids(2, 5)
    lk.attach(model, lk.plan(model, soft_prompt="soft:4"), seed=1)
    wanted = model(input_ids=text).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids=text).logits, wanted)
        with torch.no_grad():
            next(p for p in other.parameters() if p.requires_grad).add_(1)
        assert not torch.equal(other(input_ids=text).logits, wanted)
        assert torch.equal(model(input_ids=text).logits, wanted)
        lk.detach(other)
        assert not torch.equal(other(input_ids=text).logits, wanted)


def test_a_prompt_beside_low_rank_layers_is_one_adapter(tmp_path):
    model, text = made(tiny.llama), ids(2, 5)
    plan = lk.plan(model, rank=2, layers="attention", soft_prompt="prefix:3")
    assert lk.Plan.parse(plan.toml()) == plan
    lk.attach(model, plan, seed=1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p.data, std=0.2)
    wanted, adapter = model(input_ids=text).logits, lk.collect(model)
    assert lk.probe(model, {"input_ids": text}) == ()
    adapter.save(tmp_path / "both")
    assert not (tmp_path / "both" / "adapter_config.json").exists()  # PEFT has no such adapter
    lk.detach(model)
    again = lk.load(tmp_path / "both")
    assert again == adapter
    lk.attach(model, again)
    assert torch.equal(model(input_ids=text).logits, wanted)
    small = lk.truncate(adapter, rank=1)
    assert small.prompt is not None and small.prompt.same_as(adapter.prompt)
    assert adapter.to(dtype=torch.bfloat16).prompt.rows.dtype == torch.bfloat16
    with pytest.raises(AttachError, match="cannot be merged"):
        lk.merge(model)


def test_what_still_comes_out_of_a_network_is_saved_with_it_and_finished_without(tmp_path):
    model = made(tiny.gpt2)
    adapter = lk.init(model, lk.plan(model, soft_prompt="p-tuning:4"), seed=2)
    adapter.save(tmp_path / "a")
    assert lk.load(tmp_path / "a") == adapter
    done = replace(adapter, prompt=adapter.prompt.finished())
    assert [*done.prompt.factors] == ["rows"]
    assert torch.equal(done.prompt.rows, adapter.prompt.rows)
    text, found = ids(1, 5), []
    for one in (adapter, done):
        lk.attach(model, one)
        found.append(model(input_ids=text).logits)
        lk.detach(model)
    assert torch.equal(*found)


def test_a_probe_tells_where_the_prompt_is_not_read():
    model = made(tiny.gpt2)
    lk.attach(model, lk.plan(model, soft_prompt="soft:4"))
    assert lk.probe(model, {"input_ids": ids(1, 4)}) == ()

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, x: Tensor) -> Tensor:
            return x

    assert lk.probe(Around(), {"x": torch.zeros(1)}) == ("prompt",)


def test_rows_that_the_table_did_not_take_are_an_error():
    model = made(tiny.gpt2)
    lk.attach(model, lk.plan(model, soft_prompt="soft:4"))
    prompts = reader_of(model).prompts
    with pytest.raises(AttachError, match="did not call its table"), prompts.placed(prompts.active(), torch.arange(4)):
        pass
    assert torch.equal(lk.collect(model).prompt.rows, prompts.active().inputs)
    assert model(input_ids=ids(1, 3)).logits.shape[1] == 3  # and the next call is a good one


def test_hidden_states_are_those_of_the_text_alone():
    model, text = made(tiny.llama), ids(2, 5)
    lk.attach(model, lk.plan(model, soft_prompt="soft:4"))
    out = model(input_ids=text, labels=text, output_hidden_states=True)
    assert out.logits.shape[:2] == text.shape
    assert all(state.shape[:2] == text.shape for state in out.hidden_states)
    as_tuple = model.model(text, return_dict=False)
    assert torch.equal(as_tuple[0], out.hidden_states[-1])


FAULTY = {
    "no method": ("sfot:20", PlanError, "unknown prompt method 'sfot'.*did you mean 'soft'"),
    "no length": ("soft:x", UsageError, "not a method and a number of rows"),
    "no rows": ("soft:0", PlanError, "a prompt of 0 rows"),
    "no start": (PromptPlan("soft", 4, start="pissa"), PlanError, "has no start 'pissa'; use words or normal"),
    "own start": (PromptPlan("p-tuning", 4, start="words"), PlanError, "begins in its own way"),
    "words unused": (PromptPlan("soft", 4, "normal", (1, 2)), PlanError, "does not begin as words"),
    "words unknown": (PromptPlan("soft", 4, words=(999,)), PlanError, "999 is none of the base's 40 tokens"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_what_is_wrong_with_a_prompt_is_said_before_anything_changes(case):
    asked, kind, words = FAULTY[case]
    model = made(tiny.gpt2)
    with pytest.raises(kind, match=words):
        lk.attach(model, lk.plan(model, soft_prompt=asked))
    assert "prompts" not in model.transformer._modules


def test_models_without_a_place_for_it_are_refused():
    for model, asked, words in (
        (nn.Sequential(nn.Linear(2, 2)), "soft", "no model of texts"),
        (tiny.vit(), "soft", "no model of texts"),
        (tiny_seq2seq.seq2seq("t5"), "prefix", "two stacks; use a soft prompt"),
        (tf.DebertaV2Model(tf.DebertaV2Config(**tiny._SIZES)), "prefix", "use a soft prompt"),
    ):
        with pytest.raises(PlanError, match=words):
            lk.plan(model, soft_prompt=asked)


def test_rules_for_layers_say_that_there_are_none():
    model = made(tiny.gpt2)
    for rules in ({"method": "dora"}, {"rank": 4}, {"start": "pissa"}, {"blocks": "0-1"}):
        with pytest.raises(PlanError, match="a prompt alone has no layers"):
            lk.plan(model, soft_prompt="soft:4", **rules)
    assert lk.plan(model, soft_prompt="soft:4", trained=["lm_head"]).trained == ("lm_head",)


def test_an_adapter_that_does_not_fit_is_refused():
    model = made(tiny.gpt2)
    adapter = lk.init(model, lk.plan(model, soft_prompt="soft:4"))
    prompt = adapter.prompt
    narrow = replace(prompt, sizes=prompt.sizes._replace(width=8), factors={"rows": prompt.rows[:, :8]})
    with pytest.raises(AdapterError, match=r"its rows are \(4, 8\); here they must be \(4, 16\)"):
        lk.attach(model, replace(adapter, prompt=narrow))
    strange = replace(prompt, factors={"rows": prompt.rows, "more": prompt.rows})
    with pytest.raises(AdapterError, match="has no factor 'more'"):
        lk.attach(model, replace(adapter, prompt=strange))
    torch.manual_seed(5)
    other = tiny.gpt2()
    with pytest.raises(BaseMismatchError):
        lk.attach(other, adapter)
    lk.attach(other, adapter, check_base=False)
    with pytest.raises(AdapterError, match="NaN or infinite numbers in the prompt's rows"):
        Adapter({}, prompt=replace(prompt, factors={"rows": prompt.rows * torch.nan})).save("nowhere")


def test_calls_that_it_cannot_stand_in_front_of_are_refused():
    model = made(tiny.llama)
    lk.attach(model, lk.plan(model, soft_prompt="prefix:4"))
    with pytest.raises(AttachError, match=r"widens a mask of \(texts, tokens\)"):
        model(input_ids=ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    model.gradient_checkpointing_enable()
    with pytest.raises(AttachError, match="gradient checkpointing"):
        model.train()(input_ids=ids(1, 4))


def test_a_plan_file_says_all_of_a_prompt(tmp_path):
    model = made(tiny.gpt2)
    plan = lk.plan(model, soft_prompt=PromptPlan("prefix", 3, "words", (4, 5)))
    plan.save(tmp_path / "plan.toml")
    assert lk.Plan.load(tmp_path / "plan.toml") == plan
    for wrong, words in (
        ("prompt = 3", "must be a table"),
        ("[prompt]\nlenght = 3", "unknown key 'lenght'"),
        ('[prompt]\nlength = "3"', "it must be int"),
        ('[prompt]\nwords = ["a"]', "list of tokens' numbers"),
        ('[prompt]\nmethod = "pre"', "unknown prompt method 'pre'"),
    ):
        with pytest.raises(PlanError, match=words):
            lk.Plan.parse(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("method", PROMPTS.names())
def test_a_fit_learns_it_and_predict_uses_it(method, place, base, data):
    out = place / method
    asked = PromptPlan(method, 4)
    quick = {"epochs": 12, "batch_size": 8, "learning_rate": 5e-3 if method == "prefix-mlp" else 2e-2}
    result = lk.fit(base, data, plan=lk.plan(base.model, soft_prompt=asked), out=out, **quick)
    assert result.metrics["loss"] < 0.85 * result.before["loss"]
    assert result.metrics["accuracy"] >= result.before["accuracy"] + 0.2  # of 18 rows
    assert [*result.adapter.prompt.factors] == ["rows"]
    assert result.summary["adapter_parameters"] == result.adapter.n_parameters
    found = lk.predict(out, list(data.test.texts))
    right = sum(one.label == label for one, label in zip(found, data.test.labels))
    assert right / len(found) == pytest.approx(result.metrics["accuracy"])
    assert not any(m._forward_pre_hooks for m in base.model.modules())


def test_a_run_that_was_stopped_goes_on_to_the_same_prompt(place, base, data):
    short = {"epochs": 4, "batch_size": 8, "plan": lk.plan(base.model, 2, "attention", soft_prompt="p-tuning:3")}
    whole = lk.fit(base, data, **short)
    with pytest.raises(KeyboardInterrupt):
        lk.fit(base, data, out=place / "stopped", watch=_stop_after(3), **short)
    assert lk.fit(base, data, out=place / "stopped", resume=True, **short).adapter == whole.adapter


def _stop_after(n_epochs: int) -> Callable[..., None]:
    def watch(record: object, total: int) -> None:
        if record.kind == "valid" and record.epoch == n_epochs:
            raise KeyboardInterrupt

    return watch


def test_the_longest_text_leaves_room_for_the_rows(base, data):
    with pytest.raises(UsageError, match="leaves no room: .* takes 24"):
        lk.fit(base, data, plan=lk.plan(base.model, soft_prompt="soft:24"))
    with pytest.raises(DataError, match="2 are the most"):
        lk.fit(base, data, plan=lk.plan(base.model, soft_prompt="soft:22"))


@pytest.mark.slow
def test_a_language_model_learns_to_answer_by_a_prefix(tmp_path):
    base = str(tiny_chat.tiny_causal(tmp_path / "base"))
    rows = str(tiny_chat.chat_table(tmp_path / "rows.jsonl"))
    out = tmp_path / "run"
    flags = ["--task", "generate", "--soft-prompt", "prefix:6", "--soft-prompt-words", "sort and then", "--epochs", "3"]
    assert main(["fit", base, rows, "--out", str(out), "--lr", "0.02", *flags]) == 0
    adapter = lk.load(out / "adapter")
    assert adapter.prompt.method == "prefix" and (out / "adapter" / "adapter_config.json").exists()
    assert lk.Plan.load(out / "plan.toml").prompt.words
    assert main(["predict", str(out), "--say", "sort rain and sun"]) == 0
    assert main(["inspect", str(out)]) == 0
    assert main(["merge", str(out), "--out", str(tmp_path / "merged")]) != 0
    assert main(["convert", str(out / "adapter"), "--to", "portable", "--out", str(tmp_path / "p")]) != 0
    assert main(["convert", str(out / "adapter"), "--to", "peft", "--out", str(tmp_path / "q")]) == 0


def test_words_without_a_prompt_are_refused(capsys):
    assert main(["plan", "minilm", "--soft-prompt-words", "a"]) == 2
    assert "name one with --soft-prompt" in capsys.readouterr().err

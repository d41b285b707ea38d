"""Encoder-decoders in the trunk: packed equals padded equals every pair alone, in states, losses and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.data import Translations
from lorakit.data.batches import Tokens
from lorakit.tasks.seq2seq import each_loss, logit_scale, own_logits
from lorakit.tasks.translate import Translate
from lorakit.trunk import PairTrunk, Segments
from lorakit.trunk import packing as packing_module
from tiny_seq2seq import MAKE, N_WORDS, PADDED, seq2seq

SIZES = [(5, 2), (1, 4), (9, 1), (3, 7), (34, 40)]  # with filler rows, and more of them than 32


def adapted(name: str, **how: Any) -> Any:
    model = seq2seq(name)
    lk.attach(model, lk.plan(model, rank=2, **how), seed=0)
    g = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    return model


def tokens_of(sizes: list[tuple[int, int]], start: int) -> Tokens:
    g = torch.Generator().manual_seed(1)
    draw = lambda n: tuple(torch.randint(4, N_WORDS, (n,), generator=g).tolist())  # noqa: E731
    pairs = [(draw(n), draw(m)) for n, m in sizes]
    ids = tuple(part for source, target in pairs for part in (source, (start, *target[:-1])))
    labels = tuple(part for _, target in pairs for part in ((), target))
    reads = tuple(tuple(range(len(part))) for part in labels)
    return Tokens(ids, labels, reads, tuple(range(1, len(sizes) + 1)), 0, each=2)


def task_of(model: Any) -> Translate:
    return Translate("", 64, model.config.decoder_start_token_id, (3,), logit_scale(model))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)  # LED's global attention is not asked
    return {name: g for name, g in zip(learning, found) if g is not None}


def alone(model: Any, tokens: Tokens) -> Tensor:
    """The summed loss that Transformers itself computes from labels, a pair at a time."""
    total = torch.zeros(())
    for source, labels in zip(tokens.ids[::2], tokens.labels[1::2]):
        found = model(input_ids=torch.tensor([source]), labels=torch.tensor([labels]))
        total = total + found.loss * len(labels)
    return total


def near(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-4) -> None:
    size = max(float(g.abs().max()) for g in expected.values())
    assert size > 0
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) < bound * size, key


@pytest.mark.parametrize("name", MAKE)
def test_loss_and_gradients_are_those_of_every_pair_alone(name: str) -> None:
    model = adapted(name)
    goal = task_of(model)
    tokens = tokens_of(SIZES[:4] if name in PADDED else SIZES, goal.start)
    wanted = alone(model, tokens)
    expected = gradients(model, wanted)
    batch = tokens.gather(range(len(tokens)))
    with PairTrunk(model, pad=0) as trunk:
        assert bool(trunk.why_padded) == (name in PADDED), trunk.why_padded
        loss = goal.loss(model, batch.hidden(trunk), batch)
        found = gradients(model, loss)
        with torch.no_grad():
            scores = goal.scores(model, batch.hidden(trunk), batch)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    near(found, expected)
    assert scores[:, 1].tolist() == [len(labels) for labels in tokens.labels[1::2]]
    assert float(scores[:, 0].sum()) == pytest.approx(float(wanted.detach()), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in MAKE if name not in PADDED])
def test_packed_equals_padded_also_without_compiled_functions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.kernels import segments as kernel

    monkeypatch.setattr(kernel, "library", lambda: None)
    model = adapted(name)
    goal = task_of(model)
    tokens = tokens_of(SIZES, goal.start)
    batch = tokens.gather([3, 0, 4])
    padded = PairTrunk(model, pad=0)  # not entered: nothing is changed
    padded.why_padded = "for this test"
    wanted = goal.loss(model, batch.hidden(padded), batch)
    expected = gradients(model, wanted)
    with PairTrunk(model, pad=0) as trunk:
        assert not trunk.why_padded
        loss = goal.loss(model, batch.hidden(trunk), batch)
        found = gradients(model, loss)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    near(found, expected)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_states_of_sources_and_targets_stand_where_their_texts_are(name: str) -> None:
    model = adapted(name)
    tokens = tokens_of(SIZES, 0)
    batch = tokens.gather([1, 2])
    with torch.no_grad(), PairTrunk(model, pad=0) as trunk:
        states = trunk.hidden(batch.ids, batch.segments)
    source, given = (torch.tensor([ids]) for ids in tokens.ids[4:6])
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=source).last_hidden_state
        decoded = model.get_decoder()(input_ids=given, encoder_hidden_states=encoded).last_hidden_state
    wanted = torch.cat([encoded[0], decoded[0]])
    assert torch.allclose(states[-10:], wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_no_bias_is_made_for_every_row_of_a_target_and_every_row_of_the_sources(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(name)
    biases: list[Any] = []
    plain = packing_module.attention

    def spy(module: Any, *args: Any, **given: Any) -> Any:
        biases.append(tuple(given["position_bias"].shape))
        return plain(module, *args, **given)

    monkeypatch.setattr(packing_module, "attention", spy)
    batch = tokens_of(SIZES, 0).gather(range(5))
    with torch.no_grad(), PairTrunk(model, pad=0) as trunk:
        biases.clear()
        batch.hidden(trunk)
    assert set(biases) <= {(4, 2 * 34 - 1), (4, 2 * 40 - 1), (0, 0)}
    assert biases.count((0, 0)) == 3  # one for each block of the decoder


@pytest.mark.parametrize("how", ["unfrozen", "adapted"])
def test_a_position_bias_that_learns_is_padded_and_gets_its_gradient(how: str) -> None:
    if how == "adapted":
        model = adapted("t5", layers=["relative_attention_bias"])
    else:
        model = seq2seq("t5").requires_grad_(True)
    goal = task_of(model)
    tokens = tokens_of(SIZES[:4], 0)
    expected = gradients(model, alone(model, tokens))
    batch = tokens.gather(range(4))
    with PairTrunk(model, pad=0) as trunk:
        assert trunk.why_padded == "its position bias learns, and packed rows take it as a constant"
        found = gradients(model, goal.loss(model, batch.hidden(trunk), batch))
    near(found, expected)


@pytest.mark.parametrize("layers", ["embed_positions", "encoder_attn.k_proj"])
def test_an_adapter_on_the_table_of_positions_is_not_passed_by(layers: str) -> None:
    model = adapted("bart", layers=[layers])
    goal = task_of(model)
    tokens = tokens_of(SIZES[:4], 3)
    expected = gradients(model, alone(model, tokens))
    batch = tokens.gather(range(4))
    with PairTrunk(model, pad=0) as trunk:
        assert bool(trunk.why_padded) == (layers == "embed_positions")
        near(gradients(model, goal.loss(model, batch.hidden(trunk), batch)), expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["t5", "umt5", "bart", "m2m100"])
def test_everything_is_put_back(name: str, dtype: str) -> None:
    model = adapted(name)
    before = {key: (t.data_ptr(), t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    state = {path: dict(module.__dict__) for path, module in model.named_modules()}
    settings = [part.config.to_dict() for part in (model, model.get_encoder(), model.get_decoder())]
    batch = tokens_of(SIZES, 0).gather(range(5))
    with PairTrunk(model, dtype=dtype, pad=0) as trunk:
        assert not trunk.why_padded
        assert batch.hidden(trunk).dtype == trunk.dtype
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert tensor.data_ptr() == before[key][0], key
        assert torch.equal(tensor, before[key][1]), key
    for path, module in model.named_modules():
        assert set(module.__dict__) == set(state[path]), path
        if "has_relative_attention_bias" in state[path]:
            assert module.has_relative_attention_bias == state[path]["has_relative_attention_bias"]
    assert [part.config.to_dict() for part in (model, model.get_encoder(), model.get_decoder())] == settings


def test_half_precision_stays_near_the_full_one() -> None:
    model = adapted("t5")
    goal = task_of(model)
    batch = tokens_of(SIZES, 0).gather(range(5))
    losses = []
    for dtype in ("fp32", "bf16"):
        with torch.no_grad(), PairTrunk(model, dtype=dtype, pad=0) as trunk:
            losses.append(float(goal.loss(model, batch.hidden(trunk), batch)))
    assert 0 < abs(losses[0] - losses[1]) < 0.02 * losses[0]


@pytest.mark.parametrize("name", MAKE)
def test_logits_are_proved_to_be_states_times_a_matrix(name: str) -> None:
    model = seq2seq(name)
    scale = logit_scale(model)
    assert scale == (32**-0.5 if name in ("t5", "umt5") else 1.0)
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([4, 5, 6, 7, 8, 9])
    with torch.no_grad():
        logits = own_logits(model, hidden)
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        found = [each_loss(model, hidden, labels, by)[:, 0] for by in (scale, 0.0)]
    assert "forward" not in model.get_decoder().__dict__
    for losses in found:
        assert torch.allclose(losses, expected, rtol=1e-4, atol=1e-4)


def test_logits_that_are_squashed_go_through_the_models_own_code() -> None:
    model = seq2seq("bart")
    plain = type(model).forward

    def squashed(*args: Any, **given: Any) -> Any:
        found = plain(model, *args, **given)
        found.logits = torch.tanh(found.logits)
        return found

    model.__dict__["forward"] = squashed
    assert logit_scale(model) == 0.0
    tokens = tokens_of(SIZES[:4], 3)
    goal = task_of(model)
    batch = tokens.gather(range(4))
    with torch.no_grad():
        with PairTrunk(model, pad=0) as trunk:
            loss = float(goal.loss(model, batch.hidden(trunk), batch))
        expected = 0.0
        for source, given, labels in zip(tokens.ids[::2], tokens.ids[1::2], tokens.labels[1::2]):
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([given])).logits[0]
            expected += float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum"))
    assert loss == pytest.approx(expected, rel=1e-4)


def test_the_inputs_of_the_decoder_are_those_that_the_model_makes_of_labels() -> None:
    from tiny_seq2seq import tokenizer

    for name in ("t5", "bart", "marian"):
        model = seq2seq(name)
        goal = task_of(model)
        rows = Translations(("sort rain and soup",), ("weather then food",), "here", (1,))
        tokens = goal.examples(rows, tokenizer(), truncate=False)
        shifted = model.prepare_decoder_input_ids_from_labels(torch.tensor([tokens.labels[1]]))
        assert tokens.ids[1] == tuple(shifted[0].tolist())
        assert tokens.labels[1][-1] == 3
        assert Segments.of(tokens.text_lengths).n_tokens == tokens.lengths[0]


def test_a_text_beyond_the_table_of_positions_is_an_error_and_padding_beyond_it_is_none() -> None:
    model = seq2seq("bart")
    goal = task_of(model)
    with torch.no_grad(), PairTrunk(model, pad=0) as trunk:
        assert not trunk.why_padded
        for table in (model.get_encoder().embed_positions, model.get_decoder().embed_positions):
            table.weight.data = table.weight.data[:12]  # 10 positions; the rows of padding are more
        batch = tokens_of([(9, 10), (3, 4)], 3).gather([0, 1])
        loss = goal.loss(model, batch.hidden(trunk), batch)
        assert bool(torch.isfinite(loss))
        with pytest.raises(IndexError, match="a text of 11 tokens, where the model has 10 positions"):
            tokens_of([(11, 4), (3, 4)], 3).gather([0, 1]).hidden(trunk)

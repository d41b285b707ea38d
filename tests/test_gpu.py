"""The whole engine on a GPU, against the CPU. Without one these tests are left out."""

import pytest
import torch

import lorakit as lk
from lorakit.data import load_dialogues, load_splits
from lorakit.device import has_triton
from lorakit.fit import Result
from lorakit.fit.talk import Talk
from lorakit.kernels import thin
from lorakit.kernels.segments import Scores, segment_attention
from lorakit.tasks.base import Base
from lorakit.trunk import place_of
from tiny_chat import CHATML, causal, chat_table, tokenizer
from tiny_text import small_task

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU; runs where torch sees one")
place, base, data = small_task(180)
QUICK = {"epochs": 3, "batch_size": 8, "learning_rate": 5e-3}


def losses(result: Result) -> list[float]:
    return [record["loss"] for record in result.records]


def test_a_fit_there_takes_the_steps_of_the_cpu_and_leaves_the_base_here(base, data):
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    here = lk.fit(base, data, dtype="fp32", device="cpu", **QUICK)
    there = lk.fit(base, data, dtype="fp32", device="cuda", **QUICK)
    assert losses(there) == pytest.approx(losses(here), rel=2e-3)
    assert there.summary["gpu"] and there.summary["memory"]["peak_bytes"] > 0
    assert place_of(base.model) == torch.device("cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    half = lk.fit(base, data, dtype="bf16", device="cuda", **QUICK)
    assert losses(half)[:5] == pytest.approx(losses(here)[:5], rel=5e-2)


def test_a_language_model_learns_and_answers_there(tmp_path):
    rows = load_splits(chat_table(tmp_path / "data.jsonl"), read=load_dialogues)
    model = Base(causal("llama"), tokenizer(CHATML), "llama", "last", 64, CHATML)
    short = {**QUICK, "epochs": 1, "dtype": "fp32", "learning_rate": 1e-2}
    here = lk.fit(model, rows, "generate", device="cpu", **short)
    there = lk.fit(model, rows, "generate", device="cuda", out=tmp_path / "run", checkpoint_steps=2, **short)
    assert losses(there) == pytest.approx(losses(here), rel=2e-3)
    asked = [rows.test.turns[0][0].content]
    (answer,) = lk.predict(tmp_path / "run", asked, base=model, device="cuda", max_new_tokens=8)
    assert lk.predict(tmp_path / "run", asked, base=model, device="cpu", max_new_tokens=8) == [answer]
    with Talk({"run": tmp_path / "run"}, model, device="cuda") as talk:
        assert talk.say(asked[0], max_new_tokens=8) == answer.answer
    assert place_of(model.model) == torch.device("cpu")


def test_a_run_goes_on_there_with_what_its_checkpoint_holds(base, data, tmp_path):
    class StopError(Exception):
        pass

    def stop(record, total):
        if record.kind == "step" and record.step == 9:
            raise StopError

    how = {**QUICK, "dtype": "fp32", "device": "cuda", "checkpoint_steps": 4}
    whole = lk.fit(base, data, **how)
    with pytest.raises(StopError):
        lk.fit(base, data, out=tmp_path / "run", watch=stop, **how)
    resumed = lk.fit(base, data, out=tmp_path / "run", resume=True, **how)
    assert resumed.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-3)


@pytest.mark.parametrize("scores", [Scores(0.3), Scores(0.3, causal=True), Scores(0.3, causal=True, window=7)])
def test_packed_attention_there_is_that_of_float64(scores):
    starts = torch.tensor([0, 5, 6, 70, 200])
    q, k, v = (torch.randn(h, 200, 64, device="cuda").bfloat16().requires_grad_() for h in (4, 2, 2))
    y = segment_attention(q, k, v, starts, scores)
    dy = torch.randn_like(y)
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    wanted = segment_attention(*exact, starts, scores)
    pairs = zip(
        (y.detach(), *torch.autograd.grad(y, (q, k, v), dy)),
        (wanted.detach(), *torch.autograd.grad(wanted, exact, dy.cpu().double())),
    )
    assert all(float((f.cpu().double() - w).abs().max() / w.abs().max()) < 3e-2 for f, w in pairs)


def test_kernels_and_torch_give_the_same_gradients_of_pairs_there(monkeypatch):
    if not has_triton(torch.device("cuda", 0)):
        pytest.skip("no Triton for this GPU; runs on those of capability 8.0 and more, where it is installed")
    n, i, o, r = 333, 200, 170, 16
    x, dx, a, b, dy = (
        torch.randn(*shape, device="cuda").bfloat16() for shape in ((n, i), (n, i), (r, i), (r, o), (n, o))
    )
    found = []
    for by_triton in ("0", "1"):
        monkeypatch.setenv("LORAKIT_TRITON", by_triton)
        into, mine = (torch.zeros(r, i, device="cuda"), torch.zeros(o, r, device="cuda")), dx.clone()
        thin.pair_gradients(x, x @ a.T, a, [b], [dy], [into], [2.0], mine)
        found.append((*into, mine))
    assert all(torch.allclose(one, two, rtol=2e-2, atol=2e-2 * float(one.abs().max())) for one, two in zip(*found))

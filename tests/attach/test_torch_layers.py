"""torch's own composite layers, which read weights without calling layers and take fast paths past them."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lorakit as lk
from lorakit.method import METHODS
from lorakit.testing import perturb, snapshot

# torch says so of itself whenever its own encoder meets padding in evaluation
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()


MERGED = [m.name for m in METHODS if m.linear and m.name != "ssf"]  # which wants a bias everywhere


def adapted(model: nn.Module, method: str = "lora", **rules: object) -> nn.Module:
    rank = 1 if method in ("bone", "oft", "boft") else 2  # which must divide sides, of 5 among others
    lk.attach(model, lk.plan(model, rank, method=method, scale=1.0, **rules))  # type: ignore[arg-type]
    perturb(model.double(), 0.2)
    return model


def chain_rule_holds(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """Gradients of the factors against those of the weights of the merged model."""
    run(model).square().sum().backward()
    adapter = lk.collect(model)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    lk.merge(model)
    model.requires_grad_(True).zero_grad()
    run(model).square().sum().backward()
    for path, layer in adapter.layers.items():
        module, parameter = path.rpartition(".")[::2] if layer.kind == "parameter" else (path, "weight")
        gradient = model.get_submodule(module)._parameters[parameter].grad  # type: ignore[union-attr]
        assert gradient is not None
        slot = "adapters" if parameter == "weight" else f"adapters_{parameter}"
        prefix = f"{module}.{slot}.default" if module else f"{slot}.default"
        assert torch.allclose(found[f"{prefix}.a"], layer.scale * layer.factors["b"].mT @ gradient, atol=1e-10)
        assert torch.allclose(found[f"{prefix}.b"], layer.scale * gradient @ layer.factors["a"].mT, atol=1e-10)
    assert len(found) == 2 * len(adapter.layers)


# ---------------------------------------------------------------- attention


class Attending(nn.Module):
    """Attention with queries, keys and values of any widths."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)  # type: ignore[arg-type]
        self.kdim, self.vdim = self.attn.kdim, self.attn.vdim

    def forward(self, x: Tensor) -> Tensor:
        key, value = x[..., : self.kdim], x[..., : self.vdim]
        result: Tensor = self.attn(x, key, value, key_padding_mask=PADDING, need_weights=False)[0]
        return result


ATTENTION = {
    "packed": {},
    "without bias": {"bias": False},
    "kdim": {"kdim": 6},
    "kdim and vdim": {"kdim": 6, "vdim": 4},
    "extra rows": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("options", ATTENTION)
def test_attention_equals_its_merged_self(options: str, method: str, mode: str) -> None:
    model = Attending(**ATTENTION[options]).double().train(mode == "train")
    before = snapshot(model)
    plain = model(X)
    adapted(model, method)
    with torch.no_grad():
        y = model(X)
        assert float((y - plain).abs().max()) > 1e-3
        lk.merge(model, keep=True)
        assert torch.allclose(model(X), y, atol=1e-12)
        lk.unmerge(model)
        lk.detach(model)
    assert snapshot(model) == before
    assert torch.equal(model(X), plain)


@pytest.mark.parametrize("options", ["packed", "kdim and vdim"])
def test_gradients_through_attention_follow_the_chain_rule(options: str) -> None:
    chain_rule_holds(adapted(Attending(**ATTENTION[options]).double()), lambda model: model(X))


def test_in_proj_alone_leaves_out_proj() -> None:
    model = adapted(Attending().double(), layers="in_proj_weight")
    assert list(lk.collect(model).layers) == ["attn.in_proj_weight"]
    assert lk.probe(model, X) == ()


# ---------------------------------------------------------------- encoder and its fast path


def encoder(activation: str = "relu") -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
    return nn.TransformerEncoder(layer, 2).double()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts calls of torch's fused encoder layer."""
    calls: list[int] = []
    real = torch._transformer_encoder_layer_fwd

    def count(*args: object) -> Tensor:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", count)
    return calls


def test_the_plain_encoder_takes_the_fast_path_in_this_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests of it below would show nothing."""
    calls = counted(monkeypatch)
    model = encoder().eval().requires_grad_(False)
    model(X)
    assert len(calls) == 2
    model(X, src_key_padding_mask=PADDING)
    assert len(calls) == 4


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("layers", ["all-linear", "linear1", "in_proj_weight", "out_proj", "re:layers.1.linear2"])
@pytest.mark.parametrize("method", MERGED)
def test_an_encoder_in_evaluation_equals_its_merged_self(
    method: str, layers: str, masked: bool, grad: Callable[[], AbstractContextManager[None]]
) -> None:
    model = encoder().eval().requires_grad_(False)
    before = snapshot(model)
    mask = PADDING if masked else None
    with grad():
        plain = model(X, src_key_padding_mask=mask)
        adapted(model, method, layers=layers)
        y = model(X, src_key_padding_mask=mask)
        lk.merge(model, keep=True)
        merged = model(X, src_key_padding_mask=mask)
        lk.unmerge(model)
        with lk.disabled(model):
            off = model(X, src_key_padding_mask=mask)
        lk.detach(model)
        again = model(X, src_key_padding_mask=mask)
    seen = ~PADDING if masked else torch.ones_like(PADDING)  # what a path gives for padding is its own affair
    assert float((y - plain)[seen].detach().abs().max()) > 1e-4
    assert torch.allclose(merged[seen], y[seen], atol=1e-12)
    assert torch.allclose(off[seen], plain[seen], atol=1e-12)
    assert torch.equal(again, plain)
    assert snapshot(model) == before


def test_a_detached_or_merged_encoder_takes_the_fast_path_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model = adapted(encoder().eval().requires_grad_(False))
    with torch.no_grad():
        model(X, src_key_padding_mask=PADDING)
        assert not calls
        lk.merge(model)
        assert model.use_nested_tensor
        model(X, src_key_padding_mask=PADDING)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "trained", ["layers.1.norm1", "layers.0.linear1.bias", "layers.0.self_attn.out_proj", "layers"]
)
def test_parameters_of_an_encoder_trained_whole_act_in_evaluation_too(trained: str) -> None:
    model = encoder().eval()
    lk.attach(model, lk.plan(model, rank=2, trained=[trained]))
    perturb(model)
    with torch.no_grad():
        y = model(X, src_key_padding_mask=PADDING)
        lk.merge(model)
        assert torch.allclose(
            model(X, src_key_padding_mask=PADDING)[~PADDING], y[~PADDING], atol=1e-6
        )  # float32 factors


def test_gradients_through_an_encoder_follow_the_chain_rule() -> None:
    chain_rule_holds(adapted(encoder("gelu")), lambda model: model(X, src_key_padding_mask=PADDING))


def test_a_whole_transformer_with_masks_equals_its_merged_self() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True).double()
    target = torch.randn(3, 4, 8, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(4).double()

    def run(net: nn.Module) -> Tensor:
        result: Tensor = net(
            X,
            target,
            tgt_mask=causal,
            src_key_padding_mask=PADDING,
            memory_key_padding_mask=PADDING,
            tgt_is_causal=True,
        )
        return result

    for mode in (True, False):
        before = snapshot(model.train(mode))
        adapted(model)
        assert len(lk.collect(model).layers) == 2 * (2 + 2) + 2 * (4 + 2)
        with torch.no_grad():
            y = run(model)
            lk.merge(model, keep=True)
            assert torch.allclose(run(model), y, atol=1e-12)
            lk.unmerge(model)
        lk.detach(model)
        assert snapshot(model) == before
    chain_rule_holds(adapted(model.train()), run)


# ---------------------------------------------------------------- recurrent nets


class Recurrent(nn.Module):
    def __init__(self, net: nn.RNNBase) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)[0]
        return result


NETS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(8, 5, batch_first=True),
    "deep lstm both ways": lambda: nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True),
    "projected lstm": lambda: nn.LSTM(8, 5, proj_size=3, batch_first=True),
    "lstm without bias": lambda: nn.LSTM(8, 5, bias=False, batch_first=True),
    "gru": lambda: nn.GRU(8, 5, num_layers=2, batch_first=True),
    "rnn": lambda: nn.RNN(8, 5, batch_first=True),
}


def recurrent(name: str) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(NETS[name]()).double()


@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("name", NETS)
def test_a_recurrent_net_equals_its_merged_self(name: str, method: str) -> None:
    model = recurrent(name)
    before, plain = snapshot(model), model(X)
    adapted(model, method)
    assert set(lk.collect(model).layers) == {n for n, p in recurrent(name).named_parameters() if p.ndim == 2}
    y = model(X)
    assert float((y - plain).detach().abs().max()) > 1e-3
    lk.merge(model, keep=True)
    assert torch.allclose(model(X), y, atol=1e-12)
    lk.unmerge(model)
    lk.detach(model)
    assert snapshot(model) == before
    assert torch.equal(model(X), plain)


@pytest.mark.parametrize("name", NETS)
def test_gradients_through_a_recurrent_net_follow_the_chain_rule(name: str) -> None:
    chain_rule_holds(adapted(recurrent(name)), lambda model: model(X))


def test_a_packed_sequence_goes_through() -> None:
    model = adapted(recurrent("gru"))
    packed = pack_padded_sequence(X, torch.tensor([5, 4, 2]), batch_first=True)
    y = model.net(packed)[0].data
    lk.merge(model)
    assert torch.allclose(model.net(packed)[0].data, y, atol=1e-12)


def test_a_recurrent_net_moves_precision_with_its_adapter() -> None:
    model = adapted(recurrent("lstm"))
    y = model(X)
    assert torch.allclose(model.float()(X.float()).double(), y, atol=1e-5)
    assert torch.allclose(model.double()(X), y, atol=1e-5)
    lk.detach(model)
    assert torch.allclose(model(X), recurrent("lstm")(X), atol=1e-6)

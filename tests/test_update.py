"""The normal form, term by term, and what applying it to a layer gives."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kinds import kind_named
from lorakit.testing import Conv1D
from lorakit.update import AdaptedLayer, LayerSpec, Update, same_tensor

OUT, IN, R = 5, 4, 2
PARTS = ("pair", "dense", "gain", "gain_in", "bias", "gain_covers_bias")


def update_of(parts: tuple[str, ...], o: int, i: int, batch: tuple[int, ...] = ()) -> Update:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    a, b, dense, gain, gain_in, bias = draw(R, i), draw(o, R), draw(o, i), draw(o), draw(i), draw(o)
    return Update(
        a=a if "pair" in parts else None,
        b=b if "pair" in parts else None,
        scale=0.7,
        dense=dense if "dense" in parts else None,
        gain=gain if "gain" in parts else None,
        gain_in=gain_in if "gain_in" in parts else None,
        bias=bias if "bias" in parts else None,
        gain_covers_bias="gain_covers_bias" in parts,
    )


def every_combination() -> list[tuple[str, ...]]:
    return [chosen for n in range(len(PARTS) + 1) for chosen in itertools.combinations(PARTS, n)]


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("parts", every_combination(), ids="+".join)
def test_changed_weight_is_the_formula_number_by_number(parts: tuple[str, ...], batch: tuple[int, ...]) -> None:
    update = update_of(parts, OUT, IN, batch)
    weight = torch.randn(*batch, OUT, IN, dtype=torch.float64)
    wanted = weight.clone()
    for place in itertools.product(*map(range, weight.shape)):
        *head, o, i = place
        h = tuple(head)
        if update.a is not None and update.b is not None:
            wanted[place] += 0.7 * sum(update.b[(*h, o, r)] * update.a[(*h, r, i)] for r in range(R))
        if update.dense is not None:
            wanted[place] += update.dense[place]
        if update.gain is not None:
            wanted[place] *= update.gain[(*h, o)]
        if update.gain_in is not None:
            wanted[place] *= update.gain_in[(*h, i)]
    changed = update.weight(weight)
    assert torch.allclose(changed, wanted, atol=1e-13)
    assert torch.allclose(update.delta(weight), wanted - weight, atol=1e-13)


def layers() -> dict[str, tuple[nn.Module, str, tuple[int, int], Tensor]]:
    """Layer, kind, canonical sides, input; linear in the input, so that a gain on the inputs is one on the columns."""
    return {
        "linear": (nn.Linear(IN, OUT), "linear", (OUT, IN), torch.randn(3, IN)),
        "linear without bias": (nn.Linear(IN, OUT, bias=False), "linear", (OUT, IN), torch.randn(2, 3, IN)),
        "hf_conv1d": (Conv1D(OUT, IN), "hf_conv1d", (OUT, IN), torch.randn(3, IN)),
        "conv2d": (nn.Conv2d(3, OUT, 2), "conv2d", (OUT, 12), torch.randn(2, 3, 4, 4)),
        "grouped conv1d": (nn.Conv1d(4, 6, 3, groups=2), "conv1d", (6, 6), torch.randn(2, 4, 5)),
        "conv3d": (nn.Conv3d(2, OUT, 2), "conv3d", (OUT, 16), torch.randn(1, 2, 3, 3, 3)),
        "embedding": (nn.Embedding(7, OUT), "embedding", (OUT, 7), torch.randint(7, (2, 3))),
    }


@pytest.mark.parametrize("parts", every_combination(), ids="+".join)
@pytest.mark.parametrize("name", layers())
def test_applying_an_update_equals_the_layer_with_the_changed_weight(name: str, parts: tuple[str, ...]) -> None:
    layer, kind_name, (o, i), x = layers()[name]
    if "gain_in" in parts and kind_name not in ("linear", "hf_conv1d"):
        parts = tuple(part for part in parts if part != "gain_in")  # inputs are not columns there: no method may do it
    layer, kind, update = layer.double(), kind_named(kind_name), update_of(parts, o, i)
    x = x if kind_name == "embedding" else x.double()
    with torch.no_grad():
        found = kind.apply(layer, x, layer(x), update)
        bias = update.changed_bias(getattr(layer, "bias", None))
        layer.weight.copy_(kind.stored(layer, update.weight(kind.canonical(layer, layer.weight))))
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(bias)
            bias = None
        wanted = layer(x)
        if bias is not None:  # the update brings the first bias of this layer
            wanted = wanted + kind.over_outputs(bias, wanted)
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("name", layers())
def test_stored_is_the_inverse_of_canonical_and_shapes_are_those_of_the_weight(name: str) -> None:
    layer, kind_name, matrix, _ = layers()[name]
    kind = kind_named(kind_name)
    canonical = kind.canonical(layer, layer.weight)
    assert tuple(canonical.shape) == matrix == kind.shapes(layer, "weight").matrix
    assert torch.equal(kind.stored(layer, canonical), layer.weight)
    assert kind.shapes(layer, "weight").shape == tuple(layer.weight.shape)
    assert kind.shapes(layer, "weight").has_bias == (getattr(layer, "bias", None) is not None)


def test_an_embedding_has_no_input_channels_to_scale() -> None:
    layer = nn.Embedding(7, OUT)
    with pytest.raises(NotImplementedError, match="no input channels"):
        kind_named("embedding").apply(layer, torch.tensor([1]), torch.zeros(1, OUT), Update(gain_in=torch.ones(7)))


def test_delta_of_a_pair_needs_no_weight_and_is_said_to_be_one() -> None:
    update = update_of(("pair",), OUT, IN)
    assert update.is_pair
    assert update.rank == R
    assert torch.equal(
        update.delta(torch.full((OUT, IN), torch.nan, dtype=torch.float64)).isnan(), torch.zeros(OUT, IN) > 1
    )
    assert update_of(("pair", "bias"), OUT, IN).is_pair
    for other in ("dense", "gain", "gain_in"):
        assert not update_of(("pair", other), OUT, IN).is_pair
    assert not Update().is_pair
    assert Update().rank == 0


def test_an_empty_update_changes_nothing() -> None:
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    assert torch.equal(Update().weight(weight), weight)
    assert Update().changed_bias(bias) is bias
    assert Update().changed_bias(None) is None


def test_changed_weight_keeps_the_dtype_of_the_weight() -> None:
    everything = update_of(PARTS, OUT, IN)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        weight, bias = torch.randn(OUT, IN).to(dtype), torch.randn(OUT).to(dtype)
        changed = everything.changed_bias(bias)
        assert everything.weight(weight).dtype == dtype
        assert changed is not None
        assert changed.dtype == dtype


def test_detached_cuts_every_part_off_and_keeps_the_numbers() -> None:
    live = update_of(PARTS, OUT, IN)
    for name in ("a", "b", "dense", "gain", "gain_in", "bias"):
        getattr(live, name).requires_grad_()
    cut = live.detached()
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    assert not cut.weight(weight).requires_grad
    assert torch.equal(cut.weight(weight), live.weight(weight))
    assert (cut.scale, cut.gain_covers_bias) == (live.scale, live.gain_covers_bias)


def test_gradients_of_the_changed_weight_are_the_finite_differences() -> None:
    update = update_of(PARTS, OUT, IN)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    leaves = tuple(getattr(update, name).requires_grad_() for name in ("a", "b", "dense", "gain", "gain_in"))

    def changed(*parts: Tensor) -> Tensor:
        a, b, dense, gain, gain_in = parts
        return Update(a=a, b=b, scale=0.7, dense=dense, gain=gain, gain_in=gain_in).weight(weight)

    assert torch.autograd.gradcheck(changed, leaves)


# ---------------------------------------------------------------- specs and layers of adapters


def test_layer_spec_counts_numbers_and_bounds_the_rank() -> None:
    spec = LayerSpec("conv", "conv2d", (6, 3, 2, 2), (6, 12))
    assert spec.n_parameters == 72
    assert spec.max_rank == 6


def layer(**changes: object) -> AdaptedLayer:
    values = {"a": torch.ones(2, 4), "b": torch.zeros(5, 2)}
    return AdaptedLayer(**{"method": "lora", "kind": "linear", "shape": (5, 4), "factors": values, "rank": 2} | changes)  # type: ignore[arg-type]


def test_layers_are_the_same_only_bit_for_bit_and_in_meaning() -> None:
    assert layer().same_as(layer())
    assert layer().n_parameters == 18
    assert layer(start="kaiming").same_as(layer(start="pissa")), "how it began does not change what it is"
    others = [
        layer(method="dora"),
        layer(kind="hf_conv1d"),
        layer(shape=(4, 5)),
        layer(rank=1),
        layer(scale=2.0),
        layer(groups=2),
        layer(factors={"a": torch.ones(2, 4)}),
        layer(factors={"a": torch.ones(2, 4), "b": -torch.zeros(5, 2)}),
        layer(factors={"a": torch.ones(2, 4).double(), "b": torch.zeros(5, 2)}),
    ]
    assert not any(layer().same_as(other) or other.same_as(layer()) for other in others)


def test_same_tensor_compares_bits() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert same_tensor(nan, nan.clone())
    assert not same_tensor(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_tensor(torch.ones(2, 3), torch.ones(3, 2))
    assert not same_tensor(torch.ones(2), torch.ones(2, dtype=torch.float64))
    matrix = torch.randn(3, 4)
    assert same_tensor(matrix.T, matrix.T.contiguous())
    assert same_tensor(torch.zeros(0, 4), torch.zeros(0, 4))
    assert same_tensor(torch.tensor(1.5), torch.tensor(1.5))
    assert same_tensor(torch.randn(3).bfloat16(), torch.zeros(3).bfloat16()) is False


def test_linear_pair_is_two_thin_products() -> None:
    a, b, x = torch.randn(R, IN), torch.randn(OUT, R), torch.randn(3, IN)
    found = kind_named("linear").pair(nn.Linear(IN, OUT), x, a, b)
    assert torch.allclose(found, F.linear(x, b @ a), atol=1e-6)

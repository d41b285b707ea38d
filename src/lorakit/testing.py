"""The contract that a method keeps on every kind of layer and under every drive. Run it on a method of your own:

    from lorakit.testing import contract
    contract("lora")                              # registered, by name, class or instance
    contract(MyMethod, kinds=["linear", "conv2d"])

A `Trial` is one method with one start on one layer under one drive; `trials` lists them and `checks` says what has to
hold for each: small functions that raise AssertionError, so that a test suite can report every one by itself. What a
method cannot do must be said by its `faults`; then the contract is that attaching refuses it, loudly and untouched.
"""

import copy
import io
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.adapter import load
from lorakit.attach import attach, collect, detach, disabled, merge
from lorakit.attach.slots import Factors
from lorakit.describe import locate
from lorakit.errors import PlanError
from lorakit.method import METHODS, Method, layer_update
from lorakit.plan import LayerPlan, Plan

RANK = 2


class Conv1D(nn.Module):
    """Transformers' layer of this name, so that the contract runs without Transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """Three experts in one 3-D weight, read by a product of their own."""

    def __init__(self, name: str, is_transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.name = 3, is_transposed, name
        self.register_parameter(name, nn.Parameter(torch.randn(*((3, 6, 5) if is_transposed else (3, 5, 6)))))

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self, self.name)
        return torch.einsum("ti,eio->teo" if self.is_transposed else "ti,eoi->teo", x, weight)


class Attention(nn.Module):
    """Self-attention by torch's own layer, which reads two matrices without calling a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return result


class Recurrent(nn.Module):
    """A recurrent net and its output alone."""

    def __init__(self, net: nn.RNNBase) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)[0]
        return result


class Case(NamedTuple):
    """A small model, the layer of it that is adapted, its input, and the drives that can mean anything there."""

    name: str
    kind: str
    path: str
    drives: tuple[str, ...]
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The model, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.build().to(dtype)

    def batch(self, dtype: torch.dtype) -> Tensor:
        """The input, always the same."""
        generator = torch.Generator().manual_seed(11)
        if self.kind == "embedding":
            return torch.randint(11, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)


def _one(name: str, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(OrderedDict([(name, make())]))


_ALL, _CALLED, _READ = ("hook", "fused", "weight"), ("hook", "weight"), ("weight",)
_down = "down_proj"  # the name of a matrix that ends an MLP: its role decides what some methods train
CASES = (
    Case("linear", "linear", "layer", _ALL, _one("layer", lambda: nn.Linear(6, 5)), (2, 3, 6)),
    Case("linear that ends an MLP", "linear", _down, _ALL, _one(_down, lambda: nn.Linear(6, 5, bias=False)), (4, 6)),
    Case("hf_conv1d", "hf_conv1d", "layer", _ALL, _one("layer", lambda: Conv1D(5, 6)), (2, 3, 6)),
    Case("hf_conv1d that ends an MLP", "hf_conv1d", _down, _ALL, _one(_down, lambda: Conv1D(5, 6)), (2, 3, 6)),
    Case("conv1d", "conv1d", "layer", _CALLED, _one("layer", lambda: nn.Conv1d(3, 4, 3, padding=1)), (2, 3, 7)),
    Case("conv2d", "conv2d", "layer", _CALLED, _one("layer", lambda: nn.Conv2d(3, 4, (3, 2), stride=2)), (2, 3, 7, 6)),
    Case(
        "grouped conv2d",
        "conv2d",
        "layer",
        _CALLED,
        _one("layer", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular")),
        (2, 4, 5, 5),
    ),
    Case("conv2d that ends an MLP", "conv2d", _down, _CALLED, _one(_down, lambda: nn.Conv2d(3, 4, 1)), (2, 3, 4, 4)),
    Case("conv3d", "conv3d", "layer", _CALLED, _one("layer", lambda: nn.Conv3d(2, 3, 2, bias=False)), (1, 2, 4, 3, 3)),
    Case("embedding", "embedding", "layer", _CALLED, _one("layer", lambda: nn.Embedding(11, 6, padding_idx=3)), (2, 9)),
    Case("attention in_proj", "parameter", "attn.in_proj_weight", _READ, Attention, (2, 3, 6)),
    Case("attention out_proj", "linear", "attn.out_proj", _READ, Attention, (2, 3, 6)),
    Case(
        "experts", "parameter", "moe.gate_up_proj", _READ, _one("moe", lambda: Experts("gate_up_proj", False)), (4, 6)
    ),
    Case("transposed experts", "parameter", "moe.up", _READ, _one("moe", lambda: Experts("up", True)), (4, 6)),
    Case(
        "experts that end an MLP", "parameter", f"moe.{_down}", _READ, _one("moe", lambda: Experts(_down, True)), (4, 6)
    ),
    Case("lstm", "parameter", "net.weight_ih_l0", _READ, lambda: Recurrent(nn.LSTM(6, 4)), (3, 2, 6)),
    Case("gru", "parameter", "net.weight_hh_l0", _READ, lambda: Recurrent(nn.GRU(6, 4)), (3, 2, 6)),
)


class Trial(NamedTuple):
    """One method with one start on one layer under one drive."""

    method: str
    start: str
    case: Case
    drive: str

    def __str__(self) -> str:
        start = f" started by {self.start}" if self.start else ""
        return f"method '{self.method}'{start} on {self.case.name} (kind {self.case.kind}) by drive '{self.drive}'"

    @property
    def plan(self) -> Plan:
        """The plan of this trial."""
        rank = RANK if METHODS[self.method].takes_rank else 0
        return Plan({self.case.path: LayerPlan(self.method, rank, 1.5, self.start)})

    @property
    def faults(self) -> list[str]:
        """Why the method cannot be planned here, in its own words."""
        found = locate(self.case.model(torch.float32), self.case.path)
        assert found is not None
        return METHODS[self.method].faults(found.spec, self.plan.layers[self.case.path])

    def base(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
        """Model, input, and what the untouched model answers."""
        model, batch = self.case.model(dtype), self.case.batch(dtype)
        with torch.no_grad():
            return model, batch, model(batch)

    def attached(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
        """Model with an adapter that does something, input, answer. In float64 the factors are float64 too."""
        model, batch, _ = self.base(dtype)
        attach(model, self.plan, drive=self.drive)
        if dtype == torch.float64:
            model.to(dtype)
        perturb(model)
        with torch.no_grad():
            return model, batch, model(batch)


def perturb(model: nn.Module, by: float = 0.3) -> None:
    """Adds noise to every factor that learns."""
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=by)


def factors_of(model: nn.Module) -> dict[str, Factors]:
    """Module name -> the factors that attach has put there."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Factors)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that detaching must give back, in a form that compares by `==`; tensors by their bits."""
    return {
        path: (
            type(module),
            sorted(module.__dict__),
            list(module._modules),
            [(name, _bits(p), p.requires_grad, id(p)) for name, p in module._parameters.items() if p is not None],
            [(name, _bits(b)) for name, b in module._buffers.items() if b is not None],
            [len(getattr(module, table)) for table in sorted(module.__dict__) if table.endswith("_hooks")],
            [(key, value) for key, value in module.__dict__.items() if isinstance(value, bool | int | str | float)],
        )
        for path, module in model.named_modules()
    }


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().contiguous().flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _same(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Equal up to `tolerance` of the largest number: one rule for every shape, and NaN is never equal."""
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    found, wanted = found.detach().double(), wanted.detach().double()
    size = max(1.0, float(wanted.abs().max()))
    gap = float((found - wanted).abs().max())
    assert gap <= tolerance * size, f"{what}: off by {gap:.3g} where numbers reach {size:.3g}"


# ---------------------------------------------------------------- the checks


def fresh_changes_nothing(trial: Trial) -> None:
    """A fresh adapter leaves the output as it was."""
    model, batch, wanted = trial.base(torch.float32)
    attach(model, trial.plan, drive=trial.drive)
    with torch.no_grad():
        _same(model(batch), wanted, 1e-5, "output")  # a start may cancel against itself: some roundings of float32


def perturbed_changes_output(trial: Trial) -> None:
    """Factors that have moved change the output, and a disabled adapter does not act."""
    _, _, plain = trial.base()
    model, batch, moved = trial.attached()
    gap = float((moved - plain).abs().max())
    assert gap > 1e-3, f"noise of 0.3 in every factor moved the output by {gap:.3g} only"
    with torch.no_grad(), disabled(model):
        _same(model(batch), plain, 0.0, "output while disabled")


def gradients_reach_factors(trial: Trial) -> None:
    """The trainable factors get a gradient, nothing else does."""
    model, batch, _ = trial.attached()
    model(batch).square().sum().backward()
    learning = {id(p) for factors in factors_of(model).values() for p in factors._parameters.values()}
    frozen = METHODS[trial.method].frozen
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if id(parameter) not in learning:
            assert not parameter.requires_grad, f"the base parameter '{name}' requires a gradient"
            assert parameter.grad is None, f"the base parameter '{name}' got a gradient"
            continue
        assert leaf not in frozen, f"the frozen factor '{leaf}' is a parameter that learns"
        assert parameter.grad is not None, f"the factor '{leaf}' got no gradient"
        assert bool(parameter.grad.isfinite().all()), f"the gradient of '{leaf}' is not finite"
        assert bool((parameter.grad != 0).any()), f"the gradient of '{leaf}' is zero"


def drive_equals_changed_weight(trial: Trial) -> None:
    """Output and gradients are those of the plain model with the changed weight put into it."""
    model, batch, output = trial.attached()
    (factors,) = factors_of(model).values()
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in factors.tensors().items()}
    plain, _, _ = trial.base()
    found = locate(plain, trial.case.path)
    assert found is not None
    module, name, kind = found.module, found.parameter, found.kind
    base = kind.canonical(module, found.weight.detach())
    update = METHODS[trial.method].update(leaves, factors.scale, lambda: base)
    changed = {name: kind.stored(module, update.weight(base))}
    bias_name = "bias" if kind.name != "parameter" else name.replace("weight", "bias")
    bias = module._parameters.get(bias_name) if bias_name != name else None
    bias = update.changed_bias(None if bias is None else bias.detach())
    if bias is not None:
        changed[bias_name] = bias
    for key, tensor in changed.items():  # a plain attribute in the place of the parameter
        del module._parameters[key]
        module.__dict__[key] = tensor
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [getattr(module, key) for key in module._flat_weights_names]
    wanted = plain(batch)
    _same(output, wanted, 1e-12, "output")  # float64: some hundred roundings of 1e-16
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=wanted.dtype).reshape(wanted.shape)
    (wanted * weights).sum().backward()
    (model(batch) * weights).sum().backward()
    for key, parameter in factors._parameters.items():
        assert parameter is not None
        gradient, expected = parameter.grad, leaves[key].grad
        assert gradient is not None, f"the factor '{key}' got no gradient"
        assert expected is not None
        _same(gradient, expected, 1e-12, f"gradient of '{key}'")


def merged_gives_same_output(trial: Trial) -> None:
    """Merging leaves a plain model with the same output."""
    plain, _, _ = trial.base()
    model, batch, wanted = trial.attached()
    merge(model)
    with torch.no_grad():
        _same(model(batch), wanted, 1e-12, "output after merging")
    assert list(model.state_dict()) == list(plain.state_dict()), "merging left something in the state dict"
    assert not factors_of(model), "merging left the adapter attached"


def compiles(trial: Trial) -> None:
    """torch.compile takes the model as one graph and gives the same output and gradients."""
    model, batch, _ = trial.attached()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):  # off by default: dynamo breaks its graph at recurrent nets
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        output = compiled(batch)
        output.square().sum().backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in learning if p.grad is not None]
    model.zero_grad()
    wanted = model(batch)
    wanted.square().sum().backward()
    torch._dynamo.reset()
    _same(output, wanted, 1e-12, "output")
    assert len(found) == len(learning), "a factor got no gradient"
    for gradient, parameter in zip(found, learning):
        assert parameter.grad is not None
        _same(gradient, parameter.grad, 1e-12, "gradient")


def copies_are_independent(trial: Trial) -> None:
    """A deep copy answers the same, learns by itself, and is detached by itself."""
    model, batch, wanted = trial.attached()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        _same(twin(batch), wanted, 0.0, "output of the copy")
        perturb(twin)
        assert not torch.equal(twin(batch), wanted), "the copy reads the factors of the original"
        _same(model(batch), wanted, 0.0, "output of the original after the copy has moved")
        detach(twin)
        plain, _, base = trial.base()
        _same(twin(batch), base, 0.0, "output of the copy after detaching it")
        assert list(twin.state_dict()) == list(plain.state_dict()), "detaching left something in the copy"
        _same(model(batch), wanted, 0.0, "output of the original after the copy was detached")


def pickles(trial: Trial) -> None:
    """Pickling gives a model that answers the same and can be detached."""
    model, batch, wanted = trial.attached()
    stream = io.BytesIO(pickle.dumps(model))
    del model
    twin = pickle.load(stream)
    with torch.no_grad():
        _same(twin(batch), wanted, 0.0, "output after unpickling")
        detach(twin)
        _same(twin(batch), trial.base()[2], 0.0, "output after unpickling and detaching")


def dtypes_are_kept(trial: Trial) -> None:
    """The output has the dtype of the base whatever the factors have, and fresh factors are float32."""
    _, _, exact = trial.attached(torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float64, 1e-4)):
        model, batch, plain = trial.base(dtype)
        attach(model, trial.plan, drive=trial.drive)
        for factors in factors_of(model).values():
            for name, tensor in factors.tensors().items():
                assert tensor.dtype == torch.float32, f"the fresh factor '{name}' is {tensor.dtype} on a {dtype} base"
        perturb(model)
        with torch.no_grad():
            output = model(batch)
        assert output.dtype == plain.dtype, f"the output is {output.dtype} on a {dtype} base"
        # bfloat16 rounds at 2^-8, base, factors and every step; recurrent nets add up a few of those
        _same(output, exact.to(torch.float64), tolerance, f"output in {dtype}")


def saves_and_loads(trial: Trial) -> None:
    """Collected, saved and loaded it is equal, and attached elsewhere it gives the same output."""
    model, batch, wanted = trial.attached()
    adapter = collect(model)
    with tempfile.TemporaryDirectory() as place:
        adapter.save(Path(place) / "adapter")
        loaded = load(Path(place) / "adapter")
    assert loaded == adapter, "the loaded adapter is not the one that was saved"
    other, _, _ = trial.base()
    attach(other, loaded, drive=trial.drive)
    with torch.no_grad():
        _same(other(batch), wanted, 0.0, "output with the loaded adapter")


def detach_restores(trial: Trial) -> None:
    """Detaching gives back the model bit for bit: tensors, types, attributes, hooks, `requires_grad`."""
    model, batch, _ = trial.base()
    next(iter(model.parameters())).requires_grad_(False)
    before = snapshot(model)
    attach(model, trial.plan, drive=trial.drive)
    perturb(model.to(torch.float64))
    model(batch).sum().backward()
    detach(model)
    after = snapshot(model)
    changed = [path or "the model" for path in before if before[path] != after.get(path)]
    assert not changed, f"detaching did not restore {', '.join(changed)}"
    assert before.keys() == after.keys(), "detaching left a module behind"


def size_is_counted(trial: Trial) -> None:
    """`size` is the count of trainable numbers."""
    model, _, _ = trial.attached()
    found = locate(model, trial.case.path)
    assert found is not None
    declared = METHODS[trial.method].size(found.spec, trial.plan.layers[trial.case.path].rank)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert declared == counted, f"size says {declared}, and {counted} numbers learn"


def update_is_what_it_says(trial: Trial) -> None:
    """`exact_pair` and `reads_weight` are true of the update, and `shapes` of the factors."""
    method = METHODS[trial.method]
    model, _, _ = trial.attached()
    adapter = collect(model)
    layer = adapter.layers[trial.case.path]
    found = locate(model, trial.case.path)
    assert found is not None
    for name, shape in method.shapes(found.spec, layer.rank).items():
        assert name in layer.factors, f"the factor '{name}' that `shapes` names is missing"
        assert tuple(layer.factors[name].shape) == shape, f"'{name}' is {tuple(layer.factors[name].shape)}, not {shape}"
    try:
        update = layer_update(layer)
    except PlanError:
        assert method.reads_weight, "the update asks for the base weight, and `reads_weight` is False"
        update = layer_update(layer, lambda: found.kind.canonical(found.module, found.weight))
    else:
        assert not method.reads_weight, "the update never asks for the base weight, and `reads_weight` is True"
    assert update.is_pair == method.exact_pair, f"`exact_pair` is {method.exact_pair}, the update says {update.is_pair}"


def refused(trial: Trial) -> None:
    """What `faults` says cannot be done, attaching refuses in the same words, and leaves the model as it was."""
    model, _, _ = trial.base()
    before = snapshot(model)
    try:
        attach(model, trial.plan, drive=trial.drive)
    except PlanError as error:
        missing = [fault for fault in trial.faults if fault not in str(error)]
        assert not missing, f"the error does not say: {'; '.join(missing)}"
    else:
        raise AssertionError(f"`faults` says {trial.faults}, and attach took it all the same")
    assert snapshot(model) == before, "the refused plan has changed the model"


CHECKS: tuple[Callable[[Trial], None], ...] = (
    fresh_changes_nothing,
    perturbed_changes_output,
    gradients_reach_factors,
    drive_equals_changed_weight,
    merged_gives_same_output,
    compiles,
    copies_are_independent,
    pickles,
    dtypes_are_kept,
    saves_and_loads,
    detach_restores,
    size_is_counted,
    update_is_what_it_says,
)


def trials(method: str, *, kinds: Iterable[str] | None = None, start: str = "kaiming") -> Iterator[Trial]:
    """Every layer and drive for a registered method; `kinds` keeps those of these kinds."""
    wanted = None if kinds is None else set(kinds)
    unknown = (wanted or set()) - {case.kind for case in CASES}
    assert not unknown, f"no such kind in the contract: {', '.join(sorted(unknown))}"
    for case in CASES:
        if wanted is None or case.kind in wanted:
            for drive in case.drives:
                yield Trial(method, start if METHODS[method].takes_rank else "", case, drive)


def checks(trial: Trial) -> tuple[Callable[[Trial], None], ...]:
    """What has to hold for this trial."""
    return (refused,) if trial.faults else CHECKS


def run(trial: Trial, check: Callable[[Trial], None]) -> None:
    """One check. AssertionError says in one sentence which method failed where, at what, and how."""
    promise = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
    try:
        check(trial)
    except Exception as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        raise AssertionError(f'{trial} breaks the contract "{promise}": {kind}{error}') from error


def contract(method: str | Method | type[Method], *, kinds: Iterable[str] | None = None, start: str = "kaiming") -> int:
    """Runs every check on every trial of a method and returns how many held.

    `method` is registered (`@METHODS.add`), and given by name, class or instance. Raises AssertionError at the first
    promise that is broken.

    >>> contract("lora", kinds=["embedding"])
    26
    """
    name = method if isinstance(method, str) else method.name
    assert name in METHODS, f"method '{name}' is not registered; decorate its class with @METHODS.add"
    known = METHODS[name]
    given = type(known) if isinstance(method, str) else method if isinstance(method, type) else type(method)
    assert type(known) is given, f"another method is registered under the name '{name}'"
    held = 0
    for trial in trials(name, kinds=kinds, start=start):
        for check in checks(trial):
            run(trial, check)
            held += 1
    assert held, f"method '{name}' was tried on nothing"
    return held

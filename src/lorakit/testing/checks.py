"""What has to hold for every trial: one function for each promise, its first line says which."""

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lorakit.adapter import load
from lorakit.attach import attach, collect, detach, disabled, merge
from lorakit.describe import locate
from lorakit.errors import AdapterError, AttachError, PlanError
from lorakit.method import METHODS, Held, layer_update
from lorakit.testing.cases import PADDING
from lorakit.testing.trial import Trial, factors_of, perturb, same, snapshot


def fresh_changes_nothing(trial: Trial) -> None:
    """A fresh adapter leaves the output as it was."""
    model, batch, wanted = trial.base(torch.float32)
    attach(model, trial.plan, drive=trial.drive)
    with torch.no_grad():
        same(model(batch), wanted, 1e-5, "output")  # a start may cancel against itself: some roundings of float32


def perturbed_changes_output(trial: Trial) -> None:
    """Factors that have moved change the output, and a disabled adapter does not act."""
    _, _, plain = trial.base()
    model, batch, moved = trial.attached()
    gap = float((moved - plain).abs().max())
    assert gap > 1e-3, f"noise of 0.3 in every factor moved the output by {gap:.3g} only"
    with torch.no_grad(), disabled(model):
        same(model(batch), plain, 0.0, "output while disabled")


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
    """Output and gradients are those of the plain model with the changed weight put into it, where there is one."""
    model, batch, output = trial.attached()
    (factors,) = factors_of(model).values()
    if not METHODS[trial.method].linear:  # there is no such weight; numbers tell of the gradients
        learning = [p for p in factors._parameters.values() if p is not None]
        if trial.case.kind.endswith("embedding"):  # padding is looked up and teaches nothing, whatever numbers say
            batch = torch.where(batch == PADDING, PADDING + 1, batch)
        assert torch.autograd.gradcheck(lambda *_: model(batch), learning, atol=1e-5), "wrong gradients"
        return
    leaves = {name: tensor.detach().clone() for name, tensor in factors.tensors().items()}
    for name in factors._parameters:
        leaves[name].requires_grad_()
    plain, _, _ = trial.base()
    found = locate(plain, trial.case.path)
    assert found is not None
    module, name, kind = found.module, found.parameter, found.kind
    base = kind.canonical(module, found.weight.detach())
    update = METHODS[trial.method].update(leaves, factors.scale, Held(base))
    changed = {name: kind.stored(module, update.weight(base))}
    bias_name = "bias" if kind.name != "parameter" else name.replace("weight", "bias")
    own_bias = module._parameters.get(bias_name) if bias_name != name else None
    bias = update.changed_bias(None if own_bias is None else own_bias.detach())
    if bias is not None:
        changed[bias_name] = bias
    for key, tensor in changed.items():  # a plain attribute in the place of the parameter
        del module._parameters[key]
        module.__dict__[key] = tensor
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [getattr(module, key) for key in module._flat_weights_names]
    wanted = plain(batch)
    same(output, wanted, 1e-12, "output")  # float64: some hundred roundings of 1e-16
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=wanted.dtype).reshape(wanted.shape)
    (wanted * weights).sum().backward()
    (model(batch) * weights).sum().backward()
    for key, parameter in factors._parameters.items():
        assert parameter is not None
        gradient, expected = parameter.grad, leaves[key].grad
        assert gradient is not None, f"the factor '{key}' got no gradient"
        assert expected is not None
        same(gradient, expected, 1e-12, f"gradient of '{key}'")


def merged_gives_same_output(trial: Trial) -> None:
    """Merging leaves a plain model with the same output, or is refused where the update is no change of the weight."""
    plain, _, _ = trial.base()
    model, batch, wanted = trial.attached()
    found = locate(plain, trial.case.path)
    assert found is not None
    try:
        merge(model)
    except AttachError:
        rounds = found.kind.rounds
        assert rounds or not METHODS[trial.method].linear, "`linear` is True, and the update cannot be merged"
        with torch.no_grad():
            same(model(batch), wanted, 0.0, "output after merging was refused")
        return
    with torch.no_grad():
        same(model(batch), wanted, 1e-12, "output after merging")
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
    same(output, wanted, 1e-12, "output")
    assert len(found) == len(learning), "a factor got no gradient"
    for gradient, parameter in zip(found, learning):
        assert parameter.grad is not None
        same(gradient, parameter.grad, 1e-12, "gradient")


def copies_are_independent(trial: Trial) -> None:
    """A deep copy answers the same, learns by itself, and is detached by itself."""
    model, batch, wanted = trial.attached()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        same(twin(batch), wanted, 0.0, "output of the copy")
        perturb(twin)
        assert not torch.equal(twin(batch), wanted), "the copy reads the factors of the original"
        same(model(batch), wanted, 0.0, "output of the original after the copy has moved")
        detach(twin)
        plain, _, base = trial.base()
        same(twin(batch), base, 0.0, "output of the copy after detaching it")
        assert list(twin.state_dict()) == list(plain.state_dict()), "detaching left something in the copy"
        same(model(batch), wanted, 0.0, "output of the original after the copy was detached")


def pickles(trial: Trial) -> None:
    """Pickling gives a model that answers the same and can be detached."""
    model, batch, wanted = trial.attached()
    stream = io.BytesIO(pickle.dumps(model))
    del model
    twin = pickle.load(stream)
    with torch.no_grad():
        same(twin(batch), wanted, 0.0, "output after unpickling")
        detach(twin)
        same(twin(batch), trial.base()[2], 0.0, "output after unpickling and detaching")


def dtypes_are_kept(trial: Trial) -> None:
    """The output has the dtype of the base whatever the factors have, and fresh factors are float32."""
    first, _, exact = trial.attached(torch.float64)
    adapter = collect(first).to(dtype=torch.float32)  # a start may see another weight in each precision
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float64, 1e-4)):
        model, batch, plain = trial.base(dtype)
        attach(model, trial.plan, drive=trial.drive)
        for factors in factors_of(model).values():
            for name, tensor in factors.tensors().items():
                good = tensor.dtype == torch.float32 or not tensor.is_floating_point()  # a seed, places
                assert good, f"the fresh factor '{name}' is {tensor.dtype} on a {dtype} base"
        detach(model)
        attach(model, adapter, drive=trial.drive, check_base=False)
        with torch.no_grad():
            output = model(batch)
        assert output.dtype == plain.dtype, f"the output is {output.dtype} on a {dtype} base"
        # bfloat16 rounds at 2^-8, base, factors and every step; recurrent nets add up a few of those
        same(output, exact.to(torch.float64), tolerance, f"output in {dtype}")


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
        same(other(batch), wanted, 0.0, "output with the loaded adapter")


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
        update = layer_update(layer, Held(found.kind.canonical(found.module, found.weight)))
    else:
        assert not method.reads_weight, "the update never asks for the base weight, and `reads_weight` is True"
    assert update.is_pair == method.exact_pair, f"`exact_pair` is {method.exact_pair}, the update says {update.is_pair}"


def refused(trial: Trial) -> None:
    """What `faults` says cannot be done, attaching refuses in the same words, and leaves the model as it was."""
    model, _, _ = trial.base()
    before = snapshot(model)
    try:
        attach(model, trial.plan, drive=trial.drive)
    except (PlanError, AdapterError) as error:
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

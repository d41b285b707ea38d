"""From a model back to a value: the attached adapter as an Adapter."""

from dataclasses import replace

from torch import Tensor, nn

from lorakit.adapter import Adapter
from lorakit.attach.slots import Factors, home_of, slots_of, stand_in
from lorakit.describe import locate
from lorakit.errors import AttachError, nearest
from lorakit.update import AdaptedLayer


def collect(model: nn.Module, name: str | None = None) -> Adapter:
    """The named adapter (the only one if there is one) as a value: copies, on the CPU.

    Sharded parameters (FSDP2) are gathered; every process must call it.
    """
    model, switch = home_of(model)
    if name is None:
        if len(switch.names) > 1:
            raise AttachError(f"several adapters are attached ({', '.join(switch.names)}); say which one to collect")
        name = next(iter(switch.names))
    if name not in switch.names:
        raise AttachError(f"no adapter named '{name}' is attached{nearest(name, switch.names)}")
    layers: dict[str, AdaptedLayer] = {}
    values: dict[tuple[int, int], Tensor] = {}
    for _, _, slot in slots_of(model, switch.names[name]):
        factors: Factors = slot._modules[name]  # type: ignore[assignment]
        found = locate(model, slot.path)
        assert found is not None
        layers[slot.path] = AdaptedLayer(
            factors.method.name,
            found.spec.kind,
            found.spec.shape,
            {key: _once(tensor, values) for key, tensor in factors.kept().items()},
            factors.rank,
            factors.scale,
            factors.start,
            found.spec.groups,
            found.spec.peculiar,
            (*found.spec.batch, *found.spec.matrix),
        )
    held = None if switch.prompts is None else switch.prompts._modules.get(name)
    prompt = None
    if held is not None:
        prompt = replace(held.told, factors={key: _value(p) for key, p in held.named_parameters()})
    trained: dict[str, Tensor] = {}
    for full_name in switch.trained[name]:
        trained[full_name] = _value(stand_in(model, full_name).trained.parameter(name))  # type: ignore[arg-type]
    return Adapter(layers, trained, dict(switch.meta[name]), prompt)


def _once(tensor: Tensor, values: dict[tuple[int, int], Tensor]) -> Tensor:
    """Its value; of layers that have one tensor in common, the same."""
    key = (tensor.data_ptr(), tensor.numel()) if not hasattr(tensor, "full_tensor") else (id(tensor), 0)
    if key not in values or not tensor.numel():
        values[key] = _value(tensor)
    return values[key]


def _value(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().to("cpu", copy=True).contiguous()

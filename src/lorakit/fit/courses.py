"""What the methods of an attached adapter do between the steps of a fit, and what they leave at its end."""

from dataclasses import replace

from torch import Tensor, nn

from lorakit.adapter import Adapter
from lorakit.attach.slots import Factors, slots_of, switch_of
from lorakit.course import Course
from lorakit.method import METHODS, Method


def courses_of(model: nn.Module, n_steps: int) -> dict[str, Course]:
    """Method name -> its course over so many steps, of the active adapter; only of those that have one."""
    switch = switch_of(model)
    layers: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name in switch.active:
        for _, _, slot in slots_of(model, switch.names[name]):
            factors = slot._modules.get(name)
            if isinstance(factors, Factors) and type(factors.method).course is not Method.course:
                own: dict[str, Tensor] = {key: p for key, p in factors.named_parameters() if p.requires_grad}
                layers.setdefault(factors.method.name, {})[slot.path] = own
    made = {name: METHODS[name].course(held, n_steps) for name, held in layers.items()}
    return {name: course for name, course in made.items() if course is not None}


def finished(adapter: Adapter) -> Adapter:
    """The adapter as its methods, and that of its prompt, leave it."""
    layers = {path: METHODS[layer.method].finished(layer) for path, layer in adapter.layers.items()}
    return replace(adapter, layers=layers, prompt=None if adapter.prompt is None else adapter.prompt.finished())

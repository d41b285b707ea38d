"""conv1d, conv2d, conv3d: `nn.Conv1d/2d/3d`, weight `(o, i/groups, *kernel)`, canonical `(o, i/groups * kernel)`.

A pair is a convolution with r channels followed by a 1 x 1 one. With groups, the canonical weight has the groups in
its rows; one `a` serves every group, which makes the pair an exact low-rank change of the stored weight.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kinds import KINDS, Kind, Shapes, same_forward, weight_of


class _Conv(Kind):
    module: type[nn.Module]
    n_dims: int

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.module) and module.weight.is_floating_point()  # type: ignore[operator,union-attr]

    def plain(self, module: nn.Module) -> bool:
        return same_forward(module, self.module.forward)

    def shapes(self, module: nn.Module, parameter: str) -> Shapes:
        shape = tuple(weight_of(module).shape)
        fan_in = 1
        for side in shape[1:]:
            fan_in *= side
        groups: int = module.groups  # type: ignore[assignment]
        return Shapes(shape, (shape[0], fan_in), (), groups, module.bias is not None, _peculiar(module))

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.reshape(weight_of(module).shape)

    def inner(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        groups: int = module.groups  # type: ignore[assignment]
        inner = a.reshape(a.shape[0], *weight_of(module).shape[1:])
        inner = inner.repeat(groups, *([1] * (inner.ndim - 1)))
        h: Tensor = module._conv_forward(x, inner, None)  # type: ignore[operator]
        return h

    def outer(self, module: nn.Module, h: Tensor, b: Tensor, groups: int = 1) -> Tensor:
        outer = b.reshape(*b.shape, *([1] * self.n_dims))
        return (F.conv1d, F.conv2d, F.conv3d)[self.n_dims - 1](h, outer, groups=groups)

    def dense(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = module._conv_forward(x, self.stored(module, weight), None)  # type: ignore[operator]
        return result

    def by_place(self, h: Tensor) -> Tensor:
        return super().by_place(h.movedim(-1 - self.n_dims, -1))

    def over_outputs(self, vector: Tensor, y: Tensor) -> Tensor:
        return vector.reshape(-1, *([1] * self.n_dims))


def _peculiar(module: nn.Module) -> str:
    """PEFT's inner convolution copies stride and padding of the layer, and nothing else."""
    dilation: tuple[int, ...] = module.dilation  # type: ignore[assignment]
    if any(step != 1 for step in dilation):
        return f"its dilation is {dilation}"
    return "" if module.padding_mode == "zeros" else f"its padding mode is '{module.padding_mode}'"


@KINDS.add
class Conv1d(_Conv):
    """One dimension."""

    name = "conv1d"
    layers = "nn.Conv1d"
    module = nn.Conv1d
    n_dims = 1


@KINDS.add
class Conv2d(_Conv):
    """Two dimensions."""

    name = "conv2d"
    layers = "nn.Conv2d"
    fusable = True
    module = nn.Conv2d
    n_dims = 2

    def rows(self, module: nn.Module, x: Tensor) -> Tensor | None:
        assert isinstance(module, nn.Conv2d)
        if module.groups > 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(-2, -1).flatten(0, -2)


@KINDS.add
class Conv3d(_Conv):
    """Three dimensions."""

    name = "conv3d"
    layers = "nn.Conv3d"
    module = nn.Conv3d
    n_dims = 3

"""Our Triton kernels against float64, in Triton's interpreter on the CPU; and compiled for GPUs, which needs none.

`make test` installs Triton: 286 MB, about ten seconds where the network is no bound.
"""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lorakit.kernels import lora as lora_module
from lorakit.kernels import thin
from lorakit.kernels.lora import Layer, lora_group

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not for this system; runs on Linux (lorakit[gpu])"
)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SHAPES = [  # rows, inputs, outputs of each layer, their ranks
    (7, 5, (3,), (2,)),
    (64, 64, (64,), (16,)),
    (130, 96, (70, 33, 1), (8, 8, 3)),
    (33, 200, (600,), (40,)),
    (600, 24, (48, 48), (64, 64)),
]


@pytest.fixture
def kernels(monkeypatch):
    """The kernels' module under the interpreter, and the dispatcher led to it."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which tests/test_gpu.py runs the kernels themselves")
    module = importlib.import_module("lorakit.kernels.triton_pairs")
    monkeypatch.setattr(thin, "has_triton", lambda _: True)
    monkeypatch.setattr(thin, "_ours", lambda *_: False)
    return module


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: Tensor, wanted: Tensor, bound: float) -> None:
    assert float((found.double() - wanted).abs().max()) <= bound * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("n", "i", "outs", "ranks"), SHAPES)
def test_gradients_of_a_group_are_those_of_float64(kernels, monkeypatch, n, i, outs, ranks, dtype):
    x, dx = drawn(n, i, dtype=dtype, seed=0), drawn(n, i, dtype=dtype, seed=1)
    a = drawn(sum(ranks), i, dtype=dtype, seed=2)
    b = [drawn(r, o, dtype=dtype, seed=3 + k) for k, (r, o) in enumerate(zip(ranks, outs))]
    dys = [drawn(n, o, dtype=dtype, seed=9 + k) for k, o in enumerate(outs)]
    s = (x.double() @ a.double().T).to(dtype)
    scales = [0.5 + k for k in range(len(outs))]
    into = [(torch.ones(r, i), torch.ones(o, r)) for r, o in zip(ranks, outs)]
    monkeypatch.setitem(kernels.WIDEST, torch.float32, 128)  # numbers only: how much registers hold is of GPUs
    assert kernels.takes(x, s, a, b, dys, dx)

    ds = torch.cat([dy.double() @ w.double().T for dy, w in zip(dys, b)], 1)
    wanted_dx = dx.double() + ds @ a.double()
    wanted_a = (ds.T @ x.double()).split_with_sizes(ranks)
    wanted_b = [scale * dy.double().T @ part for dy, part, scale in zip(dys, s.double().split(ranks, 1), scales)]

    thin.pair_gradients(x, s, a, b, dys, into, scales, dx)
    near(dx, wanted_dx, BOUND[dtype])
    for (da, db), one, two in zip(into, wanted_a, wanted_b):
        near(da, 1 + one, BOUND[dtype])
        near(db, 1 + two, BOUND[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_of_layers_learns_as_autograd_says(kernels, monkeypatch, dtype):
    monkeypatch.setattr(lora_module, "_pays_to_merge", lambda *_: False)
    seen = []
    whole = kernels.gradients
    monkeypatch.setattr(kernels, "gradients", lambda *given: (seen.append(1), whole(*given)))
    x = drawn(2, 21, 48, dtype=dtype, seed=0).requires_grad_()
    layers = [
        Layer(
            drawn(o, 48, dtype=dtype, seed=k), None,
            drawn(8, 48, dtype=torch.float32, seed=5 + k).requires_grad_(),
            drawn(o, 8, dtype=torch.float32, seed=7 + k).requires_grad_(), 2.0,
        )
        for k, o in enumerate((32, 20))
    ]  # fmt: skip
    factors = [t for layer in layers for t in (layer.a, layer.b)]
    dys = [drawn(2, 21, o, dtype=dtype, seed=20 + o) for o in (32, 20)]
    found = torch.autograd.grad(lora_group(x, layers), [x, *factors], dys)

    exact = [t.detach().double().requires_grad_() for t in (x, *factors)]
    ys = [
        exact[0] @ (layer.weight.double() + layer.scale * exact[2 + 2 * k] @ exact[1 + 2 * k]).T
        for k, layer in enumerate(layers)
    ]
    wanted = torch.autograd.grad(ys, exact, [dy.double() for dy in dys])
    assert seen
    for one, two in zip(found, wanted):
        near(one, two, BOUND[dtype])


def test_columns_of_wider_matrices_and_wants_that_are_none_are_taken(kernels):
    n, i, o, r = 40, 30, 50, 4
    whole, x = drawn(n, 2 * o, dtype=torch.float32, seed=0), drawn(n, 2 * i, dtype=torch.float32, seed=1)[:, i:]
    dy, a, b = whole[:, o:], drawn(r, i, dtype=torch.float32, seed=2), drawn(r, o, dtype=torch.float32, seed=3)
    s, db = x @ a.T, torch.zeros(o, r)
    thin.pair_gradients(x, s, a, [b], [dy], [(None, db)], [1.0])
    near(db, dy.double().T @ s.double(), 1e-5)


def test_what_the_kernels_do_not_take_goes_to_torch(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "gradients", lambda *_: pytest.fail("these are not for the kernels"))
    n, i, o, r = 6, 8, 9, kernels.WIDEST[torch.float32] + 1
    x, dy = drawn(n, i, dtype=torch.float32, seed=0), drawn(n, o, dtype=torch.float32, seed=1)
    a, b = drawn(r, i, dtype=torch.float32, seed=2), drawn(r, o, dtype=torch.float32, seed=3)
    da = torch.zeros(r, i)
    thin.pair_gradients(x, x @ a.T, a, [b], [dy], [(da, None)], [1.0])
    near(da, (dy.double() @ b.double().T).T @ x.double(), 1e-5)


_COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorakit.kernels import triton_pairs as kernels

def machine_code(function, dtype, rank, capability, **more):
    cut = kernels._blocks(rank, dtype) | more
    kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = {}
    for name in function.arg_names:
        number = name in ("n", "o", "i", "r") or name.endswith(("_row", "_column"))
        sums = name in ("db", "da") or (name == "ds" and function is kernels._by_outputs)
        types[name] = "constexpr" if name in cut else "i32" if number else "*fp32" if sums else kind
    divisible = {(k,): [["tt.divisibility", 16]] for k, kind in enumerate(types.values()) if kind != "constexpr"}
    source = ASTSource(fn=function, signature=types, constexprs=cut, attrs=divisible)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(made.asm["cubin"]) > 1000
    return made.metadata.shared

for capability in (80, 90):
    for dtype, rank in ((torch.bfloat16, 16), (torch.bfloat16, 128), (torch.float32, 32)):
        for function, more in ((kernels._by_outputs, {"b_column": 1}),
                               (kernels._by_inputs, {"HAS_DX": True, "HAS_DA": True})):
            print(function.__name__, machine_code(function, dtype, rank, capability, **more))
"""


@pytest.mark.slow
def test_the_kernels_become_machine_code_of_gpus_and_fit_their_shared_memory(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, env=env | {"TRITON_CACHE_DIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == 12
    assert max(shared) <= 99 << 10  # of one block on sm_86 and sm_89, the least


def test_the_same_numbers_come_twice(kernels):
    x, a, b = drawn(300, 40, dtype=torch.bfloat16, seed=0), drawn(16, 40, dtype=torch.bfloat16, seed=1), None
    b, dy = drawn(16, 700, dtype=torch.bfloat16, seed=2), drawn(300, 700, dtype=torch.bfloat16, seed=3)
    s, found = (x @ a.T), []
    for _ in range(2):
        into = [(torch.zeros(16, 40), torch.zeros(700, 16))]
        thin.pair_gradients(x, s, a, [b], [dy], into, [1.0])
        found.append(into[0])
    assert all(torch.equal(one, two) for one, two in zip(*found))

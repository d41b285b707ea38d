"""Which device a name means, what is said where it is not there, and where a model is meanwhile. CUDA is played."""

from contextlib import nullcontext

import pytest
import torch

import lorakit as lk
from lorakit import device as device_module
from lorakit.device import CPU, backend, has_triton, has_varlen, resolve_device
from lorakit.errors import UsageError
from lorakit.fit.settings import make_settings
from lorakit.tasks.base import load_base
from lorakit.trunk import place_of, placed
from tiny_text import small_task

place, base, data = small_task(60)


@pytest.fixture
def gpus(monkeypatch):
    """As many GPUs as asked for, as far as torch tells."""

    def play(n: int, capability: tuple[int, int] = (9, 0)) -> None:
        device_module._is_modern.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)

    yield play
    device_module._is_modern.cache_clear()


def test_auto_takes_a_gpu_if_there_is_one_and_a_model_stays_where_it_is_on_one(gpus):
    gpus(0)
    assert resolve_device("auto") == CPU
    gpus(2)
    assert resolve_device("auto") == torch.device("cuda:0")
    assert resolve_device("auto", torch.device("cuda:1")) == torch.device("cuda:1")
    assert resolve_device("cpu", torch.device("cuda:1")) == resolve_device("cpu") == CPU
    assert resolve_device("cuda:1") == torch.device("cuda:1")


def test_processes_of_one_machine_take_a_gpu_each_or_share(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:1")
    assert backend(resolve_device("auto")) == "cpu:gloo,cuda:nccl"
    assert backend(CPU) == "gloo"
    with pytest.raises(UsageError, match="'cuda:1' is one GPU for 2 processes; --device cuda gives each its own"):
        resolve_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("cuda") == torch.device("cuda:1")
    assert backend(resolve_device("cuda")) == "gloo"  # NCCL takes no two processes on one GPU


def test_what_is_not_there_is_one_sentence(gpus, monkeypatch):
    gpus(2)
    with pytest.raises(UsageError, match="device 'cuda:2' was asked for, and there are 2 GPUs here: cuda:0 to cuda:1"):
        resolve_device("cuda:2")
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match=r"finds no GPU \(CUDA_VISIBLE_DEVICES is ''\); see whether nvidia-smi"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(UsageError, match=r"was built without CUDA; install a build with it .*, or take --device cpu"):
        resolve_device("cuda:0")
    with pytest.raises(UsageError, match="device is tpu; it must be auto, cpu, cuda, or one GPU: cuda:1"):
        make_settings({"device": "tpu"})


def test_kernels_are_for_gpus_that_have_what_they_need(gpus, monkeypatch):
    there = torch.device("cuda:0")
    monkeypatch.setattr(device_module, "_triton_version", lambda: "3.9.0")
    gpus(1)
    assert has_triton(there) and not has_triton(CPU)
    assert has_varlen(there) is (device_module.varlen() is not None) and not has_varlen(CPU)
    monkeypatch.setenv("LORAKIT_TRITON", "0")
    assert not has_triton(there)
    monkeypatch.delenv("LORAKIT_TRITON")
    gpus(1, capability=(7, 5))
    assert not has_triton(there) and not has_varlen(there)
    gpus(1)
    monkeypatch.setattr(device_module, "_triton_version", lambda: "")
    assert not has_triton(there)


@pytest.fixture
def elsewhere(monkeypatch):
    """A device whose tensors are copies here: torch lets no other than a real GPU's stand in for the CPU's."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self.clone())
    return torch.device("cuda:0")


def places_of(model):
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_a_model_is_elsewhere_for_a_while_and_its_originals_wait(base, elsewhere):
    model = base.model
    known, before = dict(model.named_parameters()), places_of(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def spoil(then=None):
        for name, place in places_of(model).items():
            assert place != before[name]
        for parameter in model.parameters():
            parameter.data.zero_()
        if then is not None:
            raise then

    with placed(model, elsewhere):
        spoil()
    with pytest.raises(RuntimeError, match="stop"), placed(model, elsewhere):
        spoil(RuntimeError("stop"))
    assert places_of(model) == before
    assert all(parameter is known[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert place_of(model) == CPU


def test_without_keeping_a_model_stays_there_and_one_that_is_there_is_left_alone(elsewhere):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = places_of(model)
    with placed(model, CPU):
        assert places_of(model) == before
    with placed(model, elsewhere, keep=False):
        there = places_of(model)
    assert places_of(model) == there
    assert not set(there.values()) & set(before.values())


def test_a_run_tells_its_device(base, data):
    summary = lk.fit(base, data, epochs=1, device="cpu").summary
    assert (summary["device"], summary["gpu"]) == ("cpu", "")


def test_a_device_that_is_not_there_is_refused_before_anything_is_done(base, data, place, gpus):
    gpus(0)
    with pytest.raises(UsageError, match="device 'cuda' was asked for"):
        lk.fit(base, data, out=place / "nowhere", device="cuda")
    assert not (place / "nowhere").exists()
    run = lk.fit(base, data, epochs=1)
    for use in (lk.predict, lk.evaluate):
        with pytest.raises(UsageError, match="device 'cuda:3' was asked for"):
            use((run.adapter, lk.tasks.task.task_of(run.adapter.meta["task"])), data.test, base=base, device="cuda:3")
    with pytest.raises(UsageError, match="device 'cuda' was asked for"):
        load_base(str(place / "base"), device="cuda")

"""Our C functions: built once, found again, and done without where they cannot be built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.kernels import native

CODE = """
import torch
from lorakit.kernels import native
from lorakit.kernels.segments import Scores, segment_attention
q, k, v = torch.randn(3, 2, 9, 16)
y = segment_attention(q, k, v, torch.tensor([0, 4, 9]), Scores(0.25, causal=True))
assert y.shape == q.shape
print(native.library() is not None, "|", native.reason())
"""


def run(**env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env={**os.environ, **env}, check=True
    )
    return done.stdout.strip()


@pytest.mark.slow  # processes that import torch
def test_they_are_built_once_into_a_folder_of_this_user(tmp_path: Path) -> None:
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "True |"
    (built,) = (tmp_path / "lorakit").iterdir()
    before = built.stat().st_mtime_ns
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "True |"
    assert built.stat().st_mtime_ns == before
    assert not (tmp_path / "lorakit").stat().st_mode & 0o022


@pytest.mark.slow
def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "lorakit").mkdir()
    (tmp_path / "lorakit").chmod(0o777)
    assert run(XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path)) == "True |"
    assert not list((tmp_path / "lorakit").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"LORAKIT_NATIVE": "0"}, "switched off"),
        ({"CC": "false"}, "could not build"),
        ({"CC": "/nowhere/cc"}, "could not build"),
    ],
    ids=str,
)
def test_without_them_torch_does_the_work_and_the_reason_is_told(env: dict[str, str], why: str, tmp_path: Path) -> None:
    told = run(XDG_CACHE_HOME=str(tmp_path), **env)
    assert told.startswith("False |")
    assert why in told


THREADS = """
import os, sys
import torch
from lorakit.kernels.rows import rms_norm
torch.set_num_threads(int(sys.argv[1]))
x, weight = torch.randn(512, 256), torch.ones(256)
before = len(os.listdir("/proc/self/task"))
rms_norm(x, weight, 1e-5)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc; runs on Linux")
@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4])
def test_they_run_on_as_many_threads_as_torch_is_set_to(n: int) -> None:
    if native.library() is None:
        pytest.skip(f"{native.reason()}; runs where a C compiler is found")
    command = [sys.executable, "-c", THREADS, str(n)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == n - 1

"""The installed wheel in an environment with hard dependencies only: what needs an extra says so, the rest works.

Run by `make lean` with the Python of that environment; not a pytest file, because pytest is not there.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path


def lorakit(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line of the installed wheel, outside the checkout."""
    command = [str(Path(sys.executable).with_name("lorakit")), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir(), check=False)


def main() -> None:
    """Stops at the first thing that is not as it should be."""
    for name in ("transformers", "pyarrow", "matplotlib", "tqdm", "pytest"):
        assert find_spec(name) is None, f"{name} is installed, so this environment is not lean"
    import torch

    import lorakit as lk

    assert Path(lk.__file__).is_relative_to(sys.prefix), f"{lk.__file__} is not the installed wheel"
    checks = 0
    for words in (["--help"], ["--version"], *([verb, "--help"] for verb in _verbs())):
        done = lorakit(*words)
        assert done.returncode == 0, (words, done)
        checks += 1
    told = json.loads(lorakit("doctor", "--json").stdout)
    assert told["extras"]["text"]["transformers"] is None, told
    assert told["kernels"] == "compiled here", told["kernels"]
    with tempfile.TemporaryDirectory() as folder:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        lk.attach(model, lk.plan(model, rank=4))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        lk.collect(model).save(os.path.join(folder, "a"))
        for words in (
            ["inspect", f"{folder}/a"],
            ["truncate", f"{folder}/a", "--rank", "2", "--out", f"{folder}/b"],
            ["convert", f"{folder}/a", "--to", "peft", "--out", f"{folder}/c"],
            ["inspect", f"{folder}/c", "--json"],
        ):
            done = lorakit(*words)
            assert done.returncode == 0, (words, done)
            checks += 1
        assert lk.load(f"{folder}/b").layers["0"].rank == 2
    for words, extra in ((["fit", "minilm", "demo:support", "--out", "x"], "text"), (["plan", "minilm"], "text")):
        done = lorakit(*words)
        assert done.returncode == 1, (words, done)
        assert f"lorakit[{extra}]" in done.stderr, (words, done)
        assert "Traceback" not in done.stderr, (words, done)
        checks += 1
    print(f"lean: {checks} passed, 0 failed")


def _verbs() -> list[str]:
    from lorakit.cli import VERBS

    return list(VERBS)


if __name__ == "__main__":
    main()

"""A package from outside that brings a method: installed by pip, found by its entry point, held to the contract."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_text import table, tiny_bert

PACKAGE = Path(__file__).parent.parent / "examples" / "outside"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has it."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(place), str(PACKAGE)], check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])}


def said(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_keeps_the_contract(installed: dict[str, str]) -> None:
    code = "from lorakit.testing import contract; print(contract('lora-xs'))"
    assert int(said(installed, "-W", "ignore", "-c", code)) > 400


def test_it_is_fitted_from_the_command_line(installed: dict[str, str], tmp_path: Path) -> None:
    tiny_bert(tmp_path / "base")
    table(tmp_path / "rows.csv")
    words = ["-m", "lorakit", "fit", str(tmp_path / "base"), str(tmp_path / "rows.csv"), "--out", str(tmp_path / "run")]
    words += ["--method", "lora-xs", "--rank", "8", "--epochs", "6", "--batch-size", "8", "--learning-rate", "0.02"]
    assert "held-out accuracy" in said(installed, *words)
    assert "lora-xs" in said(installed, "-m", "lorakit", "inspect", str(tmp_path / "run"))

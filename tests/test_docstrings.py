"""The examples in the docstrings of rooms 0 to 6 run."""

import doctest
import importlib
import pkgutil

import pytest

import lorakit

ROOMS = ("linalg", "update", "plan", "files", "method", "adapter", "methods", "starts", "kinds", "describe", "attach")


def modules() -> list[str]:
    found = ["lorakit", "lorakit.testing"]
    for module in pkgutil.walk_packages(lorakit.__path__, "lorakit."):
        if module.name.split(".")[1] in ROOMS:
            found.append(module.name)
    return found


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_examples_to_run() -> None:
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in ("lorakit", "lorakit.plan")) > 0

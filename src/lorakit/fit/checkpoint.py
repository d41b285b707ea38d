"""Checkpoints: everything a run needs to go on exactly, in one directory that is whole or absent."""

from pathlib import Path
from typing import Any

from lorakit.errors import FitError
from lorakit.files import read_json, read_tensors, replaced_directory, write_json, write_tensors
from lorakit.fit.learner import Learner
from lorakit.fit.loop import State


def save_checkpoint(path: Path, learner: Learner, state: State, identity: dict[str, Any]) -> None:
    """Writes parameters, optimizer memory, best parameters and position. `identity` says which run this is."""
    tensors = learner.memory()
    if state.best_values is not None:
        tensors["best"] = state.best_values
    position = {
        "step": state.step,
        "epoch": state.epoch,
        "batch": state.batch,
        "stale": state.stale,
        "seconds": state.seconds,
        "settled": state.settled,
        "best": state.best,
    }
    with replaced_directory(path) as work:
        write_tensors(work / "state.safetensors", tensors)
        write_json(work / "state.json", {"position": position, "identity": identity})


def load_checkpoint(path: Path, learner: Learner, identity: dict[str, Any]) -> State:
    """Puts a run back where it stood. FitError if the checkpoint is of another run, naming what differs."""
    saved = read_json(path / "state.json")
    before, now = _flat(saved["identity"]), _flat(identity)
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        told = [f"{key} was {before.get(key)}, now {now[key]}" for key in differing if "\n" not in str(now[key])]
        told += [f"the {key} differs" for key in differing if "\n" in str(now[key])]
        raise FitError(
            f"cannot resume '{path.parent}', because the call differs from the one that was interrupted: "
            f"{'; '.join(told)}; call with the same settings, or start again in another directory"
        )
    tensors = read_tensors(path / "state.safetensors")
    learner.restore(tensors)
    return State(**saved["position"], best_values=tensors.get("best"))


def settled_before(path: Path) -> dict[str, Any]:
    """What a run settled before it was interrupted."""
    settled: dict[str, Any] = read_json(path / "state.json")["position"]["settled"]
    return settled


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Every setting under its own name."""
    return {**identity.get("settings", {}), **{key: value for key, value in identity.items() if key != "settings"}}

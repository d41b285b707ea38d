"""Checkpoints: everything a run needs to go on exactly, in one directory that is whole or absent."""

from pathlib import Path
from typing import Any

from lorakit.errors import FitError, LorakitError
from lorakit.files import read_json, read_tensors, replaced_directory, write_json, write_tensors
from lorakit.fit.learner import Learner
from lorakit.fit.loop import State
from lorakit.plan import Plan

_FREE = ("threads", "tokens_per_pass", "device", "skip_bad", "shard", "checkpoint_steps")  # may change on a resume


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
        "best_epoch": state.best_epoch,
    }
    with replaced_directory(path) as work:
        write_tensors(work / "state.safetensors", tensors)
        write_json(work / "state.json", {"position": position, "identity": identity})


def load_checkpoint(path: Path, learner: Learner, identity: dict[str, Any]) -> State:
    """Puts a run back where it stood. FitError if the checkpoint is of another run, naming what differs."""
    saved = read_json(path / "state.json")
    told = _differences(saved["identity"], identity)
    if told:
        raise FitError(
            f"cannot resume '{path.parent}', because the call differs from the one that was interrupted: "
            f"{'; '.join(told)}; call as before, or start again in another directory"
        )
    try:
        tensors = read_tensors(path / "state.safetensors")
    except LorakitError as error:
        raise FitError(f"the checkpoint is damaged ({error}); begin the run again with --overwrite") from None
    learner.restore(tensors)
    return State(**saved["position"], best_values=tensors.get("best"))


def settled_before(path: Path) -> dict[str, Any]:
    """What a run settled before it was interrupted."""
    try:
        settled: dict[str, Any] = read_json(path / "state.json")["position"]["settled"]
    except (LorakitError, KeyError) as error:
        raise FitError(f"the checkpoint is damaged ({error}); begin the run again with --overwrite") from None
    return settled


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two runs, in words. Settings that change no result are not compared."""
    told = [
        f"{name} was {before['settings'].get(name)}, now {value}"
        for name, value in now["settings"].items()
        if name not in _FREE and before["settings"].get(name) != value
    ]
    if before["plan"] != now["plan"]:
        told.append(f"the plan was {Plan.parse(before['plan'])}, now {Plan.parse(now['plan'])}")
    elif before["base"] != now["base"]:  # its hash is of the planned layers
        told.append("the base has other weights")
    if told and before["base_name"] != now["base_name"]:  # alone it says nothing: a path may be written in many ways
        told.append(f"the base was '{before['base_name']}', now '{now['base_name']}'")
    parts = ("training", "validation", "test")
    told += [f"the {part} rows are others" for part, a, b in zip(parts, before["data"], now["data"]) if a != b]
    rest = (name for name in now if name not in ("settings", "plan", "base", "base_name", "data"))
    others = ((name, before.get(name), now[name]) for name in rest)
    told += [f"{name} was {old!s:.60}, now {new!s:.60}" for name, old, new in others if old != new]
    return told

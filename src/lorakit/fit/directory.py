"""The run directory: claimed before anything is done, a journal while it runs, the results at its end.

run/  plan.toml  adapter/  moments.safetensors  records.jsonl  curve.png  summary.json
      checkpoint/ process (while it runs)
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from lorakit.adapter import Adapter
from lorakit.errors import FitError, LorakitError, MissingExtraError, UsageError
from lorakit.files import write_json, write_text
from lorakit.fit.checkpoint import load_checkpoint, save_checkpoint
from lorakit.fit.curve import draw_curve
from lorakit.fit.hold import PROCESS, locked, writer
from lorakit.fit.learner import Learner
from lorakit.fit.loop import Record, State
from lorakit.fit.settings import GO_ON
from lorakit.moments import FILE as MOMENTS
from lorakit.moments import Moments, save_moments
from lorakit.plan import Plan
from lorakit.tasks.task import Task

_PREFIX = "prefix_*.bin"


def claim(place: Path, resume: bool, overwrite: bool) -> None:
    """The run directory must be new, unless it is to go on or to be replaced. Changes nothing yet.

    UsageError if it is not, and while another process writes into it.
    """
    if who := writer(place):
        raise _written(place, who)
    if resume and overwrite:
        raise UsageError("resume goes on with a run and overwrite begins it anew; give one of them")
    if place.exists() and not place.is_dir():
        raise UsageError(f"'{place}' is a file; name a directory for the run")
    if resume and not (place / "checkpoint").is_dir():
        raise UsageError("; ".join([f"'{place}' {_state(place)}", "there is nothing to resume", *_ways(place)]))
    if place.is_dir() and any(place.iterdir()) and not resume:
        if not overwrite:
            ways = ", ".join([*_ways(place), "or name another directory"]).removeprefix("or ")
            raise UsageError(f"'{place}' is not empty: it {_state(place)}; {ways}")
        if not _is_run(place):
            raise UsageError(f"'{place}' holds no run of lorakit, so it is not overwritten; name another directory")
    host = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if not host.is_dir() or not os.access(host, os.W_OK):
        raise UsageError(f"cannot write into '{place}': '{host}' is {'not writable' if host.is_dir() else 'a file'}")


def _written(place: Path, who: str) -> UsageError:
    return UsageError(f"'{place}' is being written by {who}; wait for its end, or name another directory")


def _is_done(place: Path) -> bool:
    return (place / "summary.json").exists()


def _is_run(place: Path) -> bool:
    own = ("summary.json", "checkpoint", "records.jsonl", PROCESS)
    return any((place / name).exists() for name in own) or any(place.glob(_PREFIX))


def _state(place: Path) -> str:
    """What there is, in words."""
    if not place.is_dir():
        return "does not exist"
    if (place / "checkpoint").is_dir():
        return "holds a run that was interrupted"
    if not _is_run(place):
        return "holds no run of lorakit"
    return "holds a finished run" if _is_done(place) else "holds a run that ended before its first checkpoint"


def _ways(place: Path) -> list[str]:
    """What can be done with it."""
    goes_on = ["go on with --resume"] if (place / "checkpoint").is_dir() else []
    return [*goes_on, "replace it with --overwrite"] if _is_run(place) else []


@contextmanager
def alone_in(place: Path | None, resume: bool, overwrite: bool) -> Iterator[None]:
    """Within the block the run directory is there, and this process alone writes into it. If it is still empty then, it
    goes again.

    UsageError if it cannot be claimed any more.
    """
    if place is None:
        yield
        return
    claim(place, resume, overwrite)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write into '{place}': {error.strerror or error}") from None
    try:
        with locked(place) as free:
            if not free:
                raise _written(place, writer(place) or "another process")
            yield
    finally:
        with suppress(OSError):
            place.rmdir()


def unfinished(place: Path) -> str:
    """What a run directory without an adapter is and what to do, in words; "" for what is none."""
    if who := writer(place):
        return f"is being written by {who}, and has no adapter yet; wait for its end"
    if not _is_run(place):
        return ""
    goes_on = (place / "checkpoint").is_dir()
    way = "the same fit command with --resume goes on" if goes_on else "fit it anew with --overwrite"
    return f"{_state(place)}, and no adapter; {way}"


def clear(place: Path) -> None:
    """Empties the directory of the run that is to be replaced."""
    for name in ("summary.json", "records.jsonl", "plan.toml", "curve.png", MOMENTS):
        (place / name).unlink(missing_ok=True)
    for file in place.glob(_PREFIX):  # of a run that was killed
        file.unlink()
    for name in ("checkpoint", "adapter"):
        shutil.rmtree(place / name, ignore_errors=True)


class Journal:
    """What happened in a run, as it happens: `records`, in a file too where the run has a directory, and checkpoints.

    With `resume` it begins with what the run was when it was interrupted (`state`); `lost` steps of it have no record
    any more. Of several processes one writes.
    """

    def __init__(
        self, learner: Learner, place: Path | None, resume: bool, identity: dict[str, Any], settled: dict[str, Any]
    ) -> None:
        self.state, self.records = State(settled=settled), list[dict[str, Any]]()
        self._learner, self._identity = learner, identity
        self._place = place if learner.workers.first else None
        self._stream: TextIO | None = None
        self.lost, self.seconds_before = 0, 0.0
        if place is not None and resume:
            self.state = load_checkpoint(place / "checkpoint", learner, identity)
            self.state.settled, self.seconds_before = settled, self.state.seconds
            self.records = _read_records(place / "records.jsonl", self.state.step, self.state.epoch)
            self.lost = self.state.step - sum(record["kind"] == "step" for record in self.records)

    def __enter__(self) -> "Journal":
        if self._place is not None:
            file = self._place / "records.jsonl"
            write_text(file, "".join(json.dumps(record) + "\n" for record in self.records))
            self._stream = file.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            try:
                self._stream.close()
            except OSError as error:
                raise self._cannot_write(error) from None

    def add(self, record: Record) -> None:
        """Keeps a record, and a checkpoint when one is due. FitError if the disk takes no more."""
        line = {"kind": record.kind, "step": record.step, "epoch": record.epoch, **record.values}
        self.records.append(line)
        if self._stream is None or self._place is None:
            return
        every = self._learner.settings.checkpoint_steps
        try:
            self._stream.write(json.dumps(line) + "\n")
            if record.kind == "valid" or (every and record.step % every == 0):
                self._stream.flush()
                os.fsync(self._stream.fileno())
                save_checkpoint(self._place / "checkpoint", self._learner, self.state, self._identity)
        except (OSError, LorakitError) as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: Exception) -> FitError:
        assert self._place is not None
        kept = (self._place / "checkpoint").is_dir()
        way = f"{GO_ON} from its checkpoint" if kept else "begin again with --overwrite"
        reason = getattr(error, "strerror", None) or error
        return FitError(f"cannot write into '{self._place}': {reason}; free some space, then {way}")


def _read_records(path: Path, step: int, epoch: int) -> list[dict[str, Any]]:
    """The records up to the checkpoint; later ones will be made again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # cut short by the kill
        if record["step"] > step or (record["kind"] == "valid" and record["epoch"] > epoch):
            break
        records.append(record)
    return records


def finish(
    place: Path,
    goal: Task,
    adapter: Adapter,
    plan: Plan,
    records: list[dict[str, Any]],
    summary: dict[str, Any],
    moments: Mapping[str, Moments],
) -> None:
    """Writes what came out, and removes the checkpoint."""
    plan.save(place / "plan.toml")
    adapter.save(place / "adapter")
    if moments:
        save_moments(place / MOMENTS, moments, adapter)
    try:
        draw_curve(records, place / "curve.png", goal.drawn)
        summary["curve"] = "curve.png"
    except MissingExtraError as error:
        summary["curve"] = f"not drawn: {error}"
    write_json(place / "summary.json", summary)
    shutil.rmtree(place / "checkpoint", ignore_errors=True)

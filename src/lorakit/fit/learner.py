"""One optimizer step, exactly: passes of bounded size, a loss over all labels of the step, a clipped AdamW step."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.attach import recorded, refuse_unseen
from lorakit.course import Course
from lorakit.data.batches import Batch, Batches, Examples, passes, training_batches
from lorakit.errors import FitError, NoEffectError, NotFiniteError
from lorakit.fit.settings import Settings
from lorakit.fit.workers import Workers
from lorakit.tasks.task import Task
from lorakit.trunk import Trunk
from lorakit.trunk.flat import Flat
from lorakit.trunk.memory import Bound, available_memory
from lorakit.trunk.prefix import Prefix


class Step(NamedTuple):
    """What one optimizer step saw: mean loss of its labels, norm of its gradient before clipping, tokens."""

    loss: float
    gradient_norm: float
    n_tokens: int


class Learner:
    """What learns, and how: the trainable parameters in one buffer, their optimizer, and the trunk they act in."""

    def __init__(
        self, model: nn.Module, task: Task, trunk: Trunk, settings: Settings, workers: Workers | None = None
    ) -> None:
        self.workers = workers or Workers()
        self.model, self.task, self.trunk, self.settings = model, task, trunk, settings
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not learning:
            raise FitError("nothing in the model requires a gradient, so there is nothing to train")
        for parameter in learning.values():
            parameter.data = parameter.data.float()  # masters; the layers cast them to what they compute in
        outer = {name for name in learning if name.endswith(".b")} if settings.lora_plus != 1 else set()
        groups = [{n: p for n, p in learning.items() if (n in outer) is chosen} for chosen in (False, True)]
        self.flat = Flat([group for group in groups if group])
        self.faster = [float(settings.lora_plus) if next(iter(g)) in outer else 1.0 for g in groups if g]
        self.optimizer = torch.optim.AdamW(
            [{"params": [flat]} for flat in self.flat.parameters],
            weight_decay=settings.weight_decay,
            betas=(0.9, 0.999),
            fused=True,
        )
        self.ema = self.flat.values.clone() if settings.ema else None
        self.courses: dict[str, Course] = {}  # of methods: see `fit/courses.py`
        self.prefixes: dict[int, Prefix] = {}  # by the id of their Examples
        self.bound: Bound | None = None  # of the process's memory, between passes
        trunk.refresh()
        trunk.gradients_in_place(True)

    def batches(self, examples: Examples, epoch: int = 0) -> Batches:
        """Places of every batch of one epoch, in their order; by length where rows are padded."""
        settings = self.settings
        examples.begin(settings.seed, epoch)
        return training_batches(examples, settings.batch_size, settings.seed, epoch, bool(self.trunk.why_padded))

    def gradients(self, examples: Examples, indices: Sequence[int]) -> tuple[float, int]:
        """Mean loss and number of tokens of the texts at these places, and the loss's gradient in `flat`.

        NotFiniteError if the loss is not finite.
        """
        examples = examples.for_step(indices, self.settings.seed)
        n_labels, total, n_tokens = max(1, examples.n_labels(indices)), 0.0, 0
        lengths = examples.lengths
        own = self.workers.share(indices, [lengths[i] for i in indices], bool(self.prefixes))
        self.flat.clear()
        self.trunk.clear()
        parts = passes(examples, own, self.settings.most_tokens)
        idle = idle_passes(self.workers, self.settings, examples, indices, len(parts))
        asked: Sequence[Tensor] = ()
        if self.task.coupled and (len(parts) > 1 or self.workers.size > 1):
            total, asked = self._asked(examples, parts, n_labels, idle)
        for k, part in enumerate(parts):
            batch = examples.gather(part)
            if asked:
                self._scores(batch, examples).backward(asked[k])  # type: ignore[no-untyped-call]
            else:
                loss = self.loss(batch, examples) / n_labels
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            n_tokens += batch.n_tokens
            if self.bound is not None:
                self.bound.keep()
        for part in idle:
            (0 * self.loss(examples.gather(part), examples)).backward()  # type: ignore[no-untyped-call]
        self.trunk.settle()
        seen = torch.tensor([total, n_tokens], dtype=torch.float64)
        self.workers.add(seen)
        self.workers.add(self.flat.gradients)
        total, n_tokens = float(seen[0]), int(seen[1])
        if not math.isfinite(total):
            raise NotFiniteError(f"the loss is {total} {self._where(examples, indices)}")
        return total, n_tokens

    def _asked(
        self, examples: Examples, parts: Sequence[Sequence[int]], n_labels: int, idle: Sequence[Sequence[int]]
    ) -> tuple[float, Sequence[Tensor]]:
        """This process' part of a loss that looks at all examples of the step, and its gradient by the scores of every
        pass.

        The passes run twice, first without gradients, so that memory stays that of one (Gao et al., 2021, "Scaling deep
        contrastive learning batch size", arXiv 2101.06983).
        """
        batches = [examples.gather(part) for part in parts]
        with torch.no_grad():
            own = [(self._scores(batch, examples).cpu(), batch.labels) for batch in batches]
            for part in idle:
                self._scores(examples.gather(part), examples)
        shares = self.workers.gather(own)
        scores, labels = (torch.cat([pair[k] for share in shares for pair in share]) for k in (0, 1))
        scores = scores.to(self.flat.values.device).requires_grad_()
        loss = self.task.coupled_loss(scores, labels) / n_labels
        (gradient,) = torch.autograd.grad(loss, scores)
        before = sum(len(found) for share in shares[: self.workers.number] for found, _ in share)
        sizes = [len(part) for part in parts]
        mine = float(loss.detach()) if self.workers.first else 0.0
        return mine, torch.split(gradient[before : before + sum(sizes)], sizes)

    def step(self, examples: Examples, indices: Sequence[int], rate: float, number: int = 1) -> Step:
        """Step `number`, on the texts at these places. NotFiniteError, before anything is changed, if the loss is
        not."""
        total, n_tokens = self.gradients(examples, indices)
        for course in self.courses.values():
            course.before(number)
        norm = float(self.flat.clip(self.settings.clip))
        if not math.isfinite(norm):
            raise NotFiniteError(f"the gradient's norm is {norm} {self._where(examples, indices)}")
        for group, faster in zip(self.optimizer.param_groups, self.faster):
            group["lr"] = rate * faster
        self.optimizer.step()
        for course in self.courses.values():
            course.after(number)
        self.trunk.refresh()
        if self.ema is not None:
            self.ema.lerp_(self.flat.values, 1 - self.settings.ema)
        return Step(total, norm, n_tokens)

    def loss(self, batch: Batch, examples: Examples) -> Tensor:
        """The summed loss of a pass."""
        return self.task.loss(self.model, batch.hidden(self.trunk, self.prefixes.get(id(examples))), batch)

    def _scores(self, batch: Batch, examples: Examples) -> Tensor:
        return self.task.scores(self.model, batch.hidden(self.trunk, self.prefixes.get(id(examples))), batch).float()

    @torch.no_grad()
    def broken(self) -> str:
        """The first weight of the base that is not finite; "" if there is none."""
        for name, weight in self.model.named_parameters():
            for shards in self.trunk.shards:
                shards.bring(weight)
            if name not in self.flat.named and not bool(torch.isfinite(weight).all()):
                return name
        return ""

    @torch.no_grad()
    def _where(self, examples: Examples, indices: Sequence[int]) -> str:
        """The rows that alone give no finite loss; all of the batch if each does."""
        alone = [i for i in indices if not bool(torch.isfinite(self.loss(examples.gather([i]), examples)))]
        lines = sorted(examples.lines[i] for i in alone or indices)
        named = ", ".join(map(str, lines[:8])) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")
        return f"by row {named} alone" if len(alone) == 1 else f"in the {'' if alone else 'batch of '}rows {named}"

    def probe(self, examples: Examples, indices: Sequence[int]) -> None:
        """Before any step: every update must run, and reach the loss. NoEffectError names those that do not."""
        batch = examples.gather(passes(examples, indices, self.settings.most_tokens)[-1])
        learning = self.flat.named
        self.trunk.gradients_in_place(False)
        with recorded(self.model) as unseen:
            loss = self.loss(batch, examples)
        refuse_unseen(self.model, unseen)
        gradients = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
        self.trunk.gradients_in_place(True)
        idle = [name for name, gradient in zip(learning, gradients) if gradient is None]
        if idle:
            raise NoEffectError(
                f"{len(idle)} of {len(learning)} trainable tensors do not reach the loss, e.g. '{idle[0]}'; "
                "take their layers out of the plan"
            )

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """Metrics on rows, by the averaged parameters if there are any."""
        now = None
        if self.ema is not None:
            now = self.flat.values.clone()
            self.load(self.ema)
        try:
            return self.task.metrics(self.scores(examples), examples)
        finally:
            if now is not None:
                self.load(now)

    def scores(self, examples: Examples) -> Tensor:
        """The task's scores of every example, as the parameters are now."""
        prefix = self.prefixes.get(id(examples))
        return scores_of(self.model, self.task, self.trunk, examples, self.settings, prefix, self.workers)

    def keep_prefix(self, parts: Mapping[str, Examples], place: Path | None) -> str:
        """Lets the frozen blocks run once for every text; says what is kept, and where, or why not.

        All processes do, or none: those that do share out texts otherwise.
        """
        told = self.workers.gather(self._keep_prefix(parts, place))
        off = next((why for why in told if why.startswith("off")), "")
        if off:
            self._drop_prefixes()
        return off or told[0]

    def _keep_prefix(self, parts: Mapping[str, Examples], place: Path | None) -> str:
        wish, depth = self.settings.prefix, self.trunk.depth
        if wish == "off" or depth == 0:
            return "off" if depth else f"off: {self.trunk.why_shallow}"
        if self.settings.shard:
            return "off: all processes run every block of a sharded base together"
        if self.settings.epochs == 1:
            return "off: every row is seen once"
        size = sum(self.trunk.prefix_size(examples.text_lengths) for examples in parts.values())
        told = f"{depth} of {self.trunk.n_blocks} blocks, {size / 2**20:,.0f} MiB"
        in_memory = wish == "memory" or (wish == "auto" and size < 0.25 * available_memory())
        if not in_memory and place is None:
            why = "the run has no directory" if wish == "file" else "do not fit in memory, and the run has no directory"
            return f"off: {told}{':' if wish == 'file' else ''} {why}"
        try:
            for name, examples in parts.items():
                file = None if in_memory or place is None else place / f"prefix_{name}_{self.workers.number}.bin"
                self.prefixes[id(examples)] = self.trunk.prefix(examples.text_lengths, file)
        except (OSError, RuntimeError) as error:  # no room: training goes on without it
            return f"off: {told} found no room ({error})"
        return f"{told} in {'memory' if in_memory else 'a file'}"

    def _drop_prefixes(self) -> None:
        for prefix in self.prefixes.values():
            prefix.close()
        self.prefixes.clear()

    def best(self) -> Tensor:
        """A copy of the parameters that are evaluated, flat."""
        return (self.flat.values if self.ema is None else self.ema).clone()

    @torch.no_grad()
    def load(self, values: Tensor) -> None:
        """Puts other values, flat, in place of all that learns."""
        self.flat.values.copy_(values)
        self.trunk.refresh()

    def memory(self) -> dict[str, Tensor]:
        """Everything beside the data that the next step depends on, by name."""
        tensors = {"now": self.flat.values}
        if self.ema is not None:
            tensors["ema"] = self.ema
        for k, flat in enumerate(self.flat.parameters):
            tensors |= {f"{key}:{k}": value for key, value in self.optimizer.state[flat].items()}
        for method, course in self.courses.items():
            tensors |= {f"{method}/{name}": value for name, value in course.memory().items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `memory`."""
        self.load(tensors["now"])
        if self.ema is not None:
            self.ema.copy_(tensors["ema"])
        for k, flat in enumerate(self.flat.parameters):
            memory: dict[str, Any] = {}
            for key, value in tensors.items():
                name, _, number = key.partition(":")
                if number == str(k):
                    memory[name] = value.to(flat.device, copy=True)
            self.optimizer.state[flat] = memory
        for method, course in self.courses.items():
            prefix = f"{method}/"
            course.restore({name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)})

    def close(self) -> None:
        """Gives the parameters their own memory again, and forgets the frozen states."""
        self._drop_prefixes()
        self.flat.release()


@torch.no_grad()
def scores_of(
    model: nn.Module,
    task: Task,
    trunk: Trunk,
    examples: Examples,
    settings: Settings,
    prefix: Prefix | None = None,
    workers: Workers | None = None,
    watch: Callable[[int, int], object] | None = None,
) -> Tensor:
    """The task's scores of every example, in their order: `(examples, k)`. Each process makes those of a share.

    `watch` is called with how many are done, and of how many.
    """
    workers = workers or Workers()
    found: list[Tensor] = []
    order: list[int] = []
    own = workers.share(range(len(examples)), examples.lengths, prefix is not None)
    parts = passes(examples, own, settings.most_tokens)
    idle = idle_passes(workers, settings, examples, range(len(examples)), len(parts))
    for part in parts:
        batch = examples.gather(part)
        found.append(task.scores(model, batch.hidden(trunk, prefix), batch).float().cpu())
        order.extend(batch.examples)
        if watch is not None:
            watch(len(order), len(own))
    for part in idle:
        batch = examples.gather(part)
        task.scores(model, batch.hidden(trunk, prefix), batch)
    made = workers.gather((order, _stacked(found) if found else None))
    scores = _stacked([part for _, part in made if part is not None])
    result = torch.empty_like(scores)
    result[[i for share, _ in made for i in share]] = scores
    return result


def idle_passes(
    workers: Workers, settings: Settings, examples: Examples, indices: Sequence[int], n_own: int
) -> list[list[int]]:
    """Passes that this process runs for nothing, its `n_own` being fewer than another's: the shortest text of these.

    A sharded base is run by all processes together, block by block.
    """
    if not settings.shard:
        return []
    shortest = min(indices, key=lambda i: examples.lengths[i])
    return [[shortest]] * (workers.most(n_own) - n_own)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Below each other: `(rows, k)` each, filled up with NaN to the widest."""
    widest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, widest - part.shape[1]), value=math.nan) for part in parts])

"""A conversation with a language model and its adapters, which take turns on one base in memory."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lorakit.attach import activate, attach, detach
from lorakit.data.cells import text_of
from lorakit.data.dialogues import Dialogues, Turn
from lorakit.device import resolve_device
from lorakit.errors import DataError, UsageError, nearest
from lorakit.fit.use import Run, load_base_of, open_run, refuse_unknown
from lorakit.tasks.answers import no_scores
from lorakit.tasks.base import Base
from lorakit.tasks.generate import Generate
from lorakit.tasks.template import SHARE, Template
from lorakit.trunk import eval_mode, place_of, placed


class Talk:
    """Says what a user says, hears what the model answers, and remembers both in `turns`.

    Of a conversation that has grown longer than the model takes the earliest turns are dropped: `n_dropped` so far.

    `runs` are fitted by `generate` on one base; the first begins. Inside `with`; leaving takes the adapters off.
    `device` is that of `fit`.

    with Talk({"law": "runs/law", "code": "runs/code"}) as talk:
        print(talk.say("What is a tort?"))
        talk.use("code")
    """

    def __init__(
        self, runs: Mapping[str, Run], base: Base | None = None, system: str = "", device: str = "auto"
    ) -> None:
        opened = {name: open_run(run) if isinstance(run, str | Path) else run for name, run in runs.items()}
        if not opened:
            raise UsageError("there is no run to talk to")
        for name, (_, task) in opened.items():
            if not isinstance(task, Generate):
                raise UsageError(f"'{name}' was fitted to {task.name}, which does not talk; name runs of generate")
        self._runs = opened
        self._first = next(iter(opened))
        adapter, task = opened[self._first]
        self._where = resolve_device(device, *([place_of(base.model)] if base else []))
        self._base = base or load_base_of(adapter, task=task)
        self._system = system
        self.turns: list[Turn] = []
        self.n_dropped = 0
        self.forget()
        self.name = ""

    def __enter__(self) -> "Talk":
        attached: dict[str, str] = {}  # run -> its adapter: not every name of a run can be one of a module
        there = ExitStack()
        there.enter_context(placed(self._base.model, self._where))
        there.enter_context(eval_mode(self._base.model))
        try:
            for name, (adapter, task) in self._runs.items():
                task.prepare(self._base.model)
                if not adapter.is_empty:  # a merged model has nothing to attach
                    own = f"talk_{len(attached)}"
                    attach(self._base.model, adapter, name=own)
                    attached[name] = own
        except BaseException:
            for own in attached.values():
                detach(self._base.model, own)
            there.close()
            raise
        self._attached, self._there = attached, there
        self.use(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        for own in self._attached.values():
            detach(self._base.model, own)
        self._there.close()

    @property
    def names(self) -> list[str]:
        """The adapters that `use` takes."""
        return list(self._runs)

    def use(self, name: str) -> None:
        """Lets this adapter answer from here on; "" is the base alone."""
        if name and name not in self._runs:
            raise UsageError(f"there is no adapter '{name}'{nearest(name, self._runs)}")
        if self._attached:
            activate(self._base.model, [self._attached[name]] if name in self._attached else [])
        self.name = name

    def forget(self) -> None:
        """Begins the conversation anew."""
        self.turns, self.n_dropped = [Turn("system", self._system)] if self._system else [], 0

    def say(self, text: str, heard: Callable[[str], object] | None = None, **options: Any) -> str:
        """The answer; `heard` gets it piece by piece. `options` are those of predicting with generate.

        DataError, and nothing is remembered, if this is no text, or one longer than the model takes.
        """
        text_of(text, "what is asked")
        task = self._runs[self.name or self._first][1]
        assert isinstance(task, Generate)
        refuse_unknown(task, options, task.options)
        turns = self._fitting(task, Turn("user", text), options.get("max_new_tokens", task.max_length))
        rows = Dialogues((tuple(turns),), "the conversation", (1,))
        (found,) = task.predict(rows, self._base, no_scores, heard=heard, **options)
        self.n_dropped += len(self.turns) + 1 - len(turns)
        answer: str = found.answer
        self.turns = [*turns, Turn("assistant", answer)]
        return answer

    def _fitting(self, task: Generate, last: Turn, most: int) -> list[Turn]:
        """The conversation up to this turn, without the earliest turns where they would leave no room for `most` new
        tokens, or for a quarter of all that the model takes."""
        template = Template(self._base.tokenizer, task.template)
        head, said = self.turns[: bool(self._system)], [*self.turns[bool(self._system) :], last]
        room = task.max_length - min(most, task.max_length // SHARE)
        while True:
            (asked,) = template.questions(Dialogues(((*head, *said),), "the conversation", (1,)))
            if len(asked) <= room or len(said) == 1:
                break
            said = said[2:]
        if len(asked) >= task.max_length:
            what = "what is asked and the system text have" if head else "what is asked has"
            raise DataError(f"{what} {len(asked)} tokens, and {task.max_length - 1} are the most; shorten it")
        return [*head, *said]

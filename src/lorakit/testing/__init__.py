"""The contract that a method keeps on every kind of layer and under every drive. Run it on a method of your own:

    from lorakit.testing import contract
    contract("lora")                              # registered, by name, class or instance
    contract(MyMethod, kinds=["linear", "conv2d"])

A `Trial` is one method with one start on one layer under one drive; `trials` lists them and `checks` says what has to
hold for each: small functions that raise AssertionError, so that a test suite can report every one by itself. What a
method cannot do must be said by its `faults`; then the contract is that attaching refuses it, loudly and untouched.
"""

from collections.abc import Callable, Iterable, Iterator

from lorakit.method import METHODS, Method
from lorakit.testing.cases import CASES, Attention, Case, Conv1D
from lorakit.testing.checks import CHECKS, compiles, refused
from lorakit.testing.trial import Trial, perturb, snapshot

__all__ = [
    "CASES",
    "CHECKS",
    "Attention",
    "Case",
    "Conv1D",
    "Trial",
    "checks",
    "compiles",
    "contract",
    "perturb",
    "refused",
    "run",
    "snapshot",
    "trials",
]


def trials(method: str, *, kinds: Iterable[str] | None = None, start: str = "kaiming") -> Iterator[Trial]:
    """Every layer and drive for a registered method; `kinds` keeps those of these kinds."""
    wanted = None if kinds is None else set(kinds)
    unknown = (wanted or set()) - {case.kind for case in CASES}
    assert not unknown, f"no such kind in the contract: {', '.join(sorted(unknown))}"
    for case in CASES:
        if wanted is None or case.kind in wanted:
            for drive in case.drives:
                yield Trial(method, start if METHODS[method].takes_start else "", case, drive)


def checks(trial: Trial) -> tuple[Callable[[Trial], None], ...]:
    """What has to hold for this trial."""
    return (refused,) if trial.faults else CHECKS


def run(trial: Trial, check: Callable[[Trial], None]) -> None:
    """One check. AssertionError says in one sentence which method failed where, at what, and how."""
    promise = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
    try:
        check(trial)
    except Exception as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        raise AssertionError(f'{trial} breaks the contract "{promise}": {kind}{error}') from error


def contract(method: str | Method | type[Method], *, kinds: Iterable[str] | None = None, start: str = "kaiming") -> int:
    """Runs every check on every trial of a method and returns how many held.

    `method` is registered (`@METHODS.add`), and given by name, class or instance. Raises AssertionError at the first
    promise that is broken.

    >>> contract("lora", kinds=["embedding"])
    26
    """
    name = method if isinstance(method, str) else method.name
    assert name in METHODS, f"method '{name}' is not registered; decorate its class with @METHODS.add"
    known = METHODS[name]
    given = type(known) if isinstance(method, str) else method if isinstance(method, type) else type(method)
    assert type(known) is given, f"another method is registered under the name '{name}'"
    held = 0
    for trial in trials(name, kinds=kinds, start=start):
        for check in checks(trial):
            run(trial, check)
            held += 1
    assert held, f"method '{name}' was tried on nothing"
    return held

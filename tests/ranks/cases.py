"""Which cases there are, what launches they need, and how pytest gets at them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from . import launch
from .launch import FRESH_STARTS, LAWS, MODULES, START_SECONDS, Outcome
from .summary import numbers_of, summary

T = TypeVar("T")
Launch = tuple[str, int]  # controller, ranks


class _More(Launch):
    """A launch that `make test` leaves out."""


def more(*launches: Launch) -> list[Launch]:
    """Return launches that `make test` leaves out for the sake of time; slow suites run them."""
    return [_More(launch) for launch in launches]


def needs(launches: str = "", *, more: str = "") -> Callable[[T], T]:
    """Say beside a case which launches it runs in.

    The harness reads it without importing the module, so the arguments are written out, not computed::

        NEEDS = needs("gloo-2", more="gloo-3")  # cases that say nothing themselves

        @needs("gloo-2", more="gloo-3 gloo-4 mpi-2")
        def case_process_sets(): ...

    Args:
        launches: controller and ranks, such as ``"gloo-2 mpi-2"``; ``dist`` is torch.distributed.
        more: those that only a slow suite runs.
    """
    _parse(launches, more)
    return lambda case: case


def _parse(launches: str = "", more: str = "") -> list[Launch]:
    out: list[Launch] = []
    for text, kind in ((launches, tuple), (more, _More)):
        for word in text.split():
            controller, _, ranks = word.partition("-")
            if controller not in ("gloo", "mpi", "dist") or not ranks.isdigit():
                raise ValueError(f"{word!r} is no launch; write gloo-2, mpi-3, dist-2")
            out.append(kind((controller, int(ranks))))
    if len(set(out)) < len(out) or not out:
        raise ValueError(f"needs({launches!r}, more={more!r}) names a launch twice, or none")
    return out


def _written(call: ast.expr) -> list[Launch] | None:
    """Return what a call of `needs` in a module's source says; None for anything else."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "needs"):
        return None
    args = [ast.literal_eval(arg) for arg in call.args]
    return _parse(*args, **{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})


@functools.cache
def case_needs(module: str) -> dict[str, list[Launch]]:
    """Return a module's cases and their launches, without importing its framework.

    Those are its own, and the laws of the modules of tests/laws that it names in ``LAWS``, but for those in
    ``EXCEPT``, and in the launches of ``ALSO`` too. A case has no launches if neither it nor its module says
    any: then its test file does.
    """
    tree = ast.parse((MODULES / f"{module}.py").read_text())
    out = _functions(tree, "case_")
    left_out = _constant(tree, "EXCEPT", {})
    also = _assigned(tree, "ALSO")
    for name in _constant(tree, "LAWS", ()):
        laws = _functions(ast.parse((LAWS / f"{name}.py").read_text()), "law_")
        out |= {law: [*where, *also] for law, where in laws.items() if law not in left_out}
        left_out = {law: why for law, why in left_out.items() if law not in laws}
    if left_out:
        raise ValueError(f"tests/parallel/{module}.py: EXCEPT names no law: {', '.join(left_out)}")
    return out


def _functions(tree: ast.Module, begins: str) -> dict[str, list[Launch]]:
    """Return the functions whose names begin so, and their launches."""
    default = _assigned(tree, "NEEDS")
    out: dict[str, list[Launch]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith(begins):
            own = [found for one in node.decorator_list if (found := _written(one))]
            out[node.name.removeprefix(begins)] = own[0] if own else default
    return out


def _assigned(tree: ast.Module, name: str) -> list[Launch]:
    """Return the launches of ``NAME = needs(...)``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]:
            return _written(node.value) or []
    return []


def _constant(tree: ast.Module, name: str, default: Any) -> Any:
    """Return a module's constant, as it is written out."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]:
            return ast.literal_eval(node.value)
    return default


def case_names(module: str) -> list[str]:
    """Return the names of a module's cases, in their order."""
    return list(case_needs(module))


@dataclass(frozen=True)
class Case:
    """One case under one launch; `check` passes, fails or skips as the case did."""

    module: str
    controller: str
    np: int
    name: str
    seconds: float
    group: str

    @property
    def launch(self) -> tuple[str, str, int]:
        """What one start of horovodrun serves."""
        return (self.group, self.controller, self.np)

    @property
    def spec(self) -> str:
        """The case as ranks are told it."""
        return f"{self.module}:{self.name}"

    @property
    def id(self) -> str:
        """The name in pytest's output."""
        return f"{self.controller}-{self.np}-{self.name}"

    def check(self, request: Any) -> None:
        """Run the launch, if no case before has, and report this case's outcome."""
        import pytest

        if reason := launch.missing_controller(self.controller):
            pytest.skip(reason)
        outcome = self._outcome(request)
        records = [outcome.ranks[rank] for rank in sorted(outcome.ranks)]
        numbers = numbers_of(records)
        for key, value in numbers.items():
            request.node.user_properties.append((key, value))
        summary(request.config).add(self, numbers)
        if not outcome.sound:
            pytest.fail(f"{self.id}: {outcome.text}", pytrace=False)
        if skips := [r["text"] for r in records if r["status"] == "skipped"]:
            pytest.skip(skips[0])

    def _outcome(self, request: Any) -> Outcome:
        launches: dict[Any, dict[str, Outcome]] = _sessions.setdefault(id(request.session), {})
        if self.launch not in launches:
            others = [
                item.callspec.params.get("case")
                for item in request.session.items
                if hasattr(item, "callspec")
            ]
            selected = [
                other for other in others if isinstance(other, Case) and other.launch == self.launch
            ] or [self]
            seconds = {other.module: other.seconds for other in selected}
            costs: list[dict[str, Any]] = []
            launches[self.launch] = launch.run_launch(
                [other.spec for other in selected],
                self.controller,
                self.np,
                seconds=sum(seconds.values()),
                costs=costs,
            )
            summary(request.config).launched(self.launch, len(selected), costs, launches[self.launch])
        return launches[self.launch][self.spec]


_sessions: dict[int, dict[Any, dict[str, Outcome]]] = {}


def parallel_cases(
    module: str,
    launches: Iterable[Launch] | None = None,
    *,
    cases: Iterable[str] | None = None,
    slow: Iterable[str] = (),
    seconds: float = 400.0,
    group: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrize a test's argument ``case`` over a module's cases and their launches.

    Args:
        module: the file ``tests/parallel/<module>.py``.
        launches: pairs such as ``("gloo", 2)``, ``("mpi", 3)``; None for what `needs` says beside each case.
        cases: names without ``case_``, to run only these; None for all.
        slow: those of them that `make test` leaves out for the sake of time.
        seconds: the longest that the module's cases may take in one launch.
        group: modules of one group share launches; empty for the module by itself.
    """
    import pytest

    known = case_needs(module)
    chosen = list(known if cases is None else cases)
    slow = set(slow)
    if unknown := sorted((set(chosen) | slow) - set(known)):
        raise ValueError(f"tests/parallel/{module}.py has no case {', '.join(unknown)}")
    if silent := [name for name in chosen if launches is None and not known[name]]:
        raise ValueError(f"tests/parallel/{module}.py: no needs(...) for {', '.join(silent)}")

    def pairs() -> Iterator[tuple[Launch, str]]:
        every = list(dict.fromkeys(one for name in chosen for one in known[name]))
        for one in every if launches is None else launches:
            for name in chosen:
                if launches is not None:
                    yield one, name
                else:
                    yield from ((own, name) for own in known[name] if own == one)

    all_cases = [
        pytest.param(
            case := Case(module, *one, name, seconds, group or module),
            id=case.id,
            marks=[pytest.mark.more] if isinstance(one, _More) or name in slow else [],
        )
        for one, name in pairs()
    ]
    if not all_cases:
        raise ValueError(f"tests/parallel/{module}.py has no case at all")

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        # A test may wait for the start and every case of its launch, repeated.
        test = pytest.mark.timeout(seconds * 4 + START_SECONDS * (FRESH_STARTS + 1))(test)
        return pytest.mark.parametrize("case", all_cases)(test)

    return mark

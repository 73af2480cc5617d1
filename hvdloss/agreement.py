"""The agreement of the first step: every rank checks that all hold the same parameters and settings.

Done once per optimizer (and again when its parameters change), so that what would otherwise hang or train
apart is an error that names the difference. What is compared first is one hash, a few numbers whatever the
number of ranks and parameters; who holds what is asked only of what differs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from hvdloss import errors
from hvdloss.communicator import Communicator, same
from hvdloss.errors import AgreementError, DataError, RankError
from hvdloss.guard import ranks_apart
from hvdloss.hearing import hear
from hvdloss.plan import ParameterInfo

__all__ = ["Agreed", "agree", "agree_on_items", "raise_together", "together"]


@dataclass(frozen=True)
class Agreed:
    """What all ranks hold after :func:`agree`.

    Attributes:
        parameters: equal on all ranks; ``sparse`` where any rank has seen a sparse gradient.
        order: in which gradients became ready; where ranks differ, by their mean places.
    """

    parameters: list[ParameterInfo]
    order: list[int]


def _complete(told: Any) -> bool:
    """Whether a rank's words have all that is compared here."""
    parameters, sums, names = told["parameters"], told["checksums"], told["names"]
    return (
        isinstance(told["settings"], dict)
        and isinstance(told["count"], int)
        and all(isinstance(held, list) for held in (parameters, sums, names))
        and all(isinstance(one, str) for one in names)
        and len(sums) == len(parameters)
        and all(
            isinstance(one["name"], str)
            and isinstance(one["shape"], list)
            and all(isinstance(n, int) for n in one["shape"])
            and isinstance(one["kind"], str)
            and isinstance(one["itemsize"], int)
            and isinstance(one["sparse"], bool)
            and isinstance(one["trained"], bool)
            and isinstance(one["gradient"], str)
            for one in parameters
        )
    )


#: What all ranks must have alike of a parameter, and how a message calls it.
_COMPARED = {
    "name": "its name",
    "shape": "its shape",
    "kind": "its kind",
    "trained": "whether it gets a gradient (requires_grad, trainable)",
    "gradient": "what its gradient is",
}


def _first_apart(names: Sequence[Sequence[str]]) -> str:
    """Return which parameter is the first that some ranks lack: "; rank(s) 1 lack '0.weight'"."""
    counts = [Counter(one) for one in names]  # names may come twice
    for name in dict.fromkeys(itertools.chain(*names)):
        most = max(count[name] for count in counts)
        if lacking := [str(rank) for rank, count in enumerate(counts) if count[name] < most]:
            return f"; rank(s) {', '.join(lacking)} lack {name!r}"
    return ""


def _is_told(told: Any) -> bool:
    return isinstance(told, list) and len(told) == 2 and all(isinstance(one, str) for one in told)


def _is_items(told: Any) -> bool:
    return isinstance(told, list) and all(isinstance(one, list) and len(one) == 2 for one in told)


def _is_state(told: Any) -> bool:
    return isinstance(told, list) and len(told) == 3 and all(isinstance(part, str) for part in told[:2])


def _differing(values: Sequence[Any]) -> str:
    """Return which ranks differ from rank 0, and how: "rank 1 has 3, rank 0 has 2"."""
    rank = next(r for r, value in enumerate(values) if value != values[0])
    more = sum(value != values[0] for value in values) - 1
    tail = f" ({more} more rank(s) differ as well)" if more else ""
    return f"rank {rank} has {values[rank]!r}, rank 0 has {values[0]!r}{tail}"


def agree(
    communicator: Communicator,
    parameters: Sequence[ParameterInfo],
    checksums: Callable[[], Sequence[int]],
    order: Sequence[int],
    settings: dict[str, Any],
    *,
    name: str,
    broadcast: str = "Give all ranks rank 0's before the first step.",
) -> Agreed:
    """Check that all ranks agree, and return what they agree on.

    Args:
        communicator: the ranks.
        parameters: this rank's, in its order.
        checksums: gives one integer per parameter, equal if and only if (nearly always) the values
            are bitwise equal.
        order: indices in the order in which gradients became ready on this rank; may be empty.
        settings: what must be equal on all ranks, JSON values by argument name.
        name: of the exchange.
        broadcast: how the framework gives all ranks rank 0's parameters, for the message.

    Raises:
        AgreementError: on every rank alike, naming the first difference and the ranks.

    Collectives: one sum of 32 numbers. Another one of three numbers per parameter where `order`, or what is
    sparse, differs. Where ranks do not agree, up to two sums and a gather.
    """
    described = [asdict(p) for p in parameters]
    sums = list(checksums())
    sparse = [p.sparse for p in parameters]
    compared = _text([settings, [_compared(p) for p in described], sums])
    equal, alike = same(communicator, [compared, _text([order, sparse])], name)
    if not equal:
        _raise_difference(communicator, settings, described, sums, name, broadcast)
    if alike:
        return Agreed(list(parameters), list(order))
    places, counts, sparse_on = _merged(communicator, order, sparse, name).tolist()
    found = [replace(p, sparse=count > 0) for p, count in zip(parameters, sparse_on, strict=True)]
    ready = [i for i, count in enumerate(counts) if count > 0]
    return Agreed(found, sorted(ready, key=lambda i: (places[i] / counts[i], i)))


def _compared(parameter: dict[str, Any]) -> dict[str, Any]:
    return {field: parameter[field] for field in _COMPARED}


def _text(value: Any) -> bytes:
    return json.dumps(_canonical(value), sort_keys=True).encode()


def _canonical(value: Any) -> Any:
    """Return a JSON value in the form that equal ones share: 64.0 is 64."""
    if isinstance(value, dict):
        return {key: _canonical(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(one) for one in value]
    return int(value) if isinstance(value, bool | float) and value in (0, 1, value // 1) else value


def _merged(
    communicator: Communicator, order: Sequence[int], sparse: Sequence[bool], name: str
) -> npt.NDArray[np.float64]:
    """Return by parameter: the sum of its places in ranks' orders, in how many it is, and is sparse."""
    mine = np.zeros((3, len(sparse)))
    for place, i in enumerate(order):
        mine[:2, i] = place, 1
    mine[2] = sparse
    return communicator.sum(mine, f"{name}.order")


def _raise_difference(
    communicator: Communicator,
    settings: dict[str, Any],
    parameters: list[dict[str, Any]],
    checksums: list[int],
    name: str,
    broadcast: str,
) -> NoReturn:
    """Find what differs first, have all ranks tell no more than that, and raise what they told."""
    settled, counted = same(communicator, [_text(settings), _text(len(parameters))], f"{name}.what")
    index = None
    if settled and counted:
        each = [_text([_compared(p), c]) for p, c in zip(parameters, checksums, strict=True)]
        index = same(communicator, each, f"{name}.which").index(False)
    mine = {
        "settings": {} if settled else settings,
        "count": len(parameters),
        "names": [] if counted else [p["name"] for p in parameters],
        "parameters": [] if index is None else [parameters[index]],
        "checksums": [] if index is None else [checksums[index]],
    }
    texts = communicator.gather(json.dumps(mine).encode(), f"{name}.detail")
    ranks = hear(texts, "parameters and settings", _complete)

    for key in sorted(set().union(*(r["settings"] for r in ranks))):
        values = [r["settings"].get(key) for r in ranks]
        if any(value != values[0] for value in values):
            raise AgreementError(
                f"{key} differs between ranks: {_differing(values)}. Construct the objective and the "
                f"optimizer with the same arguments on every rank."
            )
    counts = [r["count"] for r in ranks]
    if len(set(counts)) > 1:
        raise AgreementError(
            f"the number of parameters differs between ranks: {_differing(counts)}"
            f"{_first_apart([r['names'] for r in ranks])}. Build the same model on every rank, with the same "
            f"parameters frozen."
        )
    if not all(r["parameters"] for r in ranks):
        raise AgreementError(
            "ranks' settings or parameters differ, but not in what they tell of them; do all ranks run the "
            "same version of hvdloss?"
        )
    theirs = ranks[0]["parameters"][0]
    for field, words in _COMPARED.items():
        values = [r["parameters"][0][field] for r in ranks]
        if any(value != values[0] for value in values):
            raise AgreementError(
                f"parameter {index} ({theirs['name']}): {words} differs between ranks: {_differing(values)}. "
                f"Build the same model, in the same order and with the same parameters frozen, on every rank."
            )
    apart = ranks_apart([r["checksums"][0] for r in ranks])
    raise AgreementError(
        f"parameter {index} ({theirs['name']}) has other values on rank(s) {', '.join(map(str, apart))} than "
        f"on rank 0, so the ranks would train different models. {broadcast}"
    )


def together(communicator: Communicator, work: Callable[[], Any], name: str, what: str) -> Any:
    """Do on every rank what may fail on some, and raise what failed on all of them.

    Args:
        communicator: the ranks.
        work: returns what must be equal on all ranks, as JSON.
        name: of the exchange.
        what: what the result tells of, for the message.

    Returns:
        What `work` returned.

    Raises:
        DataError: a rank raised one.
        RankError: a rank raised something else. On that rank itself its own error is the cause.
        AgreementError: the results differ.

    Collectives: one sum of 16 numbers; where ranks differ, or one failed, a gather more.
    """
    value, error = None, None
    try:
        value = work()
    except Exception as found:
        error = found
    values = [told[2] for told in _exchanged(communicator, error, value, name)]
    if any(one != values[0] for one in values):
        raise AgreementError(f"{what} differ between ranks: {_differing(values)}")
    return value


def raise_together(
    communicator: Communicator, error: BaseException | None, name: str, when: str = ""
) -> None:
    """Raise on every rank what any rank brings; nothing where none brings any.

    Args:
        communicator: the ranks.
        error: what went wrong on this one; None for nothing.
        name: of the exchange.
        when: how the message begins: "step 3", say.

    Raises:
        DataError, RankError: see :func:`together`.

    Collectives: one sum of 16 numbers; where one failed, a gather more.
    """
    _exchanged(communicator, error, None, name, when)


def agree_on_items(
    communicator: Communicator,
    work: Callable[[], Sequence[tuple[str, Any]]],
    *,
    name: str,
    what: str,
    way_out: str,
) -> None:
    """Check that all ranks are about to exchange the same things; what fails on all is raised as it is.

    Args:
        communicator: the ranks.
        work: returns this rank's things: a name and a JSON value each, equal on all ranks; may raise.
        name: of the exchange.
        what: one thing is, for the message: "parameter".
        way_out: the end of the message.

    Raises:
        AgreementError: on every rank alike, naming the first thing that differs.
        RankError: `work` failed on some ranks only, or otherwise.

    Collectives: one sum of 16 numbers; where ranks differ, gathers, at last of everything.
    """
    items: list[Any] = []
    error: Exception | None = None
    try:
        items = [list(item) for item in work()]
    except Exception as found:
        error = found
    text = json.dumps(items).encode()
    told = ["", hashlib.sha256(text).hexdigest()] if error is None else [type(error).__name__, str(error)]
    data = json.dumps(told).encode()
    if same(communicator, [data], name)[0]:
        if error is not None:
            raise error
        return
    ranks = hear(communicator.gather(data, f"{name}.told"), what, _is_told)
    if any(kind for kind, _ in ranks):
        raise_together(communicator, error, f"{name}.failed", what)
    lists = hear(communicator.gather(text, f"{name}.items"), what, _is_items)
    for place in range(max(map(len, lists))):
        values = [one[place] if place < len(one) else None for one in lists]
        if not (apart := ranks_apart(values)):
            continue
        own = [
            value if value is not None else ["(none)", "nothing"] for value in (values[0], values[apart[0]])
        ]
        more = f" ({len(apart) - 1} more rank(s) differ as well)" if len(apart) > 1 else ""
        raise AgreementError(
            f"{what} {place} ({own[0][0]}) differs between ranks: rank {apart[0]} has {own[1][0]}: "
            f"{own[1][1]}, rank 0 has {own[0][0]}: {own[0][1]}{more}. {way_out}"
        )


def _exchanged(
    communicator: Communicator, error: BaseException | None, value: Any, name: str, when: str = ""
) -> list[Any]:
    """Return what ranks bring, ``[kind of error, its text, value]``, all or the one that all do.

    Raise the first error.
    """
    told = ["", "", value] if error is None else [type(error).__name__, str(error), None]
    data = json.dumps(told).encode()
    if same(communicator, [data], name)[0] and error is None:
        return [told]
    heard = hear(communicator.gather(data, f"{name}.detail"), "state", _is_state)
    failed = [(rank, *one[:2]) for rank, one in enumerate(heard) if one[0]]
    if not failed:
        return heard
    rank, kind, text = failed[0]
    more = f" ({len(failed) - 1} more rank(s) failed as well)" if len(failed) > 1 else ""
    ours = kind in (DataError.__name__, RankError.__name__)
    if not ours:
        text = f"{kind}: {text}"
        if kind not in errors.__all__:  # one of ours says by itself what to do
            text += f". {errors.WAY_OUT}"
    text = f"{f'{when}: ' if when else ''}rank {rank}: {text}{more}"
    out = DataError(text) if kind == DataError.__name__ else RankError(text)
    out.ranks = tuple(one[0] for one in failed)
    raise out from error

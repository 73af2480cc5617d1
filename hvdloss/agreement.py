"""The agreement of the first step: every rank checks that all hold the same parameters and settings.

Done once per optimizer (and again when its parameters change), with one exchange of a small JSON text
per rank, so that what would otherwise hang or train apart is an error that names the difference.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvdloss import errors
from hvdloss.communicator import Communicator
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
        order: in which gradients became ready, of the first rank that had the most of them.
    """

    parameters: list[ParameterInfo]
    order: list[int]


def _complete(told: Any) -> bool:
    """Whether a rank's words have all that is compared here."""
    parameters, sums, order = told["parameters"], told["checksums"], told["order"]
    return (
        isinstance(told["settings"], dict)
        and all(isinstance(held, list) for held in (parameters, sums, order))
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
        and all(isinstance(i, int) and 0 <= i < len(parameters) for i in order)
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

    Collectives: one gather.
    """
    mine = {
        "settings": settings,
        "parameters": [asdict(p) for p in parameters],
        "checksums": list(checksums()),
        "order": list(order),
    }
    texts = communicator.gather(json.dumps(mine).encode(), name)
    ranks = hear(texts, "parameters and settings", _complete)

    for key in sorted(set().union(*(r["settings"] for r in ranks))):
        values = [r["settings"].get(key) for r in ranks]
        if any(value != values[0] for value in values):
            raise AgreementError(
                f"{key} differs between ranks: {_differing(values)}. Construct the objective and the "
                f"optimizer with the same arguments on every rank."
            )
    counts = [len(r["parameters"]) for r in ranks]
    if len(set(counts)) > 1:
        raise AgreementError(
            f"the number of parameters differs between ranks: {_differing(counts)}"
            f"{_first_apart([[p['name'] for p in r['parameters']] for r in ranks])}. Build the same model on "
            f"every rank, with the same parameters frozen."
        )
    agreed = []
    for i, mine_p in enumerate(ranks[0]["parameters"]):
        for field, words in _COMPARED.items():
            values = [r["parameters"][i][field] for r in ranks]
            if any(value != values[0] for value in values):
                raise AgreementError(
                    f"parameter {i} ({mine_p['name']}): {words} differs between ranks: {_differing(values)}. "
                    f"Build the same model, in the same order and with the same parameters frozen, on every "
                    f"rank."
                )
        values = [r["checksums"][i] for r in ranks]
        if apart := ranks_apart(values):
            raise AgreementError(
                f"parameter {i} ({mine_p['name']}) has other values on rank(s) "
                f"{', '.join(map(str, apart))} than "
                f"on rank 0, so the ranks would train different models. {broadcast}"
            )
        sparse = any(r["parameters"][i]["sparse"] for r in ranks)
        agreed.append(
            ParameterInfo(mine_p["name"], tuple(mine_p["shape"]), mine_p["kind"], mine_p["itemsize"], sparse)
        )
    orders: list[list[int]] = [r["order"] for r in ranks]
    return Agreed(agreed, max(orders, key=len))


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

    Collectives: one gather.
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

    Collectives: one gather.
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

    Collectives: one gather of a few bytes per rank; where ranks differ, one of everything.
    """
    items: list[Any] = []
    error: Exception | None = None
    try:
        items = [list(item) for item in work()]
    except Exception as found:
        error = found
    text = json.dumps(items).encode()
    told = ["", hashlib.sha256(text).hexdigest()] if error is None else [type(error).__name__, str(error)]
    ranks = hear(communicator.gather(json.dumps(told).encode(), name), what, _is_told)
    if error is not None and not ranks_apart(ranks):
        raise error
    if any(kind for kind, _ in ranks):
        raise_together(communicator, error, f"{name}.failed", what)
    if not ranks_apart(ranks):
        return
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
    """Return what ranks bring, ``[kind of error, its text, value]``; raise the first error."""
    told = ["", "", value] if error is None else [type(error).__name__, str(error), None]
    heard = hear(communicator.gather(json.dumps(told).encode(), name), "state", _is_state)
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

"""The consistency check of the first step: do all ranks hold the same parameters and settings?

Done once per optimizer (and again when its parameters change), so that what would otherwise hang or make the
ranks diverge is an error that names the difference. A hash is compared first: a few numbers, whatever the
number of ranks and parameters. Details are gathered only of what differs.
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
from hvdloss.comm.communicator import Communicator, equal_on_all_ranks
from hvdloss.comm.guard import mismatched_ranks
from hvdloss.comm.messages import decode_all
from hvdloss.comm.plan import ParameterInfo
from hvdloss.errors import AgreementError, DataError, RankError

__all__ = [
    "Consistent",
    "check_consistency",
    "check_items_consistent",
    "raise_on_all_ranks",
    "run_on_all_ranks",
]


@dataclass(frozen=True)
class Consistent:
    """What is equal on all ranks after :func:`check_consistency`.

    Attributes:
        parameters: equal on all ranks; ``sparse`` where any rank has seen a sparse gradient.
        order: in which gradients became ready; where ranks differ, by their mean positions.
    """

    parameters: list[ParameterInfo]
    order: list[int]


def _is_description(message: Any) -> bool:
    """Whether a rank's message has all that is compared here."""
    parameters, sums, names = message["parameters"], message["checksums"], message["names"]
    return (
        isinstance(message["settings"], dict)
        and isinstance(message["count"], int)
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


#: Fields of a parameter that must be equal on all ranks, and their names in messages.
_COMPARED = {
    "name": "its name",
    "shape": "its shape",
    "kind": "its kind",
    "trained": "whether it gets a gradient (requires_grad, trainable)",
    "gradient": "what its gradient is",
}


def _first_missing(names: Sequence[Sequence[str]]) -> str:
    """Return the first parameter that some ranks lack: "; rank(s) 1 lack '0.weight'"."""
    counts = [Counter(one) for one in names]  # names may come twice
    for name in dict.fromkeys(itertools.chain(*names)):
        most = max(count[name] for count in counts)
        if lacking := [str(rank) for rank, count in enumerate(counts) if count[name] < most]:
            return f"; rank(s) {', '.join(lacking)} lack {name!r}"
    return ""


def _is_failure(message: Any) -> bool:
    return isinstance(message, list) and len(message) == 2 and all(isinstance(one, str) for one in message)


def _is_items(message: Any) -> bool:
    return isinstance(message, list) and all(isinstance(one, list) and len(one) == 2 for one in message)


def _is_state(message: Any) -> bool:
    return (
        isinstance(message, list) and len(message) == 3 and all(isinstance(part, str) for part in message[:2])
    )


def _differing(values: Sequence[Any]) -> str:
    """Return which ranks differ from rank 0, and how: "rank 1 has 3, rank 0 has 2"."""
    rank = next(r for r, value in enumerate(values) if value != values[0])
    more = sum(value != values[0] for value in values) - 1
    tail = f" ({more} more rank(s) differ as well)" if more else ""
    return f"rank {rank} has {values[rank]!r}, rank 0 has {values[0]!r}{tail}"


def check_consistency(
    communicator: Communicator,
    parameters: Sequence[ParameterInfo],
    checksums: Callable[[], Sequence[int]],
    order: Sequence[int],
    settings: dict[str, Any],
    *,
    name: str,
    broadcast: str = "Give all ranks rank 0's before the first step.",
) -> Consistent:
    """Check that all ranks hold the same parameters and settings, and return the common ones.

    Args:
        communicator: the ranks.
        parameters: of this rank, in its order.
        checksums: returns one integer per parameter, equal if and only if (nearly always) the values
            are bitwise equal.
        order: indices in the order in which gradients became ready on this rank; may be empty.
        settings: what must be equal on all ranks, JSON values by argument name.
        name: of the exchange.
        broadcast: how the framework broadcasts rank 0's parameters, for the message.

    Raises:
        AgreementError: on every rank alike, naming the first difference and the ranks.

    Collectives: one sum of 32 numbers. Another one of three numbers per parameter where `order`, or what is
    sparse, differs. Where ranks do not agree, up to two sums and a gather.
    """
    described = [asdict(p) for p in parameters]
    sums = list(checksums())
    sparse = [p.sparse for p in parameters]
    compared = _text([settings, [_compared(p) for p in described], sums])
    equal, alike = equal_on_all_ranks(communicator, [compared, _text([order, sparse])], name)
    if not equal:
        _raise_difference(communicator, settings, described, sums, name, broadcast)
    if alike:
        return Consistent(list(parameters), list(order))
    places, counts, sparse_on = _merged(communicator, order, sparse, name).tolist()
    found = [replace(p, sparse=count > 0) for p, count in zip(parameters, sparse_on, strict=True)]
    ready = [i for i, count in enumerate(counts) if count > 0]
    return Consistent(found, sorted(ready, key=lambda i: (places[i] / counts[i], i)))


def _compared(parameter: dict[str, Any]) -> dict[str, Any]:
    return {field: parameter[field] for field in _COMPARED}


def _text(value: Any) -> bytes:
    return json.dumps(_canonical(value), sort_keys=True).encode()


def _canonical(value: Any) -> Any:
    """Return a JSON value in canonical form, the same for equal values: 64.0 is 64."""
    if isinstance(value, dict):
        return {key: _canonical(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(one) for one in value]
    return int(value) if isinstance(value, bool | float) and value in (0, 1, value // 1) else value


def _merged(
    communicator: Communicator, order: Sequence[int], sparse: Sequence[bool], name: str
) -> npt.NDArray[np.float64]:
    """Return three sums over ranks per parameter: of its position, of its presence, of its sparsity."""
    mine = np.zeros((3, len(sparse)))
    for place, i in enumerate(order):
        mine[:2, i] = place, 1
    mine[2] = sparse
    return communicator.all_reduce(mine, f"{name}.order")


def _raise_difference(
    communicator: Communicator,
    settings: dict[str, Any],
    parameters: list[dict[str, Any]],
    checksums: list[int],
    name: str,
    broadcast: str,
) -> NoReturn:
    """Find what differs first, gather no more than that, and raise it."""
    settled, counted = equal_on_all_ranks(
        communicator, [_text(settings), _text(len(parameters))], f"{name}.what"
    )
    index = None
    if settled and counted:
        each = [_text([_compared(p), c]) for p, c in zip(parameters, checksums, strict=True)]
        index = equal_on_all_ranks(communicator, each, f"{name}.which").index(False)
    mine = {
        "settings": {} if settled else settings,
        "count": len(parameters),
        "names": [] if counted else [p["name"] for p in parameters],
        "parameters": [] if index is None else [parameters[index]],
        "checksums": [] if index is None else [checksums[index]],
    }
    texts = communicator.all_gather_bytes(json.dumps(mine).encode(), f"{name}.detail")
    ranks = decode_all(texts, "parameters and settings", _is_description)

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
            f"{_first_missing([r['names'] for r in ranks])}. Build the same model on every rank, with the "
            f"same parameters frozen."
        )
    if not all(r["parameters"] for r in ranks):
        raise AgreementError(
            "ranks' settings or parameters differ, but their descriptions do not; do all ranks run the same "
            "version of hvdloss?"
        )
    theirs = ranks[0]["parameters"][0]
    for field, words in _COMPARED.items():
        values = [r["parameters"][0][field] for r in ranks]
        if any(value != values[0] for value in values):
            raise AgreementError(
                f"parameter {index} ({theirs['name']}): {words} differs between ranks: {_differing(values)}. "
                f"Build the same model, in the same order and with the same parameters frozen, on every rank."
            )
    mismatched = mismatched_ranks([r["checksums"][0] for r in ranks])
    raise AgreementError(
        f"parameter {index} ({theirs['name']}) has other values on rank(s) "
        f"{', '.join(map(str, mismatched))} than on rank 0, so the ranks would train different models. "
        f"{broadcast}"
    )


def run_on_all_ranks(communicator: Communicator, work: Callable[[], Any], name: str, what: str) -> Any:
    """Run `work` on every rank; if it fails on any, raise its error on all.

    Args:
        communicator: the ranks.
        work: returns a JSON value that must be equal on all ranks.
        name: of the exchange.
        what: the result is, for the message.

    Returns:
        What `work` returned.

    Raises:
        DataError: a rank raised one.
        RankError: a rank raised something else. On that rank itself its own error is the cause.
        AgreementError: the results differ.

    Collectives: one sum of 16 numbers; where ranks differ, or one failed, another gather.
    """
    value, error = None, None
    try:
        value = work()
    except Exception as found:
        error = found
    values = [message[2] for message in _exchange_outcomes(communicator, error, value, name)]
    if any(one != values[0] for one in values):
        raise AgreementError(f"{what} differ between ranks: {_differing(values)}")
    return value


def raise_on_all_ranks(
    communicator: Communicator, error: BaseException | None, name: str, when: str = ""
) -> None:
    """Raise the error of any rank on every rank; does nothing if no rank has one.

    Args:
        communicator: the ranks.
        error: of this rank, or None.
        name: of the exchange.
        when: start of the message: "step 3", say.

    Raises:
        DataError, RankError: see :func:`run_on_all_ranks`.

    Collectives: one sum of 16 numbers; where one failed, another gather.
    """
    _exchange_outcomes(communicator, error, None, name, when)


def check_items_consistent(
    communicator: Communicator,
    work: Callable[[], Sequence[tuple[str, Any]]],
    *,
    name: str,
    what: str,
    remedy: str,
) -> None:
    """Check that all ranks are about to exchange the same items; an error equal on all is raised unchanged.

    Args:
        communicator: the ranks.
        work: returns this rank's items: a name and a JSON value each, equal on all ranks; may raise.
        name: of the exchange.
        what: an item is, for the message: "parameter".
        remedy: the end of the message.

    Raises:
        AgreementError: on every rank alike, naming the first item that differs.
        RankError: `work` failed on some ranks only, or in different ways.

    Collectives: one sum of 16 numbers; where ranks differ, gathers, at last of everything.
    """
    items: list[Any] = []
    error: Exception | None = None
    try:
        items = [list(item) for item in work()]
    except Exception as found:
        error = found
    text = json.dumps(items).encode()
    message = ["", hashlib.sha256(text).hexdigest()] if error is None else [type(error).__name__, str(error)]
    data = json.dumps(message).encode()
    if equal_on_all_ranks(communicator, [data], name)[0]:
        if error is not None:
            raise error
        return
    ranks = decode_all(communicator.all_gather_bytes(data, f"{name}.failure"), what, _is_failure)
    if any(kind for kind, _ in ranks):
        raise_on_all_ranks(communicator, error, f"{name}.failed", what)
    lists = decode_all(communicator.all_gather_bytes(text, f"{name}.items"), what, _is_items)
    for place in range(max(map(len, lists))):
        values = [one[place] if place < len(one) else None for one in lists]
        if not (mismatched := mismatched_ranks(values)):
            continue
        own = [
            value if value is not None else ["(none)", "nothing"]
            for value in (values[0], values[mismatched[0]])
        ]
        more = f" ({len(mismatched) - 1} more rank(s) differ as well)" if len(mismatched) > 1 else ""
        raise AgreementError(
            f"{what} {place} ({own[0][0]}) differs between ranks: rank {mismatched[0]} has {own[1][0]}: "
            f"{own[1][1]}, rank 0 has {own[0][0]}: {own[0][1]}{more}. {remedy}"
        )


def _exchange_outcomes(
    communicator: Communicator, error: BaseException | None, value: Any, name: str, when: str = ""
) -> list[Any]:
    """Return the ranks' outcomes ``[kind of error, its text, value]``; only one if all are equal.

    Raises the first error.
    """
    message = ["", "", value] if error is None else [type(error).__name__, str(error), None]
    data = json.dumps(message).encode()
    if equal_on_all_ranks(communicator, [data], name)[0] and error is None:
        return [message]
    messages = decode_all(communicator.all_gather_bytes(data, f"{name}.detail"), "state", _is_state)
    failed = [(rank, *one[:2]) for rank, one in enumerate(messages) if one[0]]
    if not failed:
        return messages
    rank, kind, text = failed[0]
    more = f" ({len(failed) - 1} more rank(s) failed as well)" if len(failed) > 1 else ""
    ours = kind in (DataError.__name__, RankError.__name__)
    if not ours:
        text = f"{kind}: {text}"
        if kind not in errors.__all__:  # ours already say what to do
            text += f". {errors.WAY_OUT}"
    text = f"{f'{when}: ' if when else ''}rank {rank}: {text}{more}"
    out = DataError(text) if kind == DataError.__name__ else RankError(text)
    out.ranks = tuple(one[0] for one in failed)
    raise out from error

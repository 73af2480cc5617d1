"""Explaining rows one by one, the work shared evenly over ranks: what SHAP and LIME have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss._util.checks import check_int
from hvdloss.comm.communicator import Communicator
from hvdloss.comm.guard import checksum
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.explain.exchange import RankMessage, exchange_messages, require_equal
from hvdloss.explain.inputs import along, ids_of, names_of, rows_of
from hvdloss.explain.sample import moves, random_bits, random_keys, smallest

__all__ = ["Explain", "Explained", "explain_rows", "seeded"]

BACKGROUND, ROWS, SEEDS = 1, 2, 3  # streams of random numbers

#: One row and its seed in; arrays by name out.
Explain = Callable[[npt.NDArray[Any], int], Mapping[str, Any]]


@dataclass(frozen=True)
class Explained:
    """Rows that were explained.

    Attributes:
        ids: of the rows.
        rows: themselves.
        background: the fair sample that they were held against.
        found: arrays by name, one entry per row.
        names: of the features, if anybody knows.
        worked: number of rows that each rank worked on.
    """

    ids: npt.NDArray[Any]
    rows: npt.NDArray[Any]
    background: npt.NDArray[Any]
    found: dict[str, npt.NDArray[Any]]
    names: list[str] | None
    worked: list[int]


_GLOBAL = threading.Lock()  # simulated ranks are threads


@contextmanager
def seeded() -> Iterator[None]:
    """Seed NumPy's global random state, which the libraries draw from, and restore it afterwards."""
    with _GLOBAL:
        state = np.random.get_state()
        try:
            yield
        finally:
            np.random.set_state(state)


def explain_rows(
    ranks: Communicator,
    name: str,
    make: Callable[[npt.NDArray[Any], list[str] | None], Explain],
    x: Any,
    *,
    rows: int | None,
    background: int | npt.ArrayLike,
    data: Any,
    ids: npt.ArrayLike | None,
    data_ids: npt.ArrayLike | None,
    weight: Any,
    seed: int,
    feature_names: Sequence[str] | None,
    results: str,
    settings: Sequence[Any],
) -> Explained:
    """Explain rows of all ranks; see :func:`hvdloss.explain.shap_values` for the arguments.

    Args:
        ranks: who takes part.
        name: of the collectives.
        make: ``(background, names) -> explain``; called once on each rank that has rows to explain.
        settings: what must be equal on all ranks beside what is given here.

    Raises:
        HvdlossError: on every rank alike.

    Collectives: three gathers.
    """
    held: dict[str, Any] = {}
    fixed = not isinstance(background, int | np.integer)

    def begin() -> RankMessage:
        held["x"] = here = rows_of("x", x)
        given = here if data is None else rows_of("data", data)
        held["data"] = given
        if not fixed:
            check_int("background", background, 1)
        elif data is not None:
            raise ConfigError("background= is an array, so data=, to draw it from, has no use; leave one out")
        elif not np.asarray(background).size:
            raise ConfigError("background= has no rows")
        ground = rows_of("background", background) if fixed else np.zeros((0, 0))
        if rows is not None:
            check_int("rows", rows, 1)
        check_int("seed", seed, 0)
        if results not in ("all", "own"):
            raise ConfigError(f'results={results!r} must be "all" or "own"')
        if data is None and data_ids is not None:
            raise ConfigError("data_ids= are of data=, which is not given; leave them out")
        known = names_of(x, feature_names)
        shapes = [list(a.shape[1:]) for a in (here, given, ground) if len(a)]
        if any(shape != shapes[0] for shape in shapes):
            raise ShapeError(f"x, data and background must have the same features, not {shapes}")
        if shapes and known is not None and len(known) != shapes[0][0]:
            raise ShapeError(f"feature_names are {len(known)}, but x has {shapes[0][0]} features")
        mine = ids_of(ids, len(here))
        theirs = mine if data is None else ids_of(data_ids, len(given), "data_ids")
        along("weight", weight, len(given))
        held.update(ids=mine, data_ids=theirs, ground=ground, names=known)
        of_ground = [list(ground.shape), checksum(np.ascontiguousarray(ground))] if fixed else background
        return RankMessage(
            {
                "rows": len(here),
                "data": len(given),
                "shape": shapes[0] if shapes else None,
                "names": known if len(here) else None,
                "ids": ("counted" if ids is None else mine.dtype.kind) if len(here) else None,
                "data_ids": ("counted" if not len(theirs) else theirs.dtype.kind) if len(given) else None,
                "settings": [rows, seed, results, *settings],
                "background": of_ground,
            }
        )

    heads = [one.note for one in exchange_messages(ranks, f"{name}.head", "rows to explain", begin)]
    require_equal("[rows, seed, results, explainer, ...]", [head["settings"] for head in heads])
    require_equal("background=", [head["background"] for head in heads])
    require_equal("the shape of a row", [head["shape"] for head in heads], but=None)
    names = require_equal("the features' names", [head["names"] for head in heads], but=None)
    require_equal("the kind of ids=", [head["ids"] for head in heads], but=None)
    require_equal("the kind of data_ids=", [head["data_ids"] for head in heads], but=None)
    counts = [head["rows"] for head in heads]
    if not sum(counts):
        raise ConfigError("x has no rows on any rank: there is nothing to explain")
    if not fixed and not sum(head["data"] for head in heads):
        raise ConfigError("data= has no rows on any rank: no background can be drawn")
    me = ranks.rank
    here, given = held["x"], held["data"]
    if ids is None:
        held["ids"] = np.arange(len(here)) + sum(counts[:me])
    if data is None:
        held["data_ids"] = held["ids"]
    elif data_ids is None:
        held["data_ids"] = np.arange(len(given)) + sum(head["data"] for head in heads[:me])
    works = moves(counts)  # where every row is explained
    away = works[sum(counts[:me]) : sum(counts[: me + 1])] != me

    def drawn() -> RankMessage:
        if fixed:
            ground = np.zeros(0, np.int64)
            keys = np.zeros(0)
        else:
            keys = random_keys(held["data_ids"], seed, BACKGROUND, weight)
            ground = smallest(keys, held["data_ids"], int(background))  # type: ignore[arg-type]
        if rows is None:  # only what another rank is to explain
            chosen = np.flatnonzero(away)
            own = np.zeros(0)
        else:
            own = random_keys(held["ids"], seed, ROWS)
            chosen = smallest(own, held["ids"], rows)
        return RankMessage(
            keys=keys[ground] if len(ground) else np.zeros(0),
            data_ids=held["data_ids"][ground],
            data=given[ground],
            row_keys=own[chosen] if rows is not None else np.zeros(0),
            ids=held["ids"] if rows is None else held["ids"][chosen],
            rows=here[chosen],
        )

    messages = exchange_messages(ranks, f"{name}.rows", "drawing rows", drawn)
    if fixed:
        ground = held["ground"]
    else:
        first = smallest(_joined(messages, "keys"), _joined(messages, "data_ids"), int(background))  # type: ignore[arg-type]
        ground = _joined(messages, "data")[first]
        if not len(ground):
            raise ConfigError("weight= is zero for every row of data=: no background can be drawn")
    every = _joined(messages, "ids")
    if rows is None:
        owner = np.repeat(np.arange(ranks.size), counts)
        moved = dict(zip(np.flatnonzero(works != owner).tolist(), _joined(messages, "rows"), strict=True))
        start = sum(counts[:me])

        def row(number: int) -> npt.NDArray[Any]:
            return np.asarray(moved[number] if number in moved else here[number - start])
    else:
        chosen = smallest(_joined(messages, "row_keys"), every, rows)
        owner = np.repeat(np.arange(ranks.size), [len(one["ids"]) for one in messages])[chosen]
        every, table = every[chosen], _joined(messages, "rows")[chosen]
        works = np.array([number * ranks.size // len(every) for number in range(len(every))])

        def row(number: int) -> npt.NDArray[Any]:
            return np.asarray(table[number])

    seeds = (random_bits(every, seed, SEEDS) >> np.uint64(32)).tolist()
    mine = np.flatnonzero(works == me)

    def explain() -> RankMessage:
        done: list[Mapping[str, Any]] = []
        if len(mine):
            with seeded():
                np.random.seed(seed % 2**32)
                one = make(ground, names)
                for number in mine.tolist():
                    np.random.seed(seeds[number])
                    done.append(one(row(number), seeds[number]))
        held["done"] = {key: np.array([each[key] for each in done]) for key in (done[0] if done else ())}
        # With "own", a row's owner already has the results of the rows it worked on itself.
        sent = np.ones(len(mine), bool) if results == "all" else owner[mine] != me
        data = np.array([row(number) for number in mine[sent].tolist()])
        return RankMessage(
            number=mine[sent], row=data, **{f"f.{k}": v[sent] for k, v in held["done"].items()}
        )

    messages = exchange_messages(ranks, f"{name}.found", "explaining rows", explain)
    numbers, data_rows = _joined(messages, "number"), _joined(messages, "row")
    keys = sorted({key[2:] for one in messages for key in one.arrays if key.startswith("f.")})
    found = {key: _joined(messages, f"f.{key}") for key in keys}
    if results == "own":
        stay = mine[owner[mine] == me]
        numbers = np.concatenate([numbers, stay])
        kept = np.array([row(number) for number in stay.tolist()])
        data_rows = _stacked([data_rows, kept])
        for key, values in held["done"].items():
            found[key] = _stacked([found[key], values[owner[mine] == me]])
    wanted = np.arange(len(every)) if results == "all" else np.flatnonzero(owner == me)
    place = {number: at for at, number in enumerate(numbers.tolist())}
    at = [place[number] for number in wanted.tolist()]
    return Explained(
        every[wanted],
        data_rows[at] if at else here[:0],
        ground,
        {key: value[at] for key, value in found.items()},
        names,
        np.bincount(works, minlength=ranks.size).tolist(),
    )


def _joined(messages: Sequence[RankMessage], name: str) -> npt.NDArray[Any]:
    """Return all ranks' rows of an array; a rank may have none, of any shape."""
    return _stacked([one[name] for one in messages if name in one.arrays])


def _stacked(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    filled = [part for part in parts if len(part)]
    return np.concatenate(filled) if filled else np.zeros(0, parts[0].dtype if parts else np.float64)

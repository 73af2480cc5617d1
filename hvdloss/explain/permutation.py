"""Permutation importance over sharded data: what the model loses when one feature is shuffled.

The shuffle runs over the rows of all ranks, so that the importance is that of one process with all the
data; shuffled within ranks it would keep what differs between them, and mean something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss._util.checks import check_int
from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.explain.exchange import RankMessage, exchange_messages, require_equal, text_table
from hvdloss.explain.inputs import Predict, along, ids_of, names_of, predictor, rows_of, where_of
from hvdloss.explain.measures import direction, measure_of, name_of
from hvdloss.metrics.base import State

__all__ = ["PermutationImportance", "permutation_importance"]

Columns = int | str | Sequence[int | str]


@dataclass(frozen=True)
class PermutationImportance:
    """How much worse a model is without each feature; equal on every rank.

    Attributes:
        features: names, in order.
        importances: (features, repeats): measure with the feature shuffled minus `baseline`, or the other
            way round where greater is better: positive for a feature that the model relies on.
        importances_mean, importances_std: over repeats (of the population, as scikit-learn's).
        baseline: the measure of the data as they are.
        measure: its name.
        rows: of all ranks.
    """

    features: list[str]
    importances: npt.NDArray[np.float64]
    baseline: float
    measure: str
    rows: int

    @property
    def importances_mean(self) -> npt.NDArray[np.float64]:
        """The mean over repeats."""
        return np.asarray(self.importances.mean(axis=1))

    @property
    def importances_std(self) -> npt.NDArray[np.float64]:
        """The standard deviation over repeats."""
        return np.asarray(self.importances.std(axis=1))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "features": list(self.features),
            "importances": self.importances.tolist(),
            "importances_mean": self.importances_mean.tolist(),
            "importances_std": self.importances_std.tolist(),
            "baseline": self.baseline,
            "measure": self.measure,
            "rows": self.rows,
        }

    def table(self, most: int | None = None) -> tuple[list[str], list[list[str]]]:
        """Return columns and rows as text, the most important feature first."""
        order = np.argsort(-self.importances_mean, kind="stable")[:most]
        means, deviations = self.importances_mean, self.importances_std
        rows = [[self.features[i], f"{means[i]:.4g}", f"{deviations[i]:.2g}"] for i in order]
        return ["feature", f"change of {self.measure}", "std"], rows

    def __str__(self) -> str:
        """Return the table as text."""
        return f"{self.measure} {self.baseline:.6g} of {self.rows} rows\n{text_table(*self.table())}"


def groups_of(features: Any, count: int, names: list[str] | None) -> tuple[list[str], list[list[int]]]:
    """Return the names and the columns of what is permuted together.

    Raises:
        ConfigError: a column that is not there.
    """
    names = names or [f"x{i}" for i in range(count)]

    def column(given: Any) -> int:
        if isinstance(given, str):
            if given not in names:
                raise ConfigError(f"features: {given!r} is none of {', '.join(names)}")
            return names.index(given)
        number = check_int("a column of features=", given, 0)
        if number >= count:
            raise ConfigError(f"features: column {number} is not one of the {count} there are")
        return number

    if features is None:
        features = list(range(count))
    if isinstance(features, Mapping):
        labels = [str(label) for label in features]
        features = list(features.values())
    else:
        labels = []
    columns = [
        [column(one)] if isinstance(one, int | np.integer | str) else [column(c) for c in one]
        for one in features
    ]
    if not columns or not all(columns):
        raise ConfigError("features= must name at least one column, and each group at least one")
    return labels or [" + ".join(names[c] for c in group) for group in columns], columns


def shuffles(rows: int, repeats: int, seed: int, mine: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return, per repeat, the row each of `mine` takes its value from: scikit-learn's for that seed.

    Its ``permutation_importance(random_state=seed)`` draws one seed for all features, and shuffles what
    the repeat before has shuffled.
    """
    drawn = np.random.RandomState(seed).randint(np.iinfo(np.int32).max + 1)
    random = np.random.RandomState(drawn)
    order, taken = np.arange(rows), np.arange(rows)
    out = np.empty((repeats, len(mine)), np.int64)
    for repeat in range(repeats):
        random.shuffle(order)
        taken = taken[order]
        out[repeat] = taken[mine]
    return out


def permutation_importance(
    predict: Predict,
    x: Any,
    y: Any,
    *,
    loss: Any,
    weight: Any = None,
    ids: npt.ArrayLike | None = None,
    features: Sequence[Columns] | Mapping[str, Columns] | None = None,
    feature_names: Sequence[str] | None = None,
    greater_is_better: bool | None = None,
    n_repeats: int = 5,
    seed: int = 0,
    batch_size: int | None = None,
    communicator: Communicator | None = None,
) -> PermutationImportance:
    """Return how much worse the model is on all ranks' rows with each feature shuffled over all of them.

    Equal, to rounding, to one process with all rows, in the order of `ids` (of the ranks, without), and
    then to ``sklearn.inspection.permutation_importance(..., random_state=seed)``: the shuffles are the same.

    Source: Breiman 2001; Fisher, Rudin and Dominici 2019 (for any loss, model-agnostic).

    Args:
        predict: ``rows -> predictions``, NumPy arrays; the same model on all ranks.
        x: this rank's rows, ``(rows, features, ...)``, an array or a data frame; may be none.
        y: their targets.
        loss: what the model is judged by; see :func:`hvdloss.explain.measure_of`. The adapters take an
            objective or the name of a loss as well.
        weight: None, or one weight per row (or what the loss takes).
        ids: integers or strings that identify the rows of all ranks, in one process's order; None where ranks
            hold consecutive rows. They make the result independent of which rank has which row.
        features: which columns to permute, by number or name; a group of columns is permuted together:
            ``[0, "age", ["lat", "lon"]]``, or ``{"place": ["lat", "lon"]}``. None for each by itself.
        feature_names: of the columns; None for a data frame's, or x0, x1, ...
        greater_is_better: whether a larger measure is better; None for what is known of it: losses are to
            be small, accuracy, F-scores, precision, recall, AUC and R2 large.
        n_repeats: shuffles of each feature.
        seed: of the shuffles.
        batch_size: rows that `predict` gets at once; None for all of the rank's.
        communicator: the ranks; None for this process alone.

    Raises:
        HvdlossError: on every rank alike, naming the rank: what `predict` or the loss raised; a NaN
            (NonFiniteLossError), a shape or number of features that does not fit (ShapeError), arguments
            that cannot be used (ConfigError) or differ between ranks (AgreementError).

    Collectives: two gathers, and one more per feature. Each carries one feature's values of all rows to all
    ranks: a rank receives its whole data set's features once over the call, and holds one at a time.
    """
    ranks: Communicator = communicator or OneProcess()
    name = "hvdloss.permutation"
    held: dict[str, Any] = {}

    def judged(rows: npt.NDArray[Any]) -> State:
        if not len(rows):
            return ()
        state = held["measure"].of(held["predict"](rows), held["y"], held["weight"])
        return tuple(held["measure"].pack(state))

    def begin() -> RankMessage:
        rows = rows_of("x", x)
        known = names_of(x, feature_names)
        if known is not None and rows.size and len(known) != rows.shape[1]:
            raise ShapeError(f"feature_names are {len(known)}, but x has {rows.shape[1]} features")
        held.update(
            x=rows,
            predict=predictor(
                predict, None if batch_size is None else check_int("batch_size", batch_size, 1)
            ),
            measure=measure_of(loss),
            weight=along("weight", weight, len(rows)),
            y=along("y", y, len(rows)),
        )
        repeats, start = check_int("n_repeats", n_repeats, 1), check_int("seed", seed, 0)
        mine = ids_of(ids, len(rows))
        kind = "counted" if ids is None else {"i": "integers", "U": "strings"}[mine.dtype.kind]
        return RankMessage(
            {
                "rows": len(rows),
                "features": rows.shape[1] if len(rows) else None,
                "settings": [repeats, start, name_of(held["measure"]), greater_is_better],
                "groups": groups_of(features, rows.shape[1], known) if len(rows) else None,
                "ids": kind if len(rows) else None,
            },
            ids=mine,
        )

    messages = exchange_messages(ranks, f"{name}.head", "permutation importance", begin)
    notes = [one.note for one in messages]
    require_equal("[n_repeats, seed, loss, greater_is_better]", [one["settings"] for one in notes])
    require_equal("the number of features of x", [one["features"] for one in notes], but=None)
    found = require_equal("features=, or their names,", [one["groups"] for one in notes], but=None)
    require_equal("the kind of ids=", [one["ids"] for one in notes], but=None)
    counts = [one["rows"] for one in notes]
    total = sum(counts)
    if not total:
        raise ConfigError("x has no rows on any rank: nothing can be permuted")
    labels, groups = found
    counted = not any(len(one["ids"]) for one in messages)
    place = np.arange(total) if counted else where_of([one["ids"] for one in messages])
    start = sum(counts[: ranks.rank])
    rows: npt.NDArray[Any] = held["x"]

    def as_they_are() -> RankMessage:
        return _states([judged(rows)], rows[:, groups[0]] if len(rows) else np.zeros((0, 0)))

    messages = exchange_messages(ranks, name, "judging the rows as they are", as_they_are)
    mine = place[start : start + len(rows)]
    taken = shuffles(total, n_repeats, seed, mine)
    order = np.argsort(place)
    measure = held["measure"]

    def value(messages: Sequence[RankMessage], repeat: int) -> float:
        whole_state: State = measure.zero()
        for one in messages:
            whole_state = measure.merge(whole_state, _state(one, repeat))
        found = measure.finish(whole_state) if whole_state else float("nan")
        found = getattr(found, "value", found)  # of an Estimate
        if np.ndim(found):
            raise ConfigError(f"loss={measure!r} is no single number; choose a metric that is, or an average")
        return float(found)

    baseline = value(messages, 0)
    sign = -1.0 if direction(measure, greater_is_better) else 1.0
    importances = np.empty((len(groups), n_repeats))
    shuffled = rows.copy()
    for number, group in enumerate(groups):
        values = np.concatenate([one["columns"] for one, has in zip(messages, counts, strict=True) if has])
        values = values[order]

        def permuted(number: int = number, group: list[int] = group, values: Any = values) -> RankMessage:
            states = []
            for repeat in range(n_repeats if len(rows) else 0):
                shuffled[:, group] = values[taken[repeat]]
                states.append(judged(shuffled))
            following = groups[number + 1] if number + 1 < len(groups) else []
            if len(rows):
                shuffled[:, group] = rows[:, group]
                columns = rows[:, following]
            else:
                columns = np.zeros((0, 0))
            return _states(states, columns)

        messages = exchange_messages(ranks, name, f"permuting {labels[number]!r}", permuted)
        importances[number] = [sign * (value(messages, repeat) - baseline) for repeat in range(n_repeats)]
    return PermutationImportance(list(labels), importances, baseline, name_of(measure), total)


def _states(states: Sequence[State], columns: npt.NDArray[Any]) -> RankMessage:
    """Return statistics of several repeats, and a feature's values, to be sent."""
    arrays = {
        f"s{repeat}.{part}": array for repeat, state in enumerate(states) for part, array in enumerate(state)
    }
    return RankMessage({"parts": [len(state) for state in states]}, columns=columns, **arrays)


def _state(messages: RankMessage, repeat: int) -> State:
    """Return a rank's statistic of one repeat; empty if it has no rows."""
    parts = messages.note["parts"]
    return tuple(messages[f"s{repeat}.{part}"] for part in range(parts[repeat])) if parts else ()

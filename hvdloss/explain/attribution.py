"""Who drives the loss: its parts by rank, class, group and sample, over all ranks.

The loss is a ratio of sums, so each part's share of the numerator says how much of the loss is due to it.
Sums add up over batches and ranks; the k samples that add most are found by merging k per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss._util.checks import check_int
from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.errors import ConfigError, HvdlossError, RankError, ShapeError
from hvdloss.explain.exchange import RankMessage, exchange_messages, require_equal, text_table
from hvdloss.explain.measures import Array, Elements, effective
from hvdloss.losses.reduction import check_reduction

__all__ = ["Attribution", "AttributionReport", "LossAttribution", "Part", "Sample"]

Label = int | str


@dataclass(frozen=True)
class Part:
    """One rank's, class's or group's part of the loss.

    Attributes:
        label: which one.
        loss: of its own elements; NaN without any.
        weight: sum of its weights (of what the loss divides by).
        elements: number of elements with a weight above 0.
        weighted: sum of weight x loss: what it adds to the numerator.
        share: of all parts' `weighted`; NaN if that is 0.
    """

    label: Label
    loss: float
    weight: float
    elements: int
    weighted: float
    share: float


@dataclass(frozen=True)
class Sample:
    """One sample's part of the loss.

    Attributes:
        id: as given, or its number counted through all ranks.
        rank: that had it.
        label: its class, or None.
        groups: its label in each grouping.
        loss, weight, weighted, share: see :class:`Part`.
    """

    id: Label
    rank: int
    label: Label | None
    groups: Mapping[str, Label]
    loss: float
    weight: float
    weighted: float
    share: float


@dataclass
class _Sums:
    """What one label adds up."""

    weighted: float = 0.0
    weight: float = 0.0
    elements: int = 0

    def add(self, other: _Sums) -> None:
        self.weighted += other.weighted
        self.weight += other.weight
        self.elements += other.elements


@dataclass
class Attribution:
    """A statistic of a loss's parts: ``of`` a batch, ``merge``, and ``finish``.

    Attributes:
        k: number of samples to keep.
        sums: by grouping (``"class"``, ``"group NAME"``) and label.
        total: of all elements.
        samples: the k that add most, as dicts; ties go to the smaller id.
        count: samples seen.
    """

    k: int
    sums: dict[str, dict[Label, _Sums]] = field(default_factory=dict)
    total: _Sums = field(default_factory=_Sums)
    samples: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0

    @classmethod
    def of(
        cls,
        k: int,
        weighted: Array,
        weight: Array,
        ids: npt.NDArray[Any],
        labels: Mapping[str, npt.NDArray[Any]],
    ) -> Attribution:
        """Return the parts of one batch.

        Args:
            k: number of samples to keep.
            weighted, weight: per element, of any one shape whose first axis are the samples.
            ids: one per sample.
            labels: by grouping, per element or per sample; integers or strings.
        """
        present = weight > 0
        out = cls(k, count=len(ids))
        out.total = _Sums(float(weighted.sum()), float(weight.sum()), int(present.sum()))
        for name, given in labels.items():
            each = np.broadcast_to(
                given.reshape(given.shape + (1,) * (weighted.ndim - given.ndim)), weighted.shape
            )
            found, where = np.unique(each[present], return_inverse=True)
            adds = [np.bincount(where.ravel(), x[present], len(found)) for x in (weighted, weight)]
            counts = np.bincount(where.ravel(), minlength=len(found))
            out.sums[name] = {
                label: _Sums(float(a), float(b), int(c))
                for label, a, b, c in zip(found.tolist(), *adds, counts, strict=True)
            }
        axes = tuple(range(1, weighted.ndim))
        values, weights = weighted.sum(axis=axes), weight.sum(axis=axes)
        chosen = np.lexsort((ids, -values))
        chosen = chosen[weights[chosen] > 0][:k]
        per_sample = {name: given for name, given in labels.items() if given.ndim == 1}
        for i in chosen.tolist():
            out.samples.append(
                {
                    "id": ids[i].item(),
                    "weighted": float(values[i]),
                    "weight": float(weights[i]),
                    "labels": {name: given[i].item() for name, given in per_sample.items()},
                }
            )
        return out

    def merge(self, other: Attribution) -> Attribution:
        """Return the parts of both; associative, and commutative to rounding."""
        out = Attribution(self.k, count=self.count + other.count)
        for one in (self, other):
            out.total.add(one.total)
            for name, parts in one.sums.items():
                mine = out.sums.setdefault(name, {})
                for label, part in parts.items():
                    mine.setdefault(label, _Sums()).add(part)
        both = [*self.samples, *other.samples]
        out.samples = sorted(both, key=lambda one: (-one["weighted"], one["id"]))[: self.k]
        return out

    def note(self) -> dict[str, Any]:
        """Return it as JSON values; JSON has no integers as keys."""
        sums = {
            name: [[label, *asdict(part).values()] for label, part in parts.items()]
            for name, parts in self.sums.items()
        }
        return {
            "k": self.k,
            "sums": sums,
            "total": list(asdict(self.total).values()),
            "samples": self.samples,
            "count": self.count,
        }

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> Attribution:
        """Return what :meth:`note` wrote."""
        sums = {name: {label: _Sums(*rest) for label, *rest in parts} for name, parts in note["sums"].items()}
        return cls(note["k"], sums, _Sums(*note["total"]), note["samples"], note["count"])


@dataclass(frozen=True)
class AttributionReport:
    """The parts of the loss of all ranks; equal on every rank.

    Attributes:
        loss: of all elements.
        weight: sum of all weights.
        elements: number with a weight above 0.
        ranks, classes: one part each; `classes` is empty where no classes are known.
        groups: by grouping, its parts; the largest share first.
        hardest: the samples that add most to the loss, the first of them first.
    """

    loss: float
    weight: float
    elements: int
    ranks: list[Part]
    classes: list[Part]
    groups: dict[str, list[Part]]
    hardest: list[Sample]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON: NaN becomes None."""
        plain = _without_nan(asdict(self))
        assert isinstance(plain, dict)
        return plain

    def tables(self) -> dict[str, tuple[list[str], list[list[str]]]]:
        """Return columns and rows of each table, as text, by title."""
        out: dict[str, tuple[list[str], list[list[str]]]] = {}
        for title, parts in (("rank", self.ranks), ("class", self.classes), *self.groups.items()):
            if parts:
                columns = [title, "share of loss", "loss", "share of weight", "elements"]
                out[f"By {title}"] = (
                    columns,
                    [
                        [
                            str(one.label),
                            f"{one.share:.1%}",
                            f"{one.loss:.4g}",
                            f"{one.weight / self.weight if self.weight else float('nan'):.1%}",
                            str(one.elements),
                        ]
                        for one in parts
                    ],
                )
        if self.hardest:
            groups = sorted({name for one in self.hardest for name in one.groups})
            columns = ["sample", "share of loss", "loss", "weight", "rank", "class", *groups]
            out["Hardest samples"] = (
                columns,
                [
                    [
                        str(one.id),
                        f"{one.share:.2%}",
                        f"{one.loss:.4g}",
                        f"{one.weight:.4g}",
                        str(one.rank),
                        "" if one.label is None else str(one.label),
                        *(str(one.groups.get(name, "")) for name in groups),
                    ]
                    for one in self.hardest
                ],
            )
        return out

    def __str__(self) -> str:
        """Return all tables as text."""
        parts = [f"Loss {self.loss:.6g} of {self.elements} elements, weight {self.weight:.6g}"]
        parts += [f"{title}\n{text_table(*table)}" for title, table in self.tables().items()]
        return "\n\n".join(parts)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


class LossAttribution:
    """Shares of the total weighted loss by rank, class, group and sample, over all ranks.

    Fed with batches, on each rank its own and any number of them, it keeps sums per label and k samples,
    and no data. :meth:`compute` gives every rank what one process would find that saw all batches.

    Args:
        elements: ``(prediction, target, weight) -> (losses, weights)`` of NumPy arrays; the adapters take
            an objective, or the name of a loss, instead.
        classes: the classes' names, by number, or how many there are; those never seen are listed too.
            None to list those that are seen. False to have no classes.
        k: number of hardest samples to keep.
        reduction: see :mod:`hvdloss.losses.reduction`.
        communicator: the ranks; None for this process alone.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(
        self,
        elements: Elements,
        *,
        classes: int | Sequence[str] | bool | None = None,
        k: int = 10,
        reduction: str = "mean",
        communicator: Communicator | None = None,
    ) -> None:
        if not callable(elements):
            raise ConfigError(
                f"loss={elements!r} is no function (prediction, target, weight) -> (losses, weights)"
            )
        self.elements, self.k = elements, check_int("k", k, 0)
        self.reduction = check_reduction(reduction)
        self.classes: list[Label] | None = None
        self.with_classes = classes is not False
        if isinstance(classes, int) and not isinstance(classes, bool):
            self.classes = list(range(check_int("classes", classes, 1)))
        elif classes is not None and not isinstance(classes, bool):
            self.classes = [str(name) for name in classes]
        self.communicator: Communicator = communicator or OneProcess()
        self.reset()

    def reset(self) -> None:
        """Drop all batches."""
        self.state = Attribution(self.k)
        self._fault: HvdlossError | None = None
        self._ids: str | None = None  # what tells samples apart, once there are some
        self._batches = 0

    def update(
        self,
        prediction: Any,
        target: Any,
        weight: Any = None,
        *,
        ids: npt.ArrayLike | None = None,
        groups: npt.ArrayLike | Mapping[str, npt.ArrayLike] | None = None,
        labels: npt.ArrayLike | None = None,
    ) -> None:
        """Add a batch of this rank's; it may be empty.

        What is wrong with a batch (a shape, a NaN loss, a negative weight, an exception of the loss) is
        raised by :meth:`compute`, on every rank: raised here the other ranks would wait for this one.

        Args:
            prediction, target, weight: as the objective takes them.
            ids: one integer or string per sample, in every batch of all ranks or in none; None to count
                the samples through all ranks.
            groups: a label per sample or per element (integers or strings), or several groupings by name.
            labels: the class of each sample or element; None to take integer targets.

        Collectives: none.
        """
        self.add(lambda: prediction, target, weight, ids=ids, groups=groups, labels=labels)

    def add(
        self,
        predict: Callable[[], Any],
        target: Any,
        weight: Any = None,
        *,
        ids: npt.ArrayLike | None = None,
        groups: npt.ArrayLike | Mapping[str, npt.ArrayLike] | None = None,
        labels: npt.ArrayLike | None = None,
    ) -> None:
        """Add a batch whose prediction is made here, so that its exceptions are raised on all ranks too.

        Args:
            predict: returns the prediction.
            target, weight, ids, groups, labels: see :meth:`update`.
        """
        if self._fault is not None:
            return
        self._batches += 1
        try:
            self._add(predict(), target, weight, ids, groups, labels)
        except HvdlossError as error:
            self._fault = type(error)(f"batch {self._batches}: {error}")
            self._fault.__cause__ = error
        except Exception as error:
            self._fault = RankError(f"batch {self._batches}: {type(error).__name__}: {error}")
            self._fault.__cause__ = error

    def _add(self, prediction: Any, target: Any, weight: Any, ids: Any, groups: Any, labels: Any) -> None:
        losses, weights = self.elements(prediction, target, weight)
        losses, weights = np.asarray(losses, np.float64), np.asarray(weights, np.float64)
        if not losses.ndim:
            losses, weights = losses.reshape(1), weights.reshape(1)
        count = len(losses)
        weighted, weights = effective(losses, weights, self.reduction)
        if self.with_classes and labels is None:
            labels = self._labels(target, losses.shape)
        found: dict[str, npt.NDArray[Any]] = {}
        if labels is not None and self.with_classes:
            found["class"] = _fitting("labels", labels, losses.shape)
        if groups is not None:
            named = groups if isinstance(groups, Mapping) else {"group": groups}
            found.update(
                {f"group {name}": _fitting(f"groups {name!r}", g, losses.shape) for name, g in named.items()}
            )
        known = np.arange(count) + self.state.count if ids is None else label_array("ids", ids)
        if known.shape != (count,):
            raise ShapeError(f"ids of shape {known.shape} must be one per sample, of {count}")
        if count:
            kind = "counted" if ids is None else {"i": "integers", "U": "strings"}[known.dtype.kind]
            if self._ids not in (None, kind):
                raise ConfigError(
                    f"ids= are {kind} in this batch, but were {self._ids} before; give the same with every "
                    f"batch, or none at all"
                )
            self._ids = kind
        self.state = self.state.merge(Attribution.of(self.k, weighted, weights, known, found))

    def _labels(self, target: Any, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
        """Return the classes in the targets, if any."""
        return class_labels(target, shape)

    def compute(self) -> AttributionReport:
        """Return the parts of the loss of all batches of all ranks; every rank must call it.

        Raises:
            HvdlossError: on every rank alike, naming the rank: what was wrong with a batch (WeightError,
                NonFiniteLossError, ShapeError, ConfigError), or settings that differ.

        Collectives: one gather: some 24 bytes per label and 100 per sample kept.
        """

        def mine() -> RankMessage:
            if self._fault is not None:
                raise self._fault
            settings = [self.k, self.reduction, self.classes]
            return RankMessage({**self.state.note(), "ids": self._ids, "settings": settings})

        notes = [
            one.note
            for one in exchange_messages(self.communicator, "hvdloss.attribution", "loss attribution", mine)
        ]
        require_equal("LossAttribution's k, reduction and classes", [note["settings"] for note in notes])
        require_equal("the kind of ids=", [note["ids"] for note in notes], but=None)
        whole_state, offset = Attribution(self.k), 0
        owners: list[_Sums] = []
        for rank, note in enumerate(notes):
            for one in note["samples"]:
                one["rank"] = rank
                if note["ids"] == "counted":
                    one["id"] += offset
            offset += note["count"]
            state = Attribution.from_note(note)
            owners.append(state.total)
            whole_state = whole_state.merge(state)
        return self._finish(whole_state, owners)

    def _finish(self, state: Attribution, owners: list[_Sums]) -> AttributionReport:
        total = state.total

        def part(label: Label, sums: _Sums) -> Part:
            below = 1.0 if self.reduction == "sum" else sums.weight
            return Part(
                label,
                sums.weighted / below if sums.weight else float("nan"),
                sums.weight,
                sums.elements,
                sums.weighted,
                sums.weighted / total.weighted if total.weighted else float("nan"),
            )

        classes = dict(state.sums.get("class", {}))
        if self.classes is not None:
            for number in range(len(self.classes)):
                classes.setdefault(number, _Sums())
        groups = {
            name.removeprefix("group "): sorted(
                (part(label, sums) for label, sums in parts.items()),
                key=lambda one: (-one.weighted, str(one.label)),
            )
            for name, parts in sorted(state.sums.items())
            if name != "class"
        }
        overall = part("all", total)
        hardest = []
        for one in state.samples:
            label = one["labels"].pop("class", None)
            sums = _Sums(one["weighted"], one["weight"])
            of = part(one["id"], sums)
            hardest.append(
                Sample(
                    one["id"],
                    one["rank"],
                    None if label is None else self._name(label),
                    {name.removeprefix("group "): value for name, value in one["labels"].items()},
                    of.loss,
                    of.weight,
                    of.weighted,
                    of.share,
                )
            )
        return AttributionReport(
            overall.loss,
            overall.weight,
            overall.elements,
            [part(rank, sums) for rank, sums in enumerate(owners)],
            [part(self._name(label), sums) for label, sums in sorted(classes.items(), key=_order)],
            groups,
            hardest,
        )

    def _name(self, label: Label) -> Label:
        """Return the name of a class number."""
        named = self.classes is not None and isinstance(label, int) and 0 <= label < len(self.classes)
        return self.classes[label] if named else label  # type: ignore[index]


def _order(item: tuple[Label, Any]) -> tuple[int, Label]:
    """Sort numbers before strings."""
    return (isinstance(item[0], str), item[0])


def class_labels(target: Any, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """Return the class numbers in the targets: integers, of the losses' shape; else None."""
    try:
        t = np.asarray(target)
    except Exception:  # a structure of tensors: no classes
        return None
    if t.ndim == len(shape) + 1 and t.shape[-1] == 1:
        t = t[..., 0]
    return t if t.dtype.kind in "iub" and t.shape == shape else None


def label_array(what: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return labels as int64 or strings.

    Raises:
        ConfigError: they are neither.
    """
    given = np.asarray(values)
    if given.dtype.kind == "O" and all(isinstance(one, str) for one in given.ravel()):
        given = given.astype(str)
    if given.dtype.kind == "f" and (given == np.floor(given)).all():
        given = given.astype(np.int64)
    if given.dtype.kind in "iub":
        return given.astype(np.int64)
    if given.dtype.kind == "U":
        return given
    raise ConfigError(f"{what} of dtype {given.dtype} must be integers or strings")


def _fitting(what: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return labels, one per element or per sample.

    Raises:
        ShapeError: they are neither.
    """
    given = label_array(what, values)
    if given.shape not in (shape, shape[:1]):
        raise ShapeError(
            f"{what} of shape {given.shape} must be one per sample, {shape[:1]}, or per element, {shape}"
        )
    return given

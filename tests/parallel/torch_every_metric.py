"""Every metric of torchmetrics over ranks that made 4 + 1 and 5 + 0 updates is that of one process."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchmetrics
from torch_support import before_case, raises_everywhere

import hvdloss.torch as hvd
from hvdloss.errors import AgreementError, ConfigError
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3")

__all__ = ["before_case"]

warnings.filterwarnings("ignore", module="torchmetrics")
warnings.filterwarnings("ignore", module="hvdloss.torch.integrations.metrics")

UPDATES = 5
SPLITS = ([4, 1], [0, 5], [5, 0])  # of the first and the last rank
Arguments = Callable[[torch.Generator], tuple[Any, ...]]

#: By part of the package: arguments of an update, for those without a row of their own.
ROOMS: dict[str, Arguments | None] = {
    "aggregation": lambda g: (torch.rand(4, generator=g),),
    "audio": lambda g: pair(g, 3, 2, 50),
    "classification": None,
    "clustering": lambda g: (labels(g, 9), labels(g, 9)),
    "detection": lambda g: (panoptic(g), panoptic(g)),
    "image": lambda g: pair(g, 2, 3, 48, 48),
    "multimodal": lambda g: pair(g, 6, 10, 3),
    "nominal": lambda g: (labels(g, 9), labels(g, 9)),
    "regression": lambda g: pair(g, 6),
    "retrieval": lambda g: (
        torch.rand(8, generator=g),
        *(torch.randint(0, 2, (8,), generator=g) for _ in "ab"),
    ),
    "segmentation": lambda g: tuple(torch.randint(0, 2, (2, 3, 8, 8), generator=g) for _ in "ab"),
    "shape": lambda g: pair(g, 2, 10, 3),
    "text": lambda g: (sentences(g), sentences(g)),
}

#: Required arguments, by name; and those that choose what is tried.
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("num_classes", "num_labels"), 3),
    **dict.fromkeys(("min_recall", "min_precision", "min_specificity", "min_sensitivity", "threshold"), 0.5),
    **{"beta": 2.0, "num_groups": 2, "p": 3, "data_range": 1.0, "things": {0, 1}, "stuffs": {2, 3}},
    **{"mouth_map": [0, 2, 5], "validate_args": True},
}

#: Arguments of the constructor and of an update, where they are not those of the room.
ROWS: dict[str, tuple[dict[str, Any], Arguments | None]] = {
    "CalinskiHarabaszScore": ({}, lambda g: (torch.rand(9, 4, generator=g), labels(g, 9))),
    "ComplexScaleInvariantSignalNoiseRatio": ({}, lambda g: pair(g, 1, 9, 20, 2)),
    "ContinuousRankedProbabilityScore": (
        {},
        lambda g: (torch.rand(6, 3, generator=g), torch.rand(6, generator=g)),
    ),
    "CosineSimilarity": ({}, lambda g: pair(g, 6, 4)),
    "DaviesBouldinScore": ({}, lambda g: (torch.rand(9, 4, generator=g), labels(g, 9))),
    "DunnIndex": ({}, lambda g: (torch.rand(9, 4, generator=g), labels(g, 9))),
    "EditDistance": ({}, lambda g: (sentences(g), sentences(g))),
    "FleissKappa": (
        {},
        lambda g: (torch.full((4, 3), 2) + torch.tensor([[1, -1, 0]]) * labels(g, 4)[:, None],),
    ),
    "JensenShannonDivergence": ({}, lambda g: tuple(t.softmax(1) for t in pair(g, 6, 3))),
    "KLDivergence": ({}, lambda g: tuple(t.softmax(1) for t in pair(g, 6, 3))),
    "MultiScaleStructuralSimilarityIndexMeasure": (
        {"kernel_size": 3, "betas": (0.5, 0.5), "data_range": 1.0},
        None,
    ),
    "PeakSignalNoiseRatioWithBlockedEffect": ({}, lambda g: pair(g, 2, 1, 16, 16)),
    "Perplexity": (
        {},
        lambda g: (torch.rand(2, 8, 5, generator=g), torch.randint(0, 5, (2, 8), generator=g)),
    ),
    "PermutationInvariantTraining": (
        {"metric_func": torchmetrics.functional.scale_invariant_signal_noise_ratio},
        None,
    ),
    "QualityWithNoReference": ({}, lambda g: pan(g)),
    "SpatialDistortionIndex": ({}, lambda g: pan(g)),
    "BLEUScore": ({}, lambda g: references(g)),
    "CHRFScore": ({}, lambda g: references(g)),
    "SacreBLEUScore": ({}, lambda g: references(g)),
    "TranslationEditRate": ({}, lambda g: references(g)),
    "ExtendedEditDistance": ({}, lambda g: references(g)),
    "SQuAD": ({}, lambda g: squad(g)),
    "TotalVariation": ({}, lambda g: (torch.rand(2, 3, 8, 8, generator=g),)),
    "BinaryFairness": ({}, lambda g: (*binary(g), torch.arange(8) % 2)),
    "BinaryGroupStatRates": ({}, lambda g: (*binary(g), torch.arange(8) % 2)),
    "MulticlassExactMatch": ({}, lambda g: tuple(torch.randint(0, 3, (6, 4), generator=g) for _ in "ab")),
}

#: Not tried, and why.
LEFT_OUT = {
    "BERTScore": "downloads a language model, where transformers is installed",
    "CLIPImageQualityAssessment": "downloads a model, where transformers is installed",
    "CLIPScore": "downloads a model, where transformers is installed",
    "InfoLM": "downloads a language model, where transformers is installed",
    "BaseAggregator": "a base class",
    "BootStrapper": "draws samples anew, on every rank other ones",
    "ClusterAccuracy": "needs aeon",
    "DeepImageStructureAndTextureSimilarity": "downloads a network",
    "MemorizationInformedFrechetInceptionDistance": "needs torch-fidelity and its download",
    "ROUGEScore": "needs nltk and its data",
    "Running": "refused, see below",
    "RunningMean": "refused, see below",
    "RunningSum": "refused, see below",
}


def pair(g: torch.Generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(shape, generator=g) + 0.05, torch.rand(shape, generator=g) + 0.05


def labels(g: torch.Generator, n: int) -> torch.Tensor:
    return torch.cat([torch.arange(3), torch.randint(0, 3, (n - 3,), generator=g)])[
        torch.randperm(n, generator=g)
    ]


def binary(g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(8, generator=g), torch.randint(0, 2, (8,), generator=g)


def panoptic(g: torch.Generator) -> torch.Tensor:
    return torch.stack([torch.randint(0, 4, (1, 6, 6), generator=g), torch.zeros(1, 6, 6).long()], -1)


def pan(g: torch.Generator) -> tuple[Any, ...]:
    small = torch.rand(2, 3, 16, 16, generator=g)
    large, lower = torch.rand(2, 3, 32, 32, generator=g), torch.rand(2, 3, 16, 16, generator=g)
    return torch.rand(2, 3, 32, 32, generator=g), {"ms": small, "pan": large, "pan_lr": lower}


def sentences(g: torch.Generator) -> list[str]:
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "by", "mat", "hill"]
    return [
        " ".join(words[i] for i in torch.randint(0, len(words), (6,), generator=g).tolist()) for _ in range(3)
    ]


def references(g: torch.Generator) -> tuple[list[str], list[list[str]]]:
    return sentences(g), [[one] for one in sentences(g)]


def squad(g: torch.Generator) -> tuple[Any, ...]:
    told, right = sentences(g), sentences(g)
    return (
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(told)],
        [{"answers": {"answer_start": [0], "text": [text]}, "id": str(i)} for i, text in enumerate(right)],
    )


def classification(name: str) -> Arguments:
    def arguments(g: torch.Generator) -> tuple[Any, ...]:
        if name.startswith("Binary"):
            return binary(g)
        scores = torch.rand(8, 3, generator=g)
        if name.startswith("Multilabel"):
            return scores, torch.randint(0, 2, (8, 3), generator=g)
        return scores.softmax(1), labels(g, 8)

    return arguments


def metrics() -> Iterator[tuple[str, Callable[[], Any], Arguments]]:
    """Give every class of torchmetrics: its name, what makes one, and what makes arguments of an update."""
    seen = set()
    for room, common in ROOMS.items():
        module = importlib.import_module(f"torchmetrics.{room}")
        for name, kind in sorted(vars(module).items()):
            if not (inspect.isclass(kind) and issubclass(kind, torchmetrics.Metric)) or kind in seen:
                continue
            seen.add(kind)
            of_a_task = "__new__" in vars(kind)  # makes one of the classes below
            if name in LEFT_OUT or of_a_task or kind is torchmetrics.Metric:
                continue
            more, arguments = ROWS.get(name, ({}, None))
            required = {
                p.name: SETTINGS[p.name]
                for p in inspect.signature(kind).parameters.values()
                if p.name in SETTINGS and (p.default is p.empty or p.name == "num_classes")
            }
            made = {**required, **more}
            yield name, lambda kind=kind, made=made: kind(**made), arguments or common or classification(name)


def variants() -> Iterator[tuple[str, Callable[[], Any], Arguments]]:
    """Give what a class does otherwise with other arguments, and metrics around metrics."""
    tm = torchmetrics
    several = tm.regression.PearsonCorrCoef
    yield "CosineSimilarity, each", lambda: tm.CosineSimilarity("none"), lambda g: pair(g, 6, 4)
    yield "PearsonCorrCoef, outputs", lambda: several(num_outputs=3), lambda g: pair(g, 6, 3)
    yield "MeanSquaredError, outputs", lambda: tm.MeanSquaredError(num_outputs=3), lambda g: pair(g, 6, 3)
    yield "R2Score, outputs", lambda: tm.R2Score(multioutput="raw_values"), lambda g: pair(g, 6, 3)
    yield "ExplainedVariance, outputs", lambda: tm.ExplainedVariance("raw_values"), lambda g: pair(g, 6, 3)
    yield "SpearmanCorrCoef, outputs", lambda: tm.SpearmanCorrCoef(num_outputs=3), lambda g: pair(g, 6, 3)
    binned = tm.classification.MulticlassPrecisionRecallCurve
    yield "PrecisionRecallCurve, binned", lambda: binned(3, thresholds=7), classification("Multiclass")
    samplewise = tm.classification.MulticlassStatScores
    yield (
        "StatScores, samplewise",
        lambda: samplewise(3, multidim_average="samplewise", average=None),
        lambda g: tuple(torch.randint(0, 3, (6, 4), generator=g) for _ in "ab"),
    )
    accuracy = tm.classification.MulticlassAccuracy
    yield (
        "ClasswiseWrapper",
        lambda: tm.ClasswiseWrapper(accuracy(3, average=None)),
        classification("Multiclass"),
    )
    yield "MinMaxMetric", lambda: tm.MinMaxMetric(accuracy(3)), classification("Multiclass")
    yield "MultioutputWrapper", lambda: tm.MultioutputWrapper(tm.R2Score(), 3), lambda g: pair(g, 6, 3)
    yield "a sum of metrics", lambda: tm.MeanAbsoluteError() + 2 * tm.MeanSquaredError(), lambda g: pair(g, 6)
    yield (
        "MultitaskWrapper",
        lambda: tm.MultitaskWrapper({"a": tm.MeanSquaredError(), "b": tm.SpearmanCorrCoef()}),
        lambda g: tuple({"a": torch.rand(6, generator=g), "b": torch.rand(6, generator=g)} for _ in "ab"),
    )
    yield (
        "MetricCollection",
        lambda: tm.MetricCollection(
            [accuracy(3), tm.classification.MulticlassF1Score(3), tm.classification.MulticlassAUROC(3)]
        ),
        classification("Multiclass"),
    )


def flat(value: Any) -> list[float]:
    """Return a metric's value as numbers."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().flatten().tolist()
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    return [x for one in value for x in flat(one)] if isinstance(value, list | tuple) else [float(value)]


def alone(make: Callable[[], Any], batches: list[Any]) -> list[float]:
    """Return the value of one process that makes all updates."""
    torch.manual_seed(0)
    one = make()
    for batch in batches:
        one.update(*batch)
    return flat(one.compute())


def error_of(make: Callable[[], Any], batches: list[Any], right: list[float], split: list[int]) -> float:
    """Return the largest difference from one process that made all updates, in rank order."""
    counts = [split[0], *[0] * (hvd.size() - 2), split[1]] if hvd.size() > 1 else [UPDATES]
    start = sum(counts[: hvd.rank()])
    torch.manual_seed(0)
    ours = hvd.synchronized(make())
    for batch in batches[start : start + counts[hvd.rank()]]:
        ours.update(*batch)
    got = flat(ours.compute())
    assert len(got) == len(right), (got, right)
    same = [a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(got, right, strict=True)]
    gaps = [abs(a - b) / max(1.0, abs(b)) for a, b, alike in zip(got, right, same, strict=True) if not alike]
    return max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)


def case_every_metric_equals_one_process():
    tried, worst, failed = 0, 0.0, []
    for name, make, arguments in [*metrics(), *variants()]:
        tried += 1
        g = torch.Generator().manual_seed(11)
        batches = [arguments(g) for _ in range(UPDATES)]
        right = alone(make, batches)
        for split in SPLITS:
            error = error_of(make, batches, right, split)
            worst = max(worst, error)
            if error > 1e-5:  # torchmetrics keeps states in float32
                failed.append(f"{name}, {split}: {error:.3g}")
    assert not failed, "\n".join(failed)
    assert tried > 180, tried
    return {"metrics": tried, "error": worst}


class Seen(torchmetrics.Metric):
    """A metric whose state is a list of numbers that it says nothing of, and of other things."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", default=[], dist_reduce_fx=None)
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, x: torch.Tensor) -> None:
        self.seen.extend(x.unbind(0))
        self.total = (
            self.total + x.reshape(-1, 2).sum(0) if len(x) else self.total
        )  # of another shape from here

    def compute(self) -> Any:
        return torch.stack([one.reshape(()) for one in self.seen]), self.total


def case_lists_and_shapes_that_an_update_makes():
    x = torch.rand(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parts = [slice(0, 8), slice(8, 12), *[slice(12, 12)] * 2]
    for order in (parts, parts[1:] + parts[:1]):
        metric = hvd.synchronized(Seen())
        metric.update(x[order[hvd.rank()]])
        seen, total = metric.compute()
        here = torch.cat([x[part] for part in order[: hvd.size()]])
        assert torch.equal(seen, here)
        assert torch.allclose(total, here.reshape(-1, 2).sum(0))
        assert len(metric.seen) == len(x[order[hvd.rank()]])  # its own again


def case_two_validation_sets_are_not_exchanged_for_each_other():
    sets = [hvd.synchronized(torchmetrics.MeanMetric()) for _ in range(2)]
    for number, metric in enumerate(sets):
        metric.update(10.0 * number + hvd.rank())
    order = sets if hvd.rank() == 0 else sets[::-1]
    if hvd.size() > 1:
        raises_everywhere(AgreementError, order[0].compute, "MeanMetric", "rank 1", "same order")
    for number, metric in enumerate(sets):
        assert float(metric.compute()) == 10.0 * number + (hvd.size() - 1) / 2


def case_copies_are_merged_and_a_running_window_is_refused():
    tracker = torchmetrics.MetricTracker(hvd.synchronized(torchmetrics.MeanMetric()), maximize=True)
    for epoch in range(2):
        tracker.increment()  # copies the metric
        tracker.update(epoch + float(hvd.rank()))
        assert float(tracker.compute()) == epoch + (hvd.size() - 1) / 2
    raises_everywhere(
        ConfigError, lambda: hvd.synchronized(torchmetrics.RunningMean(3)), "RunningMean", "window"
    )

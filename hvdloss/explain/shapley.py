"""SHAP values with the shap library, of rows of all ranks, against a background drawn from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss._util.checks import check_int
from hvdloss._util.extras import optional_import
from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.errors import ConfigError
from hvdloss.explain.inputs import Predict, predictor
from hvdloss.explain.rows import Explain, Explained, explain_rows

__all__ = ["EXPLAINERS", "Make", "shap_explanation", "shap_values"]

EXPLAINERS = ("permutation", "kernel", "sampling", "exact")

#: ``(shap, background, evaluations) -> explain``: how an explainer of one's own is made.
Make = Callable[[Any, npt.NDArray[Any], int | None], Explain]


def shap_values(
    predict: Predict,
    x: Any,
    *,
    rows: int | None = None,
    background: int | npt.ArrayLike = 100,
    data: Any = None,
    ids: npt.ArrayLike | None = None,
    data_ids: npt.ArrayLike | None = None,
    weight: Any = None,
    explainer: str | Make = "permutation",
    evaluations: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    feature_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    results: str = "all",
    communicator: Communicator | None = None,
) -> Any:
    """Return SHAP values of rows of all ranks, the work shared evenly over the ranks.

    The background is a uniform sample (a weighted one with `weight`) of all ranks' rows, and every row has
    a seed of its own; both follow from ids and `seed`. So the values are those of one process with all
    rows, however they lie on ranks, and whichever rank explains which.

    Source: Lundberg and Lee 2017; the estimators are those of the shap library.

    Args:
        predict: ``rows -> predictions``, NumPy arrays; the same model on all ranks.
        x: this rank's rows to explain, ``(rows, features)``; may be none, and their numbers may differ.
        rows: explain this number of all ranks' rows, drawn uniformly; None for all of them.
        background: how many rows of all ranks' data features that are "left out" are taken from; or those
            rows themselves, the same on all ranks.
        data: this rank's rows to draw the background from; None for `x`.
        ids: integers or strings that identify the rows of `x` of all ranks; None to count them through the
            ranks, which gives one process's result where ranks hold consecutive rows.
        data_ids: the same of `data`.
        weight: one weight per row of the data, for drawing the background; None for a uniform draw. A row
            of weight zero is never drawn.
        explainer: ``"permutation"``, ``"kernel"``, ``"sampling"`` or ``"exact"`` of shap; the adapters know
            some of their framework. Or a function ``(shap, background, evaluations) -> explain`` with
            ``explain(row, seed) -> {"values": ..., "base": ...}``.
        evaluations: of the model per row and background row; None for shap's own rule (permutation: ten
            permutations, forth and back; kernel: 2 x features + 2048; sampling: 1000).
        seed: of the draws and the explainers.
        batch_size: rows that `predict` gets at once; None for as many as shap asks for.
        feature_names: of the columns; None for a data frame's.
        output_names: of the outputs, where there are several.
        results: ``"all"`` to give every rank all rows' values, by number or (with `rows`) by id; ``"own"``
            to give each rank those of the rows it holds.
        communicator: the ranks; None for this process alone.

    Returns:
        a ``shap.Explanation``: ``values`` (rows, features[, outputs]), ``base_values``, ``data``; and in
        addition ``ids`` of its rows.

    Raises:
        ConfigError: the shap library is not installed (``pip install 'hvdloss[explain]'``); on every rank.
        HvdlossError: on every rank alike, naming the rank: what `predict` or shap raised; a NaN
            (NonFiniteLossError), shapes that do not fit (ShapeError), arguments that cannot be used
            (ConfigError) or differ between ranks (AgreementError).

    Collectives: three gathers: a few numbers; the sample (at most `background` + `rows` rows from each
    rank) and rows that move; the values.
    """
    kind = explainer if isinstance(explainer, str) else getattr(explainer, "__name__", "explainer")

    def make(ground: npt.NDArray[Any], names: list[str] | None) -> Explain:
        shap = optional_import("shap", "explain", "shap_values")
        size = None if batch_size is None else check_int("batch_size", batch_size, 1)
        if evaluations is not None:
            check_int("evaluations", evaluations, 1)
        if callable(explainer):
            return explainer(shap, ground, evaluations)
        return model_agnostic(shap, explainer, predictor(predict, size), ground, evaluations)

    done = explain_rows(
        communicator or OneProcess(),
        "hvdloss.shap",
        make,
        x,
        rows=rows,
        background=background,
        data=data,
        ids=ids,
        data_ids=data_ids,
        weight=weight,
        seed=seed,
        feature_names=feature_names,
        results=results,
        settings=[kind, evaluations],
    )
    return shap_explanation(done, output_names)


def model_agnostic(
    shap: Any, kind: str, predict: Predict, background: npt.NDArray[Any], evaluations: int | None
) -> Explain:
    """Return one of shap's explainers that only ask for predictions, for one row at a time.

    Raises:
        ConfigError: it is not known.
    """
    if kind not in EXPLAINERS:
        raise ConfigError(f"explainer={kind!r} is not known; choose one of {', '.join(EXPLAINERS)}")
    if kind in ("permutation", "exact"):
        # By default shap cuts a larger background down to 100 rows.
        masker = shap.maskers.Independent(background, max_samples=len(background))
        if kind == "permutation":
            new = shap.PermutationExplainer(predict, masker)
            most: Any = evaluations or 10 * (2 * background.shape[1] + 1)
        else:
            new = shap.ExactExplainer(predict, masker)
            most = evaluations or 100_000

        def by_masks(row: npt.NDArray[Any], seed: int) -> Mapping[str, Any]:
            found = new(row[None], max_evals=most, silent=True)
            return {"values": found.values[0], "base": np.asarray(found.base_values)[0]}

        return by_masks
    if kind == "kernel":
        new = shap.KernelExplainer(predict, background)
        options = {"nsamples": evaluations or "auto", "silent": True}
    else:
        new = shap.SamplingExplainer(predict, background)
        options = {"nsamples": evaluations or 1000, "silent": True}

    def by_samples(row: npt.NDArray[Any], seed: int) -> Mapping[str, Any]:
        values = np.asarray(new.shap_values(row[None], **options))[0]
        return {"values": values, "base": np.asarray(new.expected_value, dtype=np.float64)}

    return by_samples


def shap_explanation(done: Explained, output_names: Sequence[str] | None) -> Any:
    """Return what was found as shap's own class, which its plots take."""
    shap = optional_import("shap", "explain", "shap_values")
    explanation = shap.Explanation(
        values=done.found.get("values", np.zeros((0, *done.background.shape[1:]))),
        base_values=done.found.get("base", np.zeros(0)),
        data=done.rows,
        feature_names=done.names,
        output_names=None if output_names is None else list(output_names),
    )
    explanation.ids = done.ids
    return explanation

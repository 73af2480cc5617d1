"""LIME with the lime library: a linear model around each row, of rows of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss._util.checks import check_int
from hvdloss._util.extras import optional_import
from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.errors import ConfigError, ShapeError
from hvdloss.explain.inputs import Predict, predictor
from hvdloss.explain.rows import Explain, explain_rows

__all__ = ["LimeExplanation", "lime_weights"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LimeExplanation:
    """The linear model around each row.

    Attributes:
        values: (rows, features, outputs): the weights; 0 for features that LIME did not choose. With
            `discretize`, of "the feature lies in the row's own quartile", else of the standardised feature.
        intercepts: (rows, outputs).
        scores: (rows, outputs): R2 of the linear model around the row; low means that it says little.
        data: (rows, features), the rows.
        ids: of the rows.
        feature_names: if anybody knows them.
    """

    values: Array
    intercepts: Array
    scores: Array
    data: npt.NDArray[Any]
    ids: npt.NDArray[Any]
    feature_names: list[str] | None


def lime_weights(
    predict: Predict,
    x: Any,
    *,
    mode: str = "classification",
    rows: int | None = None,
    background: int | npt.ArrayLike = 1000,
    data: Any = None,
    ids: npt.ArrayLike | None = None,
    data_ids: npt.ArrayLike | None = None,
    weight: Any = None,
    num_features: int = 10,
    num_samples: int = 1000,
    discretize: bool = True,
    seed: int = 0,
    batch_size: int | None = None,
    feature_names: Sequence[str] | None = None,
    results: str = "all",
    communicator: Communicator | None = None,
) -> LimeExplanation:
    """Return LIME's local linear models of rows of all ranks, the work shared evenly over the ranks.

    What LIME learns of the data (quartiles, means, deviations) it learns from a fair sample of all ranks'
    rows; sample and seeds follow from ids and `seed`, as in :func:`hvdloss.explain.shap_values`, so that the
    result is that of one process with all rows.

    Source: Ribeiro, Singh and Guestrin 2016; the estimator is the lime library's.

    Args:
        predict: ``rows -> probabilities`` (rows, classes) in mode ``"classification"``, or one number per
            row in mode ``"regression"``; NumPy arrays.
        mode: ``"classification"`` or ``"regression"``.
        background: number of rows of all ranks' data for LIME to learn from; or the rows themselves.
        num_features: maximum number of features of each linear model.
        num_samples: number of points around the row that it is fitted to.
        discretize: explain by quartiles of features, as LIME does by default, instead of their values.
        x, rows, data, ids, data_ids, weight, seed, batch_size, feature_names, results, communicator: see
            :func:`hvdloss.explain.shap_values`.

    Raises:
        ConfigError: the lime library is not installed (``pip install 'hvdloss[explain]'``); on every rank.
        HvdlossError: on every rank alike, as for SHAP values.

    Collectives: three gathers.
    """

    def make(ground: npt.NDArray[Any], names: list[str] | None) -> Explain:
        tabular = optional_import("lime.lime_tabular", "explain", "lime_weights")
        if mode not in ("classification", "regression"):
            raise ConfigError(f'mode={mode!r} must be "classification" or "regression"')
        most, points = check_int("num_features", num_features, 1), check_int("num_samples", num_samples, 2)
        checked = predictor(predict, None if batch_size is None else check_int("batch_size", batch_size, 1))
        explainer = tabular.LimeTabularExplainer(
            ground,
            mode=mode,
            feature_names=names,
            discretize_continuous=bool(discretize),
            random_state=np.random.RandomState(seed % 2**32),
        )

        def explain(row: npt.NDArray[Any], seed: int) -> Mapping[str, Any]:
            seen: dict[bytes, Any] = {}

            def once(x: Any) -> Any:
                """Predict; the same points come again for each output."""
                key = np.ascontiguousarray(x).tobytes()
                if key not in seen:
                    seen[key] = checked(x)
                    if seen[key].ndim != (2 if mode == "classification" else 1):
                        what = "(rows, classes)" if mode == "classification" else "(rows,)"
                        raise ShapeError(
                            f'predict gave an array of shape {seen[key].shape}; mode="{mode}" needs {what}'
                        )
                return seen[key]

            outputs = once(row[None]).shape[-1] if mode == "classification" else 1
            values = np.zeros((len(row), outputs))
            intercepts, scores = np.zeros(outputs), np.zeros(outputs)
            for output in range(outputs):
                explainer.random_state.seed(seed)  # one generator, which all of its parts share
                found = explainer.explain_instance(
                    row, once, labels=(output,), num_features=most, num_samples=points
                )
                label = output if mode == "classification" else 1
                for feature, value in found.local_exp[label]:
                    values[feature, output] = value
                intercepts[output], scores[output] = found.intercept[label], found.score
            return {"values": values, "intercepts": intercepts, "scores": scores}

        return explain

    done = explain_rows(
        communicator or OneProcess(),
        "hvdloss.lime",
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
        settings=[mode, num_features, num_samples, discretize],
    )
    nothing = np.zeros(0)
    return LimeExplanation(
        done.found.get("values", nothing),
        done.found.get("intercepts", nothing),
        done.found.get("scores", nothing),
        done.rows,
        done.ids,
        done.names,
    )

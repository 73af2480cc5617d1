"""What a model of Keras relies on, and who drives its loss, over all ranks (see :mod:`hvdloss.explain`)."""

from __future__ import annotations

from typing import Any

import hvdloss.explain as core
import hvdloss.tensorflow.integrations.explain as below
from hvdloss.keras.losses import Objective
from hvdloss.metrics import Metric
from hvdloss.tensorflow.integrations.explain import lime_weights, predict_function, shap_values

__all__ = ["LossAttribution", "lime_weights", "permutation_importance", "predict_function", "shap_values"]


def _objective(loss: Any) -> Any:
    """Return an objective; functions take their arguments in Keras's order."""
    return loss if hasattr(loss, "per_element") else Objective(loss)


class LossAttribution(below.LossAttribution):
    """Shares of the total weighted loss by rank, class, group and sample, over all ranks.

    See :class:`hvdloss.tensorflow.LossAttribution`; takes an :class:`Objective` of Keras, the name of a loss,
    a loss of Keras without reduction, or a function ``(y_true, y_pred) -> per-element losses``. Batches are
    given as ``update(prediction, target, weight)``.
    """

    @staticmethod
    def _objective(loss: Any) -> Any:
        return _objective(loss)


def permutation_importance(
    model: Any, x: Any, y: Any, *, loss: Any, **options: Any
) -> core.PermutationImportance:
    """Return how much worse a model is on all ranks' rows with each feature shuffled over all of them.

    See :func:`hvdloss.tensorflow.permutation_importance`; `loss` may also be an :class:`Objective` of Keras
    or a loss of Keras without reduction, and functions take ``(y_true, y_pred)``.
    """
    if not (isinstance(loss, Metric) or (isinstance(loss, str) and loss == "accuracy")):
        loss = _objective(loss)
    return below.permutation_importance(model, x, y, loss=loss, **options)

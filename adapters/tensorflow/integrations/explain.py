"""What a TensorFlow model relies on, and who drives its loss, over all ranks (see :mod:`hvdloss.explain`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import hvdloss.explain as core
import tensorflow as tf
from hvdloss.comm.collectives import resolve_group
from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.errors import ConfigError
from hvdloss.losses import SumsLoss
from hvdloss.metrics import Metric
from hvdloss.step.objective import CLASS_LOSSES, LOSSES
from hvdloss.tensorflow._backend import hvd
from hvdloss.tensorflow.objective import Objective
from hvdloss.tensorflow.ops import TensorFlowOps, communicator_of

__all__ = ["LossAttribution", "lime_weights", "permutation_importance", "predict_function", "shap_values"]

_OPS = TensorFlowOps()


def _communicator(process_set: Any, what: str) -> Communicator:
    """Return who exchanges: the members of a process set, or this process before ``hvd.init()``."""
    group, _, size = resolve_group(hvd, process_set, what)
    return communicator_of(group) if size > 1 else OneProcess()


def _is_model(model: Any) -> bool:
    """Return whether this is a model of Keras or a ``tf.Module``."""
    return callable(model) and hasattr(model, "trainable_variables")


def predict_function(
    model: Any, *, output: Callable[[Any], Any] | None = None
) -> Callable[[Any], np.ndarray]:
    """Return a model as a function of NumPy rows, without training behaviour.

    Args:
        model: a model of Keras or a ``tf.Module``; what is neither is taken to be such a function already.
        output: what to do to its output tensor: ``tf.nn.softmax``, say.
    """
    if not _is_model(model):
        return model
    options = {"training": False} if hasattr(model, "compute_dtype") else {}  # Keras's

    def predict(x: Any) -> np.ndarray:
        rows = tf.convert_to_tensor(x)
        dtypes = [tf.as_dtype(v.dtype) for v in model.trainable_variables]
        dtype = next((d for d in dtypes if d.is_floating), tf.float32)
        y = model(tf.cast(rows, dtype) if rows.dtype.is_floating else rows, **options)
        return _array(y if output is None else output(y))

    return predict


def _array(y: Any) -> np.ndarray:
    """Return a tensor as an array; NumPy knows no bfloat16."""
    y = tf.convert_to_tensor(y)
    return (tf.cast(y, tf.float32) if y.dtype in (tf.bfloat16, tf.float16) else y).numpy()


def _objective(loss: Any) -> Any:
    return loss if hasattr(loss, "per_element") else Objective(loss)


def _exact(objective: Any) -> Objective:
    """Return the objective that one of Keras stands on, or itself."""
    return getattr(objective, "_exact", objective)


def _elements(objective: Any) -> Callable[[Any, Any, Any], tuple[np.ndarray, np.ndarray]]:
    """Return an objective's per-element losses of arrays or tensors, as NumPy arrays."""
    name = _exact(objective).name
    named = name in LOSSES and name not in CLASS_LOSSES

    def elements(prediction: Any, target: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
        y, t = tf.convert_to_tensor(prediction), tf.convert_to_tensor(target)
        if named:  # which take one number per element, of one dtype
            if len(y.shape) == len(t.shape) + 1 and y.shape[-1] == 1:
                y = y[..., 0]
            t = tf.cast(t, y.dtype)
        losses, weights = objective.per_element(y, t, weight)
        return _array(losses).astype(np.float64), _array(weights).astype(np.float64)

    return elements


def _measure(loss: Any) -> Metric:
    """Return what a model is judged by; names and functions are the objective's."""
    if isinstance(loss, Metric) or (isinstance(loss, str) and loss == "accuracy"):
        return core.measure_of(loss)
    objective = _objective(loss)
    exact = _exact(objective)
    if isinstance(exact.global_loss, SumsLoss):
        return core.OfSums(exact.global_loss, _OPS, tf.convert_to_tensor)
    exact.check_per_element()
    return core.MeanLoss(_elements(objective), exact.reduction, exact.name)


class LossAttribution(core.LossAttribution):
    """Shares of the total weighted loss by rank, class, group and sample, over all ranks.

    After training, or along with it::

        attribution = hvd.LossAttribution(objective, classes=["benign", "malignant"], k=20)
        for x, y, weight, ids, hospital in batches:
            attribution.update(model(x), y, weight, ids=ids, groups={"hospital": hospital})
        print(attribution.compute())

    Args:
        loss: an :class:`Objective` (its loss and reduction; its terms' weights are left aside), or what an
            objective takes: a name, or a function ``(prediction, target) -> per-element losses``.
        classes, k: see :class:`hvdloss.explain.LossAttribution`.
        process_set: the ranks; None for all.

    Raises:
        ConfigError: a loss without per-element losses (Dice, say), or another unusable argument.
    """

    def __init__(
        self,
        loss: Any,
        *,
        classes: int | Sequence[str] | bool | None = None,
        k: int = 10,
        process_set: Any = None,
    ) -> None:
        objective = self._objective(loss)
        _exact(objective).check_per_element()
        super().__init__(
            _elements(objective),
            classes=classes,
            k=k,
            reduction=_exact(objective).reduction,
            communicator=_communicator(process_set, "LossAttribution"),
        )

    @staticmethod
    def _objective(loss: Any) -> Any:
        return _objective(loss)


def permutation_importance(
    model: Any,
    x: Any,
    y: Any,
    *,
    loss: Any,
    output: Callable[[Any], Any] | None = None,
    process_set: Any = None,
    **options: Any,
) -> core.PermutationImportance:
    """Return how much worse a model is on all ranks' rows with each feature shuffled over all of them.

    Equal to one process's, and to scikit-learn's for the same seed, however rows fall on ranks.

    Args:
        model: a model of Keras, a ``tf.Module``, or a function of NumPy rows; the same on all ranks.
        x, y: this rank's rows and targets, NumPy arrays, tensors or data frames; may be none.
        loss: an ``Objective`` or what one takes (a name, a function, a function of sums), ``"accuracy"``, or
            a metric of :mod:`hvdloss.metrics`.
        output: what to do to a model's output before it is judged.
        process_set: the ranks; None for all.
        options: ``weight``, ``ids``, ``features``, ``feature_names``, ``greater_is_better``,
            ``n_repeats``, ``seed``, ``batch_size`` of :func:`hvdloss.explain.permutation_importance`.

    Raises, Collectives: as there.
    """
    ranks = _communicator(process_set, "permutation_importance")
    function = predict_function(model, output=output)
    return core.permutation_importance(function, x, y, loss=_measure(loss), communicator=ranks, **options)


def shap_values(
    model: Any,
    x: Any,
    *,
    explainer: Any = "permutation",
    output: Callable[[Any], Any] | None = None,
    process_set: Any = None,
    **options: Any,
) -> Any:
    """Return SHAP values of rows of all ranks, a ``shap.Explanation``; the work is shared evenly.

    Args:
        model: a model of Keras, a ``tf.Module``, or a function of NumPy rows; the same on all ranks.
        x: this rank's rows to explain; may be none.
        explainer: see :func:`hvdloss.explain.shap_values`; for models of Keras also ``"gradient"``
            (expected gradients) and ``"deep"`` (DeepLIFT's rules) of shap, in float32, without `output`.
        output: what to do to a model's output before it is explained.
        process_set: the ranks; None for all.
        options: ``rows``, ``background``, ``data``, ``ids``, ``data_ids``, ``weight``, ``evaluations``,
            ``seed``, ``batch_size``, ``feature_names``, ``output_names``, ``results``, as there.

    Raises, Collectives: as there.
    """
    ranks = _communicator(process_set, "shap_values")
    if isinstance(explainer, str) and explainer in ("gradient", "deep"):
        explainer = _of_model(explainer, model, output)
    function = predict_function(model, output=output)
    return core.shap_values(function, x, explainer=explainer, communicator=ranks, **options)


def lime_weights(
    model: Any,
    x: Any,
    *,
    output: Callable[[Any], Any] | None = None,
    process_set: Any = None,
    **options: Any,
) -> core.LimeExplanation:
    """Return LIME's local linear models of rows of all ranks; the work is shared evenly.

    Args:
        model: a model of Keras, a ``tf.Module``, or a function of NumPy rows; the same on all ranks.
        x: this rank's rows to explain; may be none.
        output: what to do to a model's output: to logits, ``tf.nn.softmax``.
        process_set: the ranks; None for all.
        options: of :func:`hvdloss.explain.lime_weights`.

    Raises, Collectives: as there.
    """
    ranks = _communicator(process_set, "lime_weights")
    function = predict_function(model, output=output)
    return core.lime_weights(function, x, communicator=ranks, **options)


def _of_model(kind: str, model: Any, output: Any) -> Any:
    """Return how an explainer of shap that looks into models is made."""

    def make(shap: Any, background: Any, evaluations: int | None) -> Any:
        if not hasattr(model, "compute_dtype") or output is not None or model.compute_dtype != "float32":
            raise ConfigError(
                f'explainer="{kind}" looks into a model: pass a float32 model of Keras, without output='
            )
        ground = np.asarray(background, dtype=np.float32)
        base = _array(model(ground, training=False)).mean(axis=0, dtype=np.float64)
        made = shap.DeepExplainer(model, ground) if kind == "deep" else shap.GradientExplainer(model, ground)

        def explain(row: Any, seed: int) -> Mapping[str, Any]:
            x = np.asarray(row[None], dtype=np.float32)
            if kind == "deep":
                values = made.shap_values(x, check_additivity=False)
            else:
                values = made.shap_values(x, nsamples=evaluations or 200, rseed=seed)
            return {"values": np.asarray(values)[0], "base": base}

        return explain

    make.__name__ = kind
    return make

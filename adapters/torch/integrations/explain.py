"""What a PyTorch model relies on, and who drives its loss, over all ranks (see :mod:`hvdloss.explain`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import hvdloss.explain as core
import torch
from hvdloss.comm.collectives import resolve_group
from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.errors import ConfigError
from hvdloss.losses import SumsLoss
from hvdloss.metrics import Metric
from hvdloss.step.objective import CLASS_LOSSES, LOSSES
from hvdloss.torch._backend import hvd
from hvdloss.torch.objective import Objective
from hvdloss.torch.ops import TorchOps, as_array, communicator_of

__all__ = ["LossAttribution", "lime_weights", "permutation_importance", "predict_function", "shap_values"]

_OPS = TorchOps()


def _communicator(process_set: Any, what: str) -> Communicator:
    """Return who exchanges: the members of a process set, or this process before ``hvd.init()``."""
    group, _, size = resolve_group(hvd, process_set, what)
    return communicator_of(group) if size > 1 else OneProcess()


def _kind(model: torch.nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return what a model computes in, and where."""
    floats = (p for p in model.parameters() if p.is_floating_point())
    first = next(floats, torch.zeros(()))
    return first.dtype, first.device


def predict_function(
    model: torch.nn.Module | Callable[[Any], Any], *, output: Callable[[Any], Any] | None = None
) -> Callable[[Any], np.ndarray]:
    """Return a model as a function of NumPy rows: in eval mode, without gradient.

    Args:
        model: a module; what is no module is taken to be such a function already.
        output: what to do to its output tensor: ``lambda y: y.softmax(-1)``, say.
    """
    if not isinstance(model, torch.nn.Module):
        return model

    def predict(x: Any) -> np.ndarray:
        dtype, device = _kind(model)
        rows = torch.as_tensor(np.asarray(x), device=device)
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                y = model(rows.to(dtype) if rows.is_floating_point() else rows)
                y = y if output is None else output(y)
        finally:
            model.train(training)
        return as_array(y)

    return predict


def _objective(loss: Any) -> Objective:
    return loss if isinstance(loss, Objective) else Objective(loss)


def _elements(objective: Objective) -> Callable[[Any, Any, Any], tuple[np.ndarray, np.ndarray]]:
    """Return an objective's per-element losses of arrays or tensors, as NumPy arrays."""
    named = objective.name in LOSSES and objective.name not in CLASS_LOSSES

    def elements(prediction: Any, target: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
        y = torch.as_tensor(prediction)
        t = torch.as_tensor(target, device=y.device)
        if named:  # which take one number per element, of one dtype
            if y.dim() == t.dim() + 1 and y.shape[-1] == 1:
                y = y[..., 0]
            t = t.to(y.dtype)
        w = None if weight is None else torch.as_tensor(weight, device=y.device)
        losses, weights = objective.per_element(y, t, w)
        return as_array(losses).astype(np.float64), as_array(weights).astype(np.float64)

    return elements


def _measure(loss: Any) -> Metric:
    """Return what a model is judged by; names and functions are the objective's."""
    if isinstance(loss, Metric) or (isinstance(loss, str) and loss == "accuracy"):
        return core.measure_of(loss)
    objective = _objective(loss)
    if isinstance(objective.global_loss, SumsLoss):
        return core.OfSums(objective.global_loss, _OPS, torch.as_tensor)
    objective.check_per_element()
    return core.MeanLoss(_elements(objective), objective.reduction, objective.name)


class LossAttribution(core.LossAttribution):
    """Shares of the total weighted loss by rank, class, group and sample, over all ranks.

    After training, or along with it::

        attribution = hvd.LossAttribution(objective, classes=["benign", "malignant"], k=20)
        for x, y, weight, ids, hospital in loader:
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
        objective = _objective(loss)
        objective.check_per_element()
        super().__init__(
            _elements(objective),
            classes=classes,
            k=k,
            reduction=objective.reduction,
            communicator=_communicator(process_set, "LossAttribution"),
        )

    def _labels(self, target: Any, shape: tuple[int, ...]) -> Any:
        return super()._labels(target.detach().cpu() if isinstance(target, torch.Tensor) else target, shape)


def permutation_importance(
    model: torch.nn.Module | Callable[[Any], Any],
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
        model: a module, or a function of NumPy rows; the same on all ranks.
        x, y: this rank's rows and targets, NumPy arrays, tensors or data frames; may be none.
        loss: an :class:`Objective` or what one takes (a name, a function of tensors, a function of sums),
            ``"accuracy"``, or a metric of :mod:`hvdloss.metrics`.
        output: what to do to a module's output before it is judged.
        process_set: the ranks; None for all.
        options: ``weight``, ``ids``, ``features``, ``feature_names``, ``greater_is_better``,
            ``n_repeats``, ``seed``, ``batch_size`` of :func:`hvdloss.explain.permutation_importance`.

    Raises, Collectives: as there.
    """
    ranks = _communicator(process_set, "permutation_importance")
    function = predict_function(model, output=output)
    return core.permutation_importance(
        function, as_array(x), as_array(y), loss=_measure(loss), communicator=ranks, **_plain_all(options)
    )


def shap_values(
    model: torch.nn.Module | Callable[[Any], Any],
    x: Any,
    *,
    explainer: Any = "permutation",
    output: Callable[[Any], Any] | None = None,
    process_set: Any = None,
    **options: Any,
) -> Any:
    """Return SHAP values of rows of all ranks, a ``shap.Explanation``; the work is shared evenly.

    Args:
        model: a module, or a function of NumPy rows; the same on all ranks.
        x: this rank's rows to explain; may be none.
        explainer: see :func:`hvdloss.explain.shap_values`; for modules also ``"gradient"`` (expected
            gradients) and ``"deep"`` (DeepLIFT's rules) of shap, in float32, without `output`.
        output: what to do to a module's output before it is explained.
        process_set: the ranks; None for all.
        options: ``rows``, ``background``, ``data``, ``ids``, ``data_ids``, ``weight``, ``evaluations``,
            ``seed``, ``batch_size``, ``feature_names``, ``output_names``, ``results``, as there.

    Raises, Collectives: as there.
    """
    ranks = _communicator(process_set, "shap_values")
    if isinstance(explainer, str) and explainer in ("gradient", "deep"):
        explainer = _of_module(explainer, model, output)
    function = predict_function(model, output=output)
    return core.shap_values(
        function, as_array(x), explainer=explainer, communicator=ranks, **_plain_all(options)
    )


def lime_weights(
    model: torch.nn.Module | Callable[[Any], Any],
    x: Any,
    *,
    output: Callable[[Any], Any] | None = None,
    process_set: Any = None,
    **options: Any,
) -> core.LimeExplanation:
    """Return LIME's local linear models of rows of all ranks; the work is shared evenly.

    Args:
        model: a module, or a function of NumPy rows; the same on all ranks.
        x: this rank's rows to explain; may be none.
        output: what to do to a module's output: to logits, ``lambda y: y.softmax(-1)``.
        process_set: the ranks; None for all.
        options: of :func:`hvdloss.explain.lime_weights`.

    Raises, Collectives: as there.
    """
    ranks = _communicator(process_set, "lime_weights")
    function = predict_function(model, output=output)
    return core.lime_weights(function, as_array(x), communicator=ranks, **_plain_all(options))


def _of_module(kind: str, model: Any, output: Any) -> Any:
    """Return how an explainer of shap that looks into modules is made."""

    def make(shap: Any, background: Any, evaluations: int | None) -> Any:
        if not isinstance(model, torch.nn.Module) or output is not None:
            raise ConfigError(
                f'explainer="{kind}" looks into a module: pass the torch.nn.Module itself, without output='
            )
        # A copy: shap puts hooks into it, and makes float32 tensors whatever the model's dtype.
        own = copy.deepcopy(model).float().eval()
        _, device = _kind(own)

        def tensor(x: Any) -> torch.Tensor:
            return torch.as_tensor(np.asarray(x, dtype=np.float32), device=device)

        ground = tensor(background)
        with torch.no_grad():
            base = as_array(own(ground)).mean(axis=0, dtype=np.float64)
        made = shap.DeepExplainer(own, ground) if kind == "deep" else shap.GradientExplainer(own, ground)

        def explain(row: Any, seed: int) -> Mapping[str, Any]:
            if kind == "deep":
                values = made.shap_values(tensor(row[None]), check_additivity=False)
            else:
                values = made.shap_values(tensor(row[None]), nsamples=evaluations or 200, rseed=seed)
            return {"values": np.asarray(values)[0], "base": base}

        return explain

    make.__name__ = kind
    return make


def _plain_all(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: as_array(value) for name, value in options.items()}

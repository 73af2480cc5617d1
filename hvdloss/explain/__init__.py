"""What a trained model relies on, and who drives its loss, computed on all ranks.

NumPy arrays and a :class:`~hvdloss.comm.communicator.Communicator`; ``hvdloss.torch``, ``hvdloss.tensorflow``
and ``hvdloss.keras`` have the same functions for their models, objectives and process sets. SHAP and LIME are
those of their libraries (``pip install 'hvdloss[explain]'``), loaded when they are asked for.
"""

from __future__ import annotations

from hvdloss.explain.attribution import Attribution, AttributionReport, LossAttribution, Part, Sample
from hvdloss.explain.measures import MeanLoss, OfSums, measure_of, per_element
from hvdloss.explain.permutation import PermutationImportance, permutation_importance
from hvdloss.explain.shapley import EXPLAINERS, shap_values
from hvdloss.explain.surrogate import LimeExplanation, lime_weights

__all__ = [
    "EXPLAINERS",
    "Attribution",
    "AttributionReport",
    "LimeExplanation",
    "LossAttribution",
    "MeanLoss",
    "OfSums",
    "Part",
    "PermutationImportance",
    "Sample",
    "lime_weights",
    "measure_of",
    "per_element",
    "permutation_importance",
    "shap_values",
]

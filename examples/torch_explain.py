"""What a trained model relies on, and who drives its loss, over all ranks, in PyTorch.

Data: scikit-learn's breast cancer, 569 samples of 30 features. The ranks hold different numbers of them, and
train one model. Then: the share of the loss by rank, class, tumour size and sample; how much worse the model
is with each feature shuffled over all ranks' samples; SHAP values, the work shared over the ranks. All of it
is what one process with all samples would find.

    hvdloss explain examples/torch_explain.py:subject -np 2     # tables, pictures, numbers
    horovodrun --gloo -np 2 python examples/torch_explain.py    # the functions themselves
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import hvdloss.torch as hvd
from hvdloss.data import Contiguous


def train(x: torch.Tensor, y: torch.Tensor, epochs: int = 60) -> tuple[nn.Module, hvd.Objective]:
    """Train on this rank's samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 8), nn.Tanh(), nn.Linear(8, 2)).double()
    objective = hvd.Objective("cross_entropy")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=1e-3)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), objective)
    for _ in range(epochs):
        optimizer.zero_grad()
        objective(model(x), y).backward()
        optimizer.step()
    return model, objective


def subject() -> dict[str, Any]:
    """Return what there is to explain; `hvdloss explain` calls this on every rank."""
    data = load_breast_cancer()
    x = (data.data - data.data.mean(axis=0)) / data.data.std(axis=0)
    shares = 2.0 ** -np.arange(hvd.size())  # each rank has half as many as the one before
    ids = Contiguous(len(x), shares=shares.tolist()).shards(hvd.size())[hvd.rank()]
    x, y = x[ids], data.target[ids]
    model, objective = train(torch.from_numpy(x), torch.from_numpy(y))
    size = np.array(["small", "medium", "large"])[np.digitize(x[:, 0], [-0.5, 0.5])]
    return {
        "model": model,
        "x": x,
        "y": y,
        "loss": objective,
        "ids": ids,
        "groups": {"tumour size": size},
        "classes": data.target_names,
        "feature_names": data.feature_names,
        "output": lambda logits: logits.softmax(-1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20, help="how many SHAP explains (%(default)s)")
    parser.add_argument("--output", type=Path, help="a file for SHAP's values (.npz)")
    args = parser.parse_args()
    hvd.init()
    s = subject()
    x, y, ids = s["x"], s["y"], s["ids"]

    attribution = hvd.LossAttribution(s["loss"], classes=s["classes"], k=5)
    for part in np.array_split(np.arange(len(x)), 4):  # in batches, as they come
        groups = {name: labels[part] for name, labels in s["groups"].items()}
        logits = s["model"](torch.from_numpy(x[part]))
        attribution.update(logits, torch.from_numpy(y[part]), ids=ids[part], groups=groups)
    report = attribution.compute()
    importance = hvd.permutation_importance(
        s["model"], x, y, loss=s["loss"], ids=ids, feature_names=s["feature_names"]
    )
    shap = hvd.shap_values(
        s["model"], x, rows=args.rows, ids=ids, background=50, explainer="kernel", evaluations=500,
        output=s["output"], feature_names=s["feature_names"],
    )  # fmt: skip
    if hvd.rank() == 0:
        print(report)
        print(f"\n{importance}\n")
        effects = np.abs(shap.values[:, :, 1]).mean(axis=0)
        for feature in np.argsort(-effects)[:5]:
            print(f"{shap.feature_names[feature]:<24} moves the probability by {effects[feature]:.3f}")
        if args.output:
            np.savez(args.output, values=shap.values, base=shap.base_values, ids=shap.ids)


if __name__ == "__main__":
    main()

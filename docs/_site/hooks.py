"""What mkdocs does before it builds: lays the packages out as they are installed, and lists what is public.

`hvdloss.torch` lies in adapters/torch, which setuptools maps; the reference is read from the sources, without
importing a framework, so it needs the same map, out of links. Its pages are made of the modules' `__all__`,
so that a new public name is on them by itself.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = ("torch", "tensorflow", "keras")
INTERNAL = {
    "__version__",
    "callbacks",
    "HorovodGroup",
    "group_of",
    "linear_bound",
}  # said in words, a module, the house's own
_OURS = "All of [Horovod's names](../index.md#horovods-own-names), and these. "

# Pages of the reference: what stands above, and the modules whose `__all__` is on it.
PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "hvdloss": (
        "hvdloss",
        "What all frameworks share. `import hvdloss` imports none of them.",
        ("hvdloss",),
    ),
    "torch": (
        "hvdloss.torch",
        f"{_OURS}The guide is [PyTorch](../torch.md).",
        ("hvdloss.torch", "hvdloss.torch.collectives", "hvdloss.torch.split.base"),
    ),
    "tensorflow": (
        "hvdloss.tensorflow",
        f"{_OURS}The guide is [TensorFlow and Keras 3](../tensorflow.md).",
        ("hvdloss.tensorflow", "hvdloss.tensorflow.collectives"),
    ),
    "keras": (
        "hvdloss.keras",
        f"{_OURS}The guide is [TensorFlow and Keras 3](../tensorflow.md).",
        ("hvdloss.keras", "hvdloss.keras.callbacks"),
    ),
    "losses": (
        "Losses",
        "Losses of all ranks' elements. The guide is [Losses that need every rank](../losses.md).",
        ("hvdloss.losses",),
    ),
    "terms": (
        "Terms and policies",
        "What is measured per rank, and what it decides. The guide is [Terms](../terms.md).",
        (
            "hvdloss.terms",
            "hvdloss.terms.link",
            "hvdloss.terms.policies",
            "hvdloss.terms.policies.log",
            "hvdloss.simulation.model",
        ),
    ),
    "data": (
        "Data",
        "Which rank gets which samples, and files. The guide is [Data on many ranks](../../howto/data.md).",
        ("hvdloss.data",),
    ),
    "split": (
        "Split models",
        "Which rank holds which part of a model, and in which order stages compute. The guide is "
        "[Split models](../../howto/split-models.md).",
        ("hvdloss.split",),
    ),
    "metrics": (
        "Metrics",
        "Of all ranks' samples. The guide is [Metrics](../../howto/metrics.md).",
        ("hvdloss.metrics",),
    ),
    "training": (
        "Training",
        "Decisions that all ranks share, checkpoints, seeds, learning rates. The guides are "
        "[Training decisions](../../howto/training.md) and [Elastic jobs](../../howto/elastic.md).",
        ("hvdloss.train",),
    ),
    "explain": ("Explanations", "The guide is [Explanations](../../howto/explain.md).", ("hvdloss.explain",)),
    "report": (
        "Records and reports",
        "Reports of steps, records of runs, and their readers. The guide is "
        "[Reports of a run](../../howto/report.md).",
        ("hvdloss.report",),
    ),
    "trackers": (
        "Trackers",
        "Steps in TensorBoard, MLflow and Weights & Biases. The guide is "
        "[With other tools](../../howto/integrations.md).",
        ("hvdloss.report.trackers",),
    ),
}


def source(module: str) -> Path:
    """Return the file of a module."""
    first, *rest = module.split(".")[1:] or [""]
    folder = ROOT / "adapters" / first if first in ADAPTERS else ROOT / "hvdloss" / first
    path = folder.joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def names(module: str) -> list[str]:
    """Return a module's public names, as far as they stand in it: Horovod's are added when it is imported."""
    for node in ast.parse(source(module).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [name for name in ast.literal_eval(node.value) if name not in INTERNAL]
    raise ValueError(f"{module} has no __all__")


def page(name: str) -> str:
    """Return a page of the reference."""
    title, text, modules = PAGES[name]
    parts = [f"# {title}\n\nFor people who look up a name. {text}\n"]
    for module in modules:
        several = len(modules) > 1
        parts += [f"## {module}\n"] if several else []
        below = "    options: { heading_level: 3 }\n" if several else ""
        parts += [f"::: {module}.{one}\n{below}" for one in dict.fromkeys(names(module))]
    return "\n".join(parts)


def on_startup(**_: Any) -> None:
    """Make build/reference/hvdloss out of links into hvdloss/ and adapters/, before plugins look for it."""
    package = ROOT / "build" / "reference" / "hvdloss"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "hvdloss").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name in ADAPTERS:
        (package / name).symlink_to(ROOT / "adapters" / name)


def on_files(files: Any, config: Any) -> Any:
    """Add the reference's pages."""
    from mkdocs.structure.files import File

    for name in PAGES:
        files.append(File.generated(config, f"reference/api/{name}.md", content=page(name)))
    return files

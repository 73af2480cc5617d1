"""Ways in from other tools, run as a user runs them: each example on two real ranks, against one process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
HOROVODRUN = shutil.which("horovodrun", path=str(BIN)) or shutil.which("horovodrun")

pytestmark = [
    pytest.mark.skipif(HOROVODRUN is None, reason="Horovod is not installed: hvdloss install"),
    pytest.mark.timeout(1000),
]


def needs(*libraries: str, extra: str = "integrations") -> pytest.MarkDecorator:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing),
        reason=f"SKIPPED, {', '.join(missing)} not installed: pip install 'hvdloss[{extra}]'",
    )


def run(command: list[Any], expect: int = 0, cwd: Path = ROOT) -> str:
    """Run a command, check its status, and return what it printed."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        cwd=cwd,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def on_two_ranks(example: str, folder: Path, *options: Any) -> dict[str, Any]:
    """Run an example under horovodrun; return the numbers that its first rank printed."""
    command = [HOROVODRUN, "--gloo", "-np", 2, sys.executable, EXAMPLES / f"{example}.py", "--json"]
    out = run([*command, "--output", folder, *options])
    (line,) = [one for one in out.splitlines() if '"errors"' in one]
    told = json.loads(line[line.index("{") :])
    assert told["ranks"] == 2
    assert len(told["errors"]) == 2
    assert all(0 <= error <= 1e-12 for error in told["errors"])
    return told


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard reads in a folder: (step, value) by name. One file, as one rank writes."""
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o077 == 0 or folder.stat().st_mode & 0o077 == 0
    sys.modules.setdefault("tensorboard.compat.notf", type(sys)("notf"))  # TensorFlow takes seconds to load
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    out: dict[str, list[tuple[int, float]]] = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            number = float(tensor_util.make_ndarray(value.tensor))
            out.setdefault(value.tag, []).append((event.step, number))
    return out


@pytest.mark.more
@needs("tensorboard", "mlflow", "wandb", "sqlalchemy")
def test_trackers(tmp_path):
    told = on_two_ranks("trackers_digits", tmp_path)
    assert told["logged"] == ["TensorBoard", "MLflow", "Weights & Biases"]
    steps = range(1, len(told["losses"]) + 1)

    found = events(tmp_path / "tensorboard")
    assert [step for step, _ in found["hvdloss/loss"]] == list(steps)
    # TensorBoard keeps numbers as float32.
    assert [value for _, value in found["hvdloss/loss"]] == pytest.approx(told["losses"], rel=1e-6)
    shares = [value for _, value in found["hvdloss/ranks/1/share"]]
    assert shares[0] == pytest.approx(0.5)
    assert shares[-1] == 0  # it is through

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    (one,) = client.search_runs([experiment.experiment_id])  # one rank's
    assert one.info.status == "FINISHED"
    history = client.get_metric_history(one.info.run_id, "hvdloss/loss")
    assert [metric.step for metric in history] == list(steps)
    assert [metric.value for metric in history] == pytest.approx(told["losses"], rel=1e-12)

    (run_folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = run_folder.glob("run-*.wandb")
    assert record.stat().st_size > 1000


FOLLOWED = {
    "torch": """
import torch, hvdloss.torch as hvd
hvd.init()
model = torch.nn.Linear(4, 1, bias=False)
torch.nn.init.zeros_(model.weight)
objective = hvd.Objective("mse")
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), objective=objective)
def step():
    optimizer.zero_grad()
    objective(model(torch.ones(8, 4)), torch.ones(8, 1)).backward()
    optimizer.step()
""",
    "tensorflow": """
import tensorflow as tf, hvdloss.tensorflow as hvd
hvd.init()
weights = tf.Variable(tf.zeros([4, 1]))
objective = hvd.Objective("mse")
@tf.function
def step():
    with hvd.DistributedGradientTape(tf.GradientTape(), objective) as tape:
        loss = objective(tf.ones([8, 4]) @ weights, tf.ones([8, 1]))
    weights.assign_sub(0.1 * tape.gradient(loss, [weights])[0])
""",
}
FOLLOW = """
from hvdloss.report.trackers import MLflow, TensorBoard, WandB
sinks = [
    TensorBoard("tensorboard"),
    MLflow("digits", tracking_uri="sqlite:///mlflow.db"),
    WandB("digits", init={"mode": "offline"}),
]
with hvd.follow(objective, hvd.Recorder("run.jsonl"), *sinks):
    for _ in range(3):
        step()
assert not any(sink.failures for sink in sinks)
"""


@pytest.mark.more
@pytest.mark.parametrize("framework", list(FOLLOWED))
@needs("tensorboard", "mlflow", "wandb", "sqlalchemy")
def test_trackers_and_a_record_follow_a_run_together(tmp_path, framework):
    run([sys.executable, "-c", FOLLOWED[framework] + FOLLOW], cwd=tmp_path)
    losses = [1.0, 0.04, 0.0016]  # (1 - 4w)^2: a step leaves a fifth of 1 - 4w
    found = events(tmp_path / "tensorboard")["hvdloss/loss"]
    assert [value for _, value in found] == pytest.approx(losses, rel=1e-4)

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (one,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert one.info.status == "FINISHED"
    history = client.get_metric_history(one.info.run_id, "hvdloss/loss")
    assert [metric.value for metric in history] == pytest.approx(losses, rel=1e-4)

    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "step"] == pytest.approx(losses, rel=1e-4)
    assert lines[-1]["kind"] == "end"


@pytest.mark.more
@needs("lightning", "tensorboard")
def test_lightning(tmp_path):
    told = on_two_ranks("lightning_digits", tmp_path)
    found = events(tmp_path / "tensorboard")["hvdloss/loss"]
    assert [step for step, _ in found] == list(range(1, told["steps"] + 1))
    assert len(list((tmp_path / "checkpoints").glob("*.ckpt"))) == 1


@pytest.mark.more
@needs("transformers", "accelerate")
def test_transformers(tmp_path):
    told = on_two_ranks("transformers_source", tmp_path)
    assert told["tokens_of_last_step"] > 100
    assert told["logged"] >= 3
    assert len(list(tmp_path.glob("checkpoint-*/model.safetensors"))) == 2


@pytest.mark.more
@needs("accelerate")
def test_accelerate(tmp_path):
    on_two_ranks("accelerate_digits", tmp_path)


@pytest.mark.more
@needs("keras", "tensorflow", "tensorboard")
def test_keras(tmp_path):
    command = [HOROVODRUN, "--gloo", "-np", 2, sys.executable, EXAMPLES / "keras_trackers.py"]
    out = run([*command, "--output", tmp_path])
    found = events(tmp_path / "tensorboard")
    steps = [step for step, _ in found["hvdloss/loss"]]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == 26  # 400 samples on rank 0, 32 a step, twice
    assert f"StepReport(step={steps[-1]}, " in out
    assert found["hvdloss/loss"][-1][1] < found["hvdloss/loss"][0][1]


@pytest.mark.more
def test_horovod_run():
    out = run([sys.executable, EXAMPLES / "in_process.py", "--ranks", 2])
    told = json.loads(out[out.index('{"ranks"') :])
    assert told["exact"] is True
    assert told["ranks"] == 2


@pytest.mark.more
@needs("ray", extra="ray")
def test_ray():
    out = run([sys.executable, EXAMPLES / "in_process.py", "--ranks", 2, "--launcher", "ray"])
    told = json.loads(out[out.index('{"ranks"') :])
    assert told["exact"] is True
    assert told["ranks"] == 2

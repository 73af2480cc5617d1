"""Trackers: a report's numbers by name, who logs, and what becomes of a tracker's own failures."""

from __future__ import annotations

import math
import sys
import types
import warnings

import pytest

from hvdloss.errors import ConfigError
from hvdloss.losses.ledger import Ledger
from hvdloss.report import LossReport, StepReport, TermReport
from hvdloss.report.trackers import MLflow, TensorBoard, Tracker, WandB, scalars
from hvdloss.report.trackers.base import first_rank

LEDGERS = [
    Ledger(numerator=6.0, denominator=4.0, weight=4.0, elements=5.0, micro_batches=2.0, communication=0.25),
    Ledger(),
    Ledger(numerator=3.0, denominator=0.5, weight=1.0, elements=1.0, micro_batches=1.0, computation=0.5),
]


def report(step: int = 1, ledgers: list[Ledger] = LEDGERS) -> StepReport:
    terms = {"skew": TermReport("nats", 0.5, [0.1, 0.2, 0.3], 0.6, 0.3)}
    return StepReport.of(step, ledgers, "mean", terms=terms if len(ledgers) == 3 else None, skipped=2)


def test_scalars_of_a_step():
    told = scalars(report())
    assert told["loss"] == 2.0
    assert told["objective_value"] == pytest.approx(2.3)
    assert (told["averaged_loss"], told["averaging_error"]) == (3.75, 0.875)
    assert (told["weight"], told["elements"], told["skipped"], told["dropped"], told["nonfinite"]) == (
        5.0,
        6.0,
        2.0,
        0.0,
        0.0,
    )
    assert (told["terms/skew/total"], told["terms/skew/priced"]) == (0.6, 0.3)
    assert [told[f"ranks/{rank}/share"] for rank in range(3)] == [0.8, 0.0, 0.2]
    assert told["ranks/0/communication"] == 0.25
    assert told["ranks/2/computation"] == 0.5
    assert told["ranks/1/skew"] == 0.2
    assert math.isnan(told["ranks/1/loss"])
    assert all(type(value) is float for value in told.values())


def test_many_ranks_are_told_by_their_range():
    told = scalars(report(), per_rank=2)
    assert not any(name.startswith("ranks/0/") for name in told)
    assert (told["ranks/min/loss"], told["ranks/max/loss"]) == (1.5, 6.0)  # of those that had elements
    assert told["ranks/mean/weight"] == pytest.approx(5 / 3)


def test_several_losses_have_scalars_of_their_own():
    losses = {"a": LossReport(2.0, 3.0, 4, 0.5), "b": LossReport(math.nan, 0.0, 0, 0.0)}
    told = scalars(StepReport.of(1, LEDGERS, "mean", losses=losses))
    assert told["loss"] == 1.0
    assert (told["losses/a/value"], told["losses/a/weight"], told["losses/b/weight"]) == (2.0, 3.0, 0.0)
    assert math.isnan(told["losses/b/value"])


def test_a_step_without_weight_and_without_skew():
    told = scalars(StepReport.of(3, [Ledger(), Ledger()], "sum"))
    assert told["ranks/0/share"] == 0.0
    assert not any("skew" in name or "averag" in name for name in told)


class Notes(Tracker):
    """Logs into a list."""

    library = "json"
    extra = "none"
    title = "a list"

    def __init__(self, **options):
        super().__init__(**options)
        self.notes, self.ended, self.bad = [], None, False

    def _begin(self, module):
        assert module.__name__ == "json"

    def _log(self, step, numbers):
        if self.bad:
            raise OSError("no room")
        self.notes.append((step, numbers))

    def _end(self, failed):
        self.ended = failed


def test_a_tracker_logs_every_so_many_steps():
    with Notes(every=2, prefix="a/", active=True) as tracker:
        for step in range(1, 6):
            tracker.step(report(step))
        tracker.step(None)  # before the first step there is no report
    assert [step for step, _ in tracker.notes] == [2, 4]
    assert tracker.notes[0][1]["a/loss"] == 2.0
    assert tracker.ended is False
    tracker.step(report(6))  # closed
    assert len(tracker.notes) == 2


@pytest.mark.parametrize("variable", ["HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_only_rank_0_logs(variable, monkeypatch):
    # Where no adapter is in use. (Under real ranks: tests/integrations.)
    for name in ("hvdloss.torch._backend", "hvdloss.tensorflow._backend"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert first_rank()
    monkeypatch.setenv(variable, "1")
    tracker = Notes()
    tracker.step(report())
    tracker.close()
    assert (tracker.notes, tracker.ended) == ([], None)
    monkeypatch.setenv(variable, "0")
    with Notes() as tracker:
        tracker.step(report())
    assert len(tracker.notes) == 1


def test_a_failure_to_log_is_told_once_and_training_goes_on():
    tracker = Notes(active=True)
    tracker.bad = True
    with pytest.warns(RuntimeWarning, match=r"step 1 could not be logged to a list \(OSError: no room\)"):
        tracker.step(report(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.step(report(2))
    assert tracker.failures == 2


def test_a_run_that_ended_with_an_error_has_failed():
    tracker = Notes(active=True)

    def train():
        with tracker:
            tracker.step(report())
            raise KeyError("x")

    with pytest.raises(KeyError):
        train()
    assert tracker.ended is True


@pytest.mark.parametrize(
    ("make", "extra"), [(lambda: TensorBoard("x"), "tensorboard"), (MLflow, "mlflow"), (WandB, "wandb")]
)
def test_a_missing_library_is_named_with_its_extra(make, extra, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"needs the library {extra}: pip install 'hvdloss\[{extra}\]'"):
        make()


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="every=0"):
        Notes(every=0)
    with pytest.raises(ConfigError, match="per_rank=-1"):
        Notes(per_rank=-1)


def test_wandb_and_mlflow_go_on_with_the_active_run():
    """Their modules stood in for: what is asked of them. Their real ones: tests/integrations."""
    logged = []
    run = types.SimpleNamespace(
        define_metric=lambda name, step_metric: logged.append((name, step_metric)),
        log=logged.append,
        finish=lambda exit_code: logged.append("finished"),
    )
    tracker = WandB.__new__(WandB)
    tracker.project, tracker.init, tracker.prefix = "p", {}, "hvdloss/"
    tracker._begin(types.SimpleNamespace(run=run))
    tracker._log(3, {"hvdloss/loss": 1.0})
    tracker._end(False)
    assert logged == [("hvdloss/*", "hvdloss/step"), {"hvdloss/step": 3, "hvdloss/loss": 1.0}]


def test_a_tracker_is_a_sink_of_two_methods():
    """What follows a run may call other methods of a sink by their names, with other arguments."""
    public = {name for name in dir(Tracker) if not name.startswith("_") and callable(getattr(Tracker, name))}
    assert public == {"step", "close"}

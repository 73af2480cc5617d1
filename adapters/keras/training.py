"""What ``compile``, ``fit`` and ``evaluate`` do beyond Keras's own for a distributed optimizer.

Importing :mod:`hvdloss.keras` puts a layer around these methods of Keras's models. It acts only where
the model's optimizer is one of ours; every other model is left alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from typing import Any

import tensorflow as tf

import keras
from hvdloss import watch
from hvdloss.comm.agreement import check_consistency
from hvdloss.comm.guard import due
from hvdloss.comm.messages import decode_all
from hvdloss.comm.plan import ParameterInfo
from hvdloss.errors import ConfigError, DataError, HvdlossError, RankError, ShapeError
from hvdloss.keras._backend import TensorFlowTrainer, Trainer
from hvdloss.keras.integrations.data import EpochDataset
from hvdloss.keras.losses import ExactCompileLoss, ExactMean, Objective
from hvdloss.keras.optimizer import as_exact_class, engine_of
from hvdloss.tensorflow.guard import check_synchronized, checksums, parameter_name
from hvdloss.tensorflow.normalization import synchronized_layers
from hvdloss.tensorflow.ops import communicator_of
from hvdloss.tensorflow.reducer import empty_row
from hvdloss.tensorflow.step import unwrap_graph_errors
from hvdloss.tensorflow.variables import variable
from hvdloss.terms.policies.period import period_of

__all__ = ["SynchronizationCallback", "install", "run_empty_step"]


# -- compile ------------------------------------------------------------------------------------------


def _check_jit(arguments: dict[str, Any]) -> None:
    """Choose what works for ``jit_compile="auto"``; refuse True, which would fail inside XLA."""
    asked = arguments.get("jit_compile", "auto")
    if asked == "auto":
        arguments["jit_compile"] = False
    elif asked and not arguments.get("run_eagerly"):
        raise ConfigError(
            "jit_compile=True: Horovod's operations cannot be compiled by XLA here, and the training step "
            'holds them. Compile the model with jit_compile="auto" or False, and put what should be '
            "compiled into a layer whose call is decorated with @tf.function(jit_compile=True)."
        )


class _PlainConfig:
    """A model's compile arguments as a saved model names them: plain ones, that load without hvdloss."""

    def __init__(self, original: Any) -> None:
        self._original = original

    @property
    def config(self) -> dict[str, Any]:
        """The arguments, with every objective replaced by the loss of Keras nearest to it."""
        config = dict(self._original.config)
        config["loss"] = keras.tree.map_structure(
            lambda loss: loss.plain() if isinstance(loss, Objective) else loss, config.get("loss")
        )
        return config

    def serialize(self) -> Any:
        """Return them for a saved model."""
        return type(self._original)(**self.config).serialize()


def _compiled(model: Any) -> None:
    """Make a model that was just compiled with a distributed optimizer exact."""
    engine = engine_of(model.optimizer)
    if engine is None:
        return
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        as_exact_class(model.optimizer)  # compile wraps optimizers for mixed precision by itself
    if model._compile_loss is not None:
        losses = keras.tree.flatten(model.loss)
        sets = {id(x.process_set): x.process_set for x in losses if isinstance(x, Objective)}
        for process_set in sets.values():
            if process_set is not None and process_set is not engine.reducer.process_set:
                raise ConfigError("objective and optimizer were given different process sets")
        ours = {id(x): x for x in losses if isinstance(x, Objective)}.values()
        acting = [loss for loss in ours if loss.controller.terms]
        if len(acting) > 1:
            raise ConfigError(
                f"loss: {len(acting)} objectives of the model have terms, but a step is measured and decided "
                f"on once; give terms= to one of them only"
            )
        for loss in losses:
            if isinstance(loss, Objective):
                loss._exact.process_set = engine.reducer.process_set
                loss._exact.passes = _passes(model.optimizer)
        policies = sorted({loss.nonfinite if isinstance(loss, Objective) else "raise" for loss in losses})
        if len(policies) > 1:
            raise ConfigError(
                f"loss: the model's losses have nonfinite={' and '.join(map(repr, policies))}, but a step "
                f"has one fate; give all of them the same (losses of Keras have 'raise')"
            )
        with keras.src.utils.tracking.DotNotTrackScope():
            model._compile_loss = ExactCompileLoss(
                model._compile_loss,
                engine.reducer,
                acting[0] if acting else None,
                policies[0] if policies else "raise",
            )
            model._loss_tracker = ExactMean(model._compile_loss, name="loss")
            model._compile_config = _PlainConfig(model._compile_config)
        engine.listen(model._compile_loss, model.optimizer)


def _passes(optimizer: Any) -> int:
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return inner.gradient_accumulation_steps or 1


# -- fit ----------------------------------------------------------------------------------------------


def run_empty_step(model: Any, *, ending: bool = False) -> bool:
    """Take part in one training step of the other ranks without adding anything to it.

    The update is the same on this rank as on the others. With `ending`, a step to which no rank adds
    anything is dropped; returns whether it was.

    Collectives: those of a training step.
    """
    optimizer = model.optimizer
    engine = engine_of(optimizer)
    assert engine is not None
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not inner.built:
        optimizer.build(model.trainable_variables)
    engine.begin()
    if engine.ended is None:
        engine.ended = variable(False, "hvdloss_ended")
    engine.ended.assign(False)
    local_steps = engine.local_steps
    if local_steps is not None:
        local_steps.build(inner)
        local_steps.overrun_steps.assign(0)
    steps = _passes(optimizer)
    before = int(inner._iterations)  # `iterations` counts updates
    skipped = steps - 1 - before % steps if ending else 0
    several = engine.compile_loss.several if engine.compile_loss is not None else 0
    if several:
        # In a function, since Horovod names an eager operation differently than the same one in a graph.
        exchange_nothing = engine.empty_steps.setdefault(
            "normalisers", tf.function(engine.compile_loss.normalisers, autograph=False)
        )
        for _ in range(skipped + 1):
            exchange_nothing(tf.zeros(several + 1, tf.float64))
    inner._iterations.assign_add(skipped)

    key = (ending, tuple(engine.sparse), tuple(engine.places or ()))
    if key not in engine.empty_steps:
        variables = list(inner._trainable_variables)
        if engine.places is not None:
            variables = [variables[place] for place in engine.places]

        def step(gradients: list[Any], row: tf.Tensor) -> None:
            engine.empty_row, engine.ending = row, ending
            try:
                optimizer.apply(gradients, variables)
            finally:
                engine.empty_row, engine.ending = None, False

        # Zeros are passed in: made inside they would be constants, whose sum TensorFlow takes once only.
        nothing = [_nothing(v, engine, inner) for v in variables]
        engine.empty_steps[key] = tf.function(step, autograph=False), nothing
    function, nothing = engine.empty_steps[key]
    function(nothing, empty_row(engine.step_state.controller.width))
    if not ending:
        return False
    if bool(engine.ended):
        inner._iterations.assign(before)
        return True
    # After local steps it shows at the exchange how many of them no rank had a batch in.
    overrun_steps = 0 if local_steps is None else int(local_steps.overrun_steps)
    inner._iterations.assign_sub(overrun_steps * steps)
    return overrun_steps > 0


def _nothing(variable: Any, engine: Any, inner: Any) -> Any:
    """Return a gradient of zero, sparse where the variable's gradients are."""
    if inner._get_variable_index(variable) in engine.sparse:
        shape = tuple(variable.shape)
        return tf.IndexedSlices(
            tf.zeros((0, *shape[1:]), engine.sparse[inner._get_variable_index(variable)]),
            tf.zeros((0,), tf.int32),
            tf.constant(shape, tf.int32),
        )
    return tf.zeros(variable.shape, variable.dtype)


class _Begin(keras.callbacks.Callback):
    """The first callback of every ``fit``: ranks agree, and those that run out of batches stay in step."""

    async_safe = False

    def __init__(self, problem: str = "") -> None:
        super().__init__()
        self.problem = problem  # of this rank's callbacks
        self.data: EpochDataset | None = None  # which is told where it is
        self.counts: list[int | None] = []
        self.done = 0
        self.training = False
        self.last = False  # whether this is the last epoch
        self.agreed = False

    @property
    def engine(self) -> Any:
        return engine_of(self.model.optimizer)

    def communicator(self) -> Any:
        return communicator_of(self.engine.reducer.process_set)

    def on_train_begin(self, logs: Any = None) -> None:
        # Keras builds it with the first batch, which this rank may never have.
        if self.model.built and not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        watch.record_activity(f"begun epoch {epoch + 1}")
        self.last = epoch + 1 == self.params.get("epochs")
        self.done, self.training = 0, True
        if self.agreed or not self.engine.included:
            return
        self.agreed = True
        model = self.model
        settings = {
            "epochs": self.params.get("epochs"),
            "initial_epoch": epoch,
            "gradient_accumulation_steps": _passes(model.optimizer),
            "optimizer": model.optimizer.__class__.__name__,
            "nonfinite": self.engine.step_state.nonfinite,
            **self.engine.reducer.settings(),
            **_loss_settings(model.loss),
            **self.engine.step_state.controller.settings(),
        }
        _agree_on_model(self.communicator(), model, settings)
        self.engine.begin()
        self.engine.step_state.controller.prepare(self.communicator())
        steps = self.params.get("steps")
        told = self.communicator().all_gather_bytes(
            json.dumps([steps, self.problem]).encode(), "hvdloss.steps"
        )
        ranks = decode_all(told, "number of steps", lambda one: len(one) == 2)
        self.counts = [count for count, _ in ranks]
        for rank, (_, problem) in enumerate(ranks):
            if problem and len(ranks) > 1:
                raise ConfigError(f"callbacks of rank {rank}: {problem}")
        self._check_global_loss()

    def _check_global_loss(self) -> None:
        """Check that ranks meet in every step, if a loss or layer needs all of them in its forward pass.

        Raises:
            ConfigError: they make different numbers of steps, or nobody knows how many.
        """
        losses = keras.tree.flatten(self.model.loss)
        layers = synchronized_layers(self.model)
        for layer in layers:
            layer._hvdloss_process_set = self.engine.reducer.process_set
        whole = [
            f"loss={x._exact.name}"
            for x in losses
            if isinstance(x, Objective) and x._exact.global_loss is not None
        ]
        whole += [f"layer {one.name!r}: BatchNormalization(synchronized=True)" for one in layers]
        if whole and len(self.counts) > 1 and (None in self.counts or len(set(self.counts)) > 1):
            known = ["unknown" if count is None else count for count in self.counts]
            raise ConfigError(
                f"{whole[0]} needs all ranks in every step, but their numbers of batches are {known}; "
                f"give fit steps_per_epoch, or data of known and equal length (dataset.apply(tf.data."
                f"experimental.assert_cardinality(n))); batches may be empty"
            )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Where a call runs several steps, `batch` is the last one of a whole call, also for a shorter one.
        self.done = min(batch + 1, self.params.get("steps") or batch + 1)
        if self.data is not None:
            self.data.made = self.done

    def on_test_begin(self, logs: Any = None) -> None:
        if self.training:  # validation at the end of an epoch
            self._join_remaining_steps()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.training:
            self._join_remaining_steps()

    def _join_remaining_steps(self) -> None:
        """Do this epoch's remaining steps of the other ranks, and end with weights that are equal."""
        self.training = False
        if not self.engine.included or len(self.counts) < 2:
            return
        known = [count for count in self.counts if count is not None]
        if len(known) == len(self.counts):
            for _ in range(max(known) - self.done):
                run_empty_step(self.model)
                self.engine.after_empty_step()
        else:
            while not run_empty_step(self.model, ending=True):
                self.engine.after_empty_step()
        if self.engine.local_steps is not None:
            self.engine.local_steps.sync_parameters()


def _loss_settings(loss: Any) -> dict[str, Any]:
    """Return what the losses of a model must have alike on all ranks: by number, where there are several."""
    losses = keras.tree.flatten(loss)
    out: dict[str, Any] = {}
    for number, one in enumerate(losses):
        if isinstance(one, Objective):
            told = one._exact.settings()
        else:
            name = (
                one if isinstance(one, str) else getattr(one, "name", None) or getattr(one, "__name__", None)
            )
            told = {"objective": name or type(one).__name__}
        out |= told if len(losses) == 1 else {f"loss {number}: {key}": value for key, value in told.items()}
    return out


def _agree_on_model(communicator: Any, model: Any, settings: dict[str, Any]) -> None:
    """Check before the first step that all ranks train the same model."""
    variables = list(model.trainable_variables)
    infos = [ParameterInfo(parameter_name(v), tuple(v.shape), str(v.dtype), 0) for v in variables]
    check_consistency(
        communicator,
        infos,
        lambda: checksums(variables),
        [],
        settings,
        name="hvdloss.fit",
        broadcast="Pass hvd.callbacks.BroadcastGlobalVariablesCallback(0) to fit, or load the same weights "
        "before it. (hvd.elastic.KerasState makes an optimizer's state itself, and its sync() gives all "
        "ranks the same: no fit before it is needed.)",
    )


class SynchronizationCallback(keras.callbacks.Callback):
    """Checks that all ranks hold the same weights; raises on every rank if they do not.

    One of these is part of every ``fit`` with a distributed optimizer, checking at the end of each
    epoch. Pass your own to check more often, or, with ``at_epoch_end=False``, not at all.

    Args:
        every: check after every so many batches too; None for not. Ranks must have equally many.
        at_epoch_end: check at the end of each epoch.

    Raises:
        AgreementError: in ``fit``, naming the first weight and the ranks that differ.

    Collectives: one gather of a few bytes per weight and check.
    """

    def __init__(self, every: int | None = None, at_epoch_end: bool = True) -> None:
        super().__init__()
        due(1, every)
        self.every, self.at_epoch_end = every, at_epoch_end
        self.seen = 0

    def _check(self, when: str) -> None:
        engine = engine_of(self.model.optimizer)
        if engine is not None and engine.local_steps is not None and engine.local_steps.pending:
            return  # ranks are apart, and meant to be
        group = None if engine is None else engine.reducer.process_set
        shared = self.model.trainable_variables
        if engine is not None and engine.local:
            inner = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
            shared = [v for v in shared if inner._get_variable_index(v) not in engine.local]
        check_synchronized(shared, process_set=group, when=when)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Check if due."""
        self.seen += 1
        if due(self.seen, self.every):
            self._check(f"after batch {self.seen}")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Check."""
        if self.at_epoch_end:
            self._check(f"after epoch {epoch + 1}")


class _End(keras.callbacks.Callback):
    """The last callback of every ``fit``: ranks stop together."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        engine = engine_of(self.model.optimizer)
        if engine is None or not engine.included or engine.reducer.size == 1:
            return
        stop = engine.reducer.count(tf.constant(bool(self.model.stop_training)), "stop")
        self.model.stop_training = bool(stop > 0)


def _diverging_callbacks(callbacks: Any) -> str:
    """Return why callbacks would decide from a rank's own numbers what must be decided alike; or nothing."""
    from hvdloss.keras.callbacks import MetricAverageCallback

    merging = [i for i, one in enumerate(callbacks) if isinstance(one, MetricAverageCallback)]
    kinds = (
        keras.callbacks.EarlyStopping,
        keras.callbacks.ModelCheckpoint,
        keras.callbacks.ReduceLROnPlateau,
    )
    for place, one in enumerate(callbacks):
        if not isinstance(one, kinds):
            continue
        if merging and place < merging[0]:
            return (
                f"{type(one).__name__} comes before MetricAverageCallback, so it would decide from this "
                f"rank's own metrics; put MetricAverageCallback first"
            )
        # Stopping is told to all ranks; these would leave them with other models.
        restores = getattr(one, "restore_best_weights", False)
        if not merging and (restores or isinstance(one, keras.callbacks.ReduceLROnPlateau)):
            what = "EarlyStopping(restore_best_weights=True)" if restores else type(one).__name__
            return (
                f"{what} would decide from each rank's own metrics, and leave the ranks with different "
                f"models; put hvd.callbacks.MetricAverageCallback() before it"
            )
    return ""


def _wrap_callbacks(model: Any, callbacks: Any) -> Any:
    """Return the callbacks of a ``fit``, ours around the user's."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        given = callbacks.callbacks
    else:
        given = keras.tree.flatten(callbacks) if callbacks else []
    first = [_Begin(_diverging_callbacks(given))]
    last: list[Any] = [_End()]
    if not any(isinstance(one, SynchronizationCallback) for one in given):
        last.insert(0, SynchronizationCallback())
    if isinstance(callbacks, keras.callbacks.CallbackList):
        for one in (*first, *last):
            one.set_model(model)
            one.set_params(callbacks.params)
        callbacks.callbacks[:] = [*first, *given, *last]
        return callbacks
    return [*first, *given, *last]


def _notify_ranks(model: Any, begin: _Begin, error: Exception, read: DataError | None) -> None:
    """Have the other ranks of a ``fit`` know that this one cannot go on.

    In the step they are in, where they are in step with this rank; else through the watch. Nothing where
    they know already.

    Args:
        model: being fitted.
        begin: the first callback of the ``fit``.
        error: what ended it on this rank.
        read: what the data could not read, where that is the reason.

    Raises:
        RankError, DataError: as the other ranks do; not where all ranks failed, each with its own error.

    Collectives: those of a training step, and one gather of why; or none.
    """
    engine = engine_of(model.optimizer)
    # What is judged from global numbers all ranks know; shapes and files are one rank's own.
    own = isinstance(error, ShapeError) or (isinstance(error, DataError) and not error.ranks)
    common = isinstance(error, HvdlossError) and not own
    # Horovod's own failures, where there is nobody to tell.
    common |= type(error).__module__.startswith("horovod")
    common |= isinstance(error, tf.errors.OpError) and "Horovod" in str(error)
    if engine is None or not begin.agreed or common or engine.reducer.size == 1 or not engine.included:
        return
    over = False  # the steps of the epoch
    if known := [count for count in begin.counts if count is not None]:
        over = len(known) == len(begin.counts) and begin.done >= max(known)
    if over and begin.last:
        return  # nobody waits any more
    if not begin.training or over or not model.built:  # in validation, say, or a callback after the last step
        if (told := watch.report_error(error)) is not None:
            raise told from error
        return
    engine.step_state.tell(False, read or error)
    try:
        for _ in range(_passes(model.optimizer) * period_of(engine.step_state.controller)):
            unwrap_graph_errors(run_empty_step, model)
    except RankError as told:
        if len(told.ranks) < engine.reducer.size:
            raise told from error
    finally:
        engine.step_state.tell(False)


def _warn_of_own_loss(model: Any) -> None:
    """Warn, once for each optimizer, of a model whose loss nobody knows: ranks then all count the same."""
    engine = engine_of(model.optimizer)
    assert engine is not None
    if not engine.allow_untracked or engine.warned or engine.reducer.size == 1:
        return
    engine.warned = True
    warnings.warn(
        f"{type(model).__name__} was compiled without a loss, and DistributedOptimizer has no objective: "
        f"each rank's gradient counts the same, whatever it holds, as with Horovod. For the gradient of all "
        f"samples let train_step take its loss from an objective, loss = self.objective(y, y_pred) with "
        f'objective = hvd.Objective("mse"), say, and give it to the optimizer: '
        f"hvd.DistributedOptimizer(optimizer, objective)",
        stacklevel=3,
    )


# -- the layer around Keras's methods -----------------------------------------------------------------


def install() -> None:
    """Put the layer around Keras's methods; once."""
    if hasattr(Trainer.compile, "_hvdloss"):
        return
    plain_compile, plain_fit = Trainer.compile, TensorFlowTrainer.fit
    plain_train, plain_evaluate = TensorFlowTrainer.train_on_batch, TensorFlowTrainer.evaluate
    plain_test = TensorFlowTrainer.test_step

    @functools.wraps(plain_compile)
    def compile(self: Any, optimizer: Any = "rmsprop", *args: Any, **kwargs: Any) -> None:
        if engine_of(optimizer) is None:
            plain_compile(self, optimizer, *args, **kwargs)
            return
        names = ("loss", "loss_weights", "metrics", "weighted_metrics", "run_eagerly")
        names += ("steps_per_execution", "jit_compile", "auto_scale_loss")
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        # What Horovod's examples pass so that Keras 2 calls its optimizer; Keras 3 does not know it.
        arguments.pop("experimental_run_tf_function", None)
        _check_jit(arguments)
        plain_compile(self, optimizer, **arguments)
        _compiled(self)

    @functools.wraps(plain_fit)
    def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        if engine_of(self.optimizer) is None:
            return plain_fit(self, *args, **kwargs)
        if len(args) > 5:  # x, y, batch_size, epochs, verbose, callbacks
            args, kwargs["callbacks"] = (*args[:5], None, *args[6:]), args[5]
            args = args[:5] if len(args) == 6 else args
            if len(args) > 5:
                raise ConfigError("pass the arguments of fit after `verbose` by name")
        kwargs["callbacks"] = _wrap_callbacks(self, kwargs.get("callbacks"))
        _warn_of_own_loss(self)
        data = args[0] if args else kwargs.get("x")
        ours = kwargs["callbacks"]
        begin = (ours.callbacks if isinstance(ours, keras.callbacks.CallbackList) else ours)[0]
        if isinstance(data, EpochDataset):
            kwargs["shuffle"] = False  # Keras would take the batches in another order on every rank
            last = args[3] if len(args) > 3 else kwargs.get("epochs", 1)
            data.enter(last - kwargs.get("initial_epoch", 0))
            begin.data = data
        try:
            return unwrap_graph_errors(plain_fit, self, *args, **kwargs)
        except Exception as error:
            read = getattr(data, "error", None) if isinstance(data, EpochDataset) else None
            _notify_ranks(self, begin, error, read)
            raise
        finally:
            if isinstance(data, EpochDataset):
                data.leave()

    @functools.wraps(plain_train)
    def train_on_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if engine_of(self.optimizer) is None:
            return plain_train(self, *args, **kwargs)
        return unwrap_graph_errors(plain_train, self, *args, **kwargs)

    @functools.wraps(plain_test)
    def test_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        # One rank may evaluate while the others do not, or on other numbers of batches.
        loss = getattr(self, "_compile_loss", None)
        with loss.alone() if isinstance(loss, ExactCompileLoss) else contextlib.nullcontext():
            return plain_test(self, *args, **kwargs)

    @functools.wraps(plain_evaluate)
    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        from hvdloss.keras.callbacks import MetricAverageCallback
        from hvdloss.keras.integrations.metrics import merged_results

        results = plain_evaluate(self, *args, **kwargs)
        callbacks = kwargs.get("callbacks") or (args[6] if len(args) > 6 else None)
        if kwargs.get("_use_cached_eval_dataset") or isinstance(callbacks, keras.callbacks.CallbackList):
            return results
        if not any(isinstance(one, MetricAverageCallback) for one in keras.tree.flatten(callbacks or [])):
            return results
        logs = merged_results(self)
        return logs if isinstance(results, dict) else self._flatten_metrics_in_order(logs)

    for owner, method in (
        (Trainer, compile),
        (TensorFlowTrainer, fit),
        (TensorFlowTrainer, train_on_batch),
        (TensorFlowTrainer, test_step),
        (TensorFlowTrainer, evaluate),
    ):
        method._hvdloss = True  # type: ignore[attr-defined]
        setattr(owner, method.__name__, method)

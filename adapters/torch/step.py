"""The steps of an exact optimizer: between the backward pass and the update.

What is decided stands in :mod:`hvdloss.step`; here it is done to tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

import torch
from hvdloss import watch
from hvdloss.comm.agreement import check_consistency
from hvdloss.comm.communicator import Communicator, group_ranks, included
from hvdloss.comm.guard import due
from hvdloss.comm.tuning import launched
from hvdloss.comm.world import next_name_index, register_for_reset
from hvdloss.errors import AgreementError, ConfigError, HvdlossError, UsageError
from hvdloss.losses.ledger import COLUMN, Ledgers
from hvdloss.losses.passes import late_error
from hvdloss.step.local import local_outcome
from hvdloss.step.outcome import Action, Outcome
from hvdloss.step.phase import Event, Phase
from hvdloss.step.several import Objectives
from hvdloss.step.state import StepState
from hvdloss.terms.policies.compression import AdaptiveCompression
from hvdloss.terms.term import CommStats
from hvdloss.torch._backend import hvd
from hvdloss.torch.backward import PassCollector
from hvdloss.torch.guard import check_synchronized, checksums
from hvdloss.torch.hooks import StepHooks
from hvdloss.torch.ledgers import LedgerExchange, zeroed
from hvdloss.torch.local import LocalSteps, average_optimizer_state
from hvdloss.torch.ops import communicator_of, to_device_async
from hvdloss.torch.parameters import OptimizerParameters
from hvdloss.torch.reducer import GradientReducer, Options
from hvdloss.torch.several import LossExchange

__all__ = ["ExactStep"]

_NONFINITE = COLUMN["nonfinite_losses"]


class ExactStep:
    """The steps of one exact optimizer.

    Args:
        optimizer: whose parameters are trained; held weakly.
        named: its parameters' names, or None.
        objective: whose loss backward passes come from; one, or several.
        passes: the most backward passes that a step has.
        options: how gradients travel.

    Attributes:
        name: of the optimizer, on the wire.
        state: all that a step is but tensors.
        parameters: the optimizer's.
        reducer: the gradients on their way.
        ledgers: the ledgers on theirs.
        local: local steps, where a policy has ranks take any.
        passes: the backward passes.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named: Iterable[tuple[str, torch.nn.Parameter]] | None,
        objective: Any,
        passes: int,
        options: Options,
    ) -> None:
        # Optimizers are told apart on the wire by the order of their construction in a process set.
        self.name = f"hvdloss.{next_name_index(('torch', getattr(options.process_set, 'process_set_id', 0)))}"
        self.objective, self.options = objective, options
        me = weakref.ref(self)  # what is made here does not hold this
        self.state = StepState(
            self.name,
            objective.controller,
            objective.reduction,
            objective.nonfinite,
            passes,
            lambda: me()._choices(),  # type: ignore[union-attr]
        )
        self.parameters = OptimizerParameters(optimizer, named)
        self.reducer = GradientReducer(self.parameters, options, self.name)
        self.ledgers = LedgerExchange(self.name, options.process_set, objective.controller, options.tuning)
        self.local = LocalSteps(objective.controller, objective.reduction == "sum", self.name)
        self._hooks = StepHooks(self.parameters)
        self.passes = PassCollector(
            self.state,
            objective,
            self.parameters,
            self.reducer,
            self._hooks,
            options.process_set.size,
            lambda: me()._prepare(),  # type: ignore[union-attr]
            lambda alone: me()._complete(alone),  # type: ignore[union-attr]
        )
        self._judged: tuple[Ledgers, np.ndarray] | None = None  # of this step, with what terms told by rank
        if self.included:  # others keep their own gradients, as with Horovod
            self._take_part(passes)
        register_for_reset(self)

    @property
    def process_set(self) -> Any:
        """The ranks that share the steps."""
        return self.options.process_set

    @property
    def controller(self) -> Any:
        """Of the objective's terms."""
        return self.objective.controller

    @property
    def included(self) -> bool:
        """Whether this rank shares the steps."""
        return included(hvd, self.process_set)

    @property
    def _losses(self) -> LossExchange | None:
        return self.passes.losses

    def _take_part(self, passes: int) -> None:
        objective = self.objective
        mine = {id(p) for p in self.parameters.all()}
        for other in objective.listeners():  # a new optimizer for an objective takes the old one's place
            if isinstance(other, ExactStep) and other._retire(mine):
                other.objective.detach(other)
        several = isinstance(objective, Objectives) or objective.exchange is not None
        if several and objective.listeners():
            raise ConfigError(
                f"objective {objective.name!r}: one of several objectives belongs to one optimizer, "
                f"which sums the denominators. Give all parameters to that one, in groups, or each "
                f"optimizer objectives of its own"
            )
        self.parameters.set_hooks(self.passes.gradient_hook())
        objective.attach(self, passes)
        if isinstance(objective, Objectives):
            me = weakref.ref(self)
            self.passes.losses = LossExchange(
                objective,
                self.process_set,
                self.name,
                lambda: me()._device(),  # type: ignore[union-attr]
                lambda: me()._waiting(),  # type: ignore[union-attr]
            )
        else:
            objective.exchange = None
        self._begin_terms(force=True)

    def _begin_terms(self, *, force: bool = False) -> None:
        self.controller.reset(self.process_set.rank(), self.process_set.size(), force=force)

    def on_backward_begin(self, row: torch.Tensor, gradient: torch.Tensor, graph: Any) -> None:
        """Listen to the objective; see :class:`hvdloss.step.objective.Listener`."""
        self.passes.on_backward_begin(row, gradient, graph)

    def on_foreign_backward(self, name: str, graph: Any) -> None:
        """Listen to other objectives; see :class:`hvdloss.step.objective.Listener`."""
        self.passes.on_foreign_backward(name, graph)

    # -- other ranks, and going on ----------------------------------------------------------------

    def reset(self) -> None:
        """Reset what belongs to the ranks there were: buckets, collectives in flight, weight scale."""
        self._begin_step()
        self.reducer.reset()
        self.local.reset()
        if self._losses is not None:
            self._losses.reset()
        self.state.reset()
        if self.included:
            self._begin_terms(force=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs besides the optimizer's own state; equal on all ranks.

        To be asked for when parameters are equal: after :meth:`exchange`.
        """
        return {**self.state.log.state_dict(), "velocity": self.local.velocity}

    def load_state_dict(self, state: Any, *, same_ranks: bool) -> None:
        """Go on from a :meth:`state_dict`; no collective.

        Raises:
            ConfigError: it is none.
        """
        self.state.log.load_state_dict(state, same_ranks=same_ranks)
        self.local.clear()
        self.local.velocity = state["velocity"]

    def _retire(self, parameters: set[int]) -> bool:
        """Take no further part if another optimizer now has parameters of this one; return whether so."""
        if not (self.parameters.gone or self.parameters.overlap(parameters)):
            return False
        self.abort()
        self.parameters.remove_hooks()
        if self._losses is not None:
            self._losses.leave()
        self.state.phase.to(Event.RETIRE)
        return True

    def set_passes(self, passes: int) -> None:
        """Change how many backward passes a step has at most."""
        self.state.phase.passes = self.objective.passes = passes

    def add_groups(self, first: int) -> None:
        """Take in the parameters of groups from this one on."""
        self.exchange()
        self.local.clear()
        self.parameters.add_groups(first)
        if self.included:
            self.parameters.set_hooks()
        self.reducer.reset()

    def _prepare(self) -> None:
        """Before the first backward pass of a step, notice what changes the plan, as all ranks do."""
        if self.local.due:  # the update was skipped, as a GradScaler does: ranks meet here
            self.exchange()
        reducer, local = self.reducer, self.local
        if self.parameters.unfrozen() and not local.diverged:  # after local steps it has to wait
            local.clear()
            self.parameters.set_hooks()
            reducer.reset()
        if reducer.is_outdated():
            if reducer.planned_size != self.process_set.size():  # an elastic job has other ranks now
                self._begin_terms()
            local.clear()
            reducer.reset()
        reducer.keep_views()
        compressing = self.controller.policy(AdaptiveCompression)
        if compressing is not None:
            reducer.compress(compressing.on)
        local.now = reducer.planned and local.wanted  # the first step, which makes the plan, is done together
        if reducer.ledgers_moved and not local.now:
            reducer.reset()
        if local.now:
            local.prepare(self.parameters.all())
        overlap = self.options.tuning.overlap.value
        self.passes.overlap = overlap and not local.now and not self.state.drops

    def _begin_step(self) -> None:
        self.state.begin()
        self._judged = None
        self._hooks.clear()
        self.passes.begin_step()
        self.ledgers.clear()
        self.reducer.begin_step()

    # -- the reduction ----------------------------------------------------------------------------

    def _complete(self, alone: bool) -> None:
        """End the last backward pass: as in one process, ``.grad`` is the step's gradient afterwards.

        `alone`: whether the pass is of no other optimizer. Where it is, a rank without a batch may ask for
        their gradients in another order, and none is waited for here.
        """
        if self.reducer.planned and not self.local.now:
            self._launch()
        if alone:
            try:
                self.synchronize()
            except HvdlossError as error:
                self.state.hold(error)

    def awaits(self, parameters: set[int]) -> bool:
        """Return whether the gradients of these parameters (by identity) are not yet those of all ranks.

        A rank without a backward pass waits for those of the others, unless it still has gradients of the
        step before.
        """
        phase = self.state.phase
        if phase.synchronized or not self.parameters.overlap(parameters) or not self.included:
            return False
        if self.state.sums.row is not None or phase.launched:
            return True
        none = all(p.grad is None for p in self.parameters.all())
        return none and self.process_set.size() > 1 and self.state.log.steps > 0

    def _waiting(self) -> AbstractContextManager[None]:
        """Say, while it lasts, that this rank waits for the others in a step."""
        return watch.waiting_in_step(self.name, group_ranks(hvd, self.process_set))

    def communicator(self) -> Communicator:
        """Return the exchange of small arrays among this optimizer's ranks."""
        return communicator_of(self.process_set)

    def _drop_if_nonfinite(self) -> None:
        """Where such a rank is to add nothing, make it one without any backward pass if it is one."""
        sums = self.state.sums
        if not self.state.drops or sums.row is None or self.ledgers.sent:
            return
        self.reducer.seal(sums.scale)
        found = float(self.reducer.nonfinite())
        if found or bool(sums.row[_NONFINITE] > 0):
            self.reducer.drop()
            sums.drop(zeroed(sums.row), found)

    def _launch(self, late: bool = False) -> None:
        """Start every reduction that has not started; the ledgers' last, as they tell of the others."""
        self._drop_if_nonfinite()
        self.state.phase.to(Event.LAUNCH)
        self.reducer.launch(self.state.sums.scale)
        self._send_ledger(late)
        self.reducer.launch_ledgers(self.state.sums.scale)

    def _send_ledger(self, late: bool) -> None:
        if self.ledgers.sent:
            return
        if self._losses is not None:
            self._losses.send_losses()
            self.state.refuse(self._losses.refusal)
        sums = self.state.sums
        found = self.reducer.nonfinite() if sums.dropped is None else sums.dropped
        there = [float(lone.there) for lone in self.reducer.unbucketed]
        own = self._own_ledger(sums.row, sums.untracked, found, late=late)
        self.ledgers.send(own, torch.tensor(there, dtype=torch.float64), self.reducer.ledger_bucket)

    def _device(self) -> torch.device:
        """Return where ledgers travel: the same kind of device on all ranks, with a batch or without."""
        bucket = self.reducer.ledger_bucket
        return self.parameters.device() if bucket is None else bucket.flat.device

    def _own_ledger(
        self, row: Any, untracked: int, nonfinite: Any, drift_sqnorm: float = 0.0, late: bool = False
    ) -> torch.Tensor:
        """Return this rank's ledger, float64 ``(LEDGER_WIDTH,)``; with `drift_sqnorm` after local steps."""
        measured = {"nonfinite_gradients": nonfinite, **self.passes.measured()}
        ledger = self.state.ledger(
            untracked_backwards=float(untracked),
            drift_sqnorm=drift_sqnorm,
            mean_update_sqnorm=self.local.mean_update,
            hooks=float(self._hooks.count),
            late=float(late),
        )
        return self.ledgers.compose(ledger, row, measured, self._device())

    def _check(self, ledgers: Ledgers, step: int, *, gradients: bool) -> tuple[Ledgers, np.ndarray]:
        """Raise what all ranks' ledgers show to be wrong; see :meth:`StepState.check`.

        Returns:
            The ledgers, with their rows where those must be known, and what terms told, by rank.
        """
        ledgers, told = self.ledgers.with_rows(ledgers)
        self.state.check(ledgers, step, self.communicator(), gradients=gradients)
        return ledgers, told

    def _receive(self) -> Ledgers:
        """Wait for all ranks' ledgers; raise what they show to be wrong."""
        if self._judged is None:
            ledgers, there = self.ledgers.receive()
            step = self.state.log.steps + 1
            # Gradients that are not finite are the update's: a GradScaler may skip it.
            self._judged = self._check(ledgers, step, gradients=False)
            if self._losses is not None:
                self.state.log.losses = self._losses.reports(step)
            if there:
                self.reducer.set_used(there)
        return self._judged[0]

    def synchronize(self, late: bool = False) -> None:
        """Reduce what is not reduced, wait, judge the step, and set every ``.grad``.

        `late`: whether it is the update that asks for it.
        """
        self.state.raise_held()
        phase = self.state.phase
        if not self.included or phase.now in (Phase.SYNCHRONIZED, Phase.RETIRED):
            phase.to(Event.FINISH)
            return
        self.state.outcome = Outcome()
        try:
            watch.check()
            self.passes.interrupt()
            if not phase.done:
                self._prepare()
                self._hooks.stash(phase.passes)
            if self.local.now:
                self._finish_local()
                return
            with self.state.timer.exchange():
                self._finish(late)
        except BaseException:
            self.abort()
            raise

    def _finish(self, late: bool) -> None:
        """Finish a step of all ranks' gradients."""
        state, reducer = self.state, self.reducer
        self._hooks.adopt()
        if self._losses is not None:  # this rank may have had no backward pass
            self._losses.start()
        with self._waiting():
            if not reducer.planned:
                self._make_plan(late)
            self._launch(late)
            ledgers = self._receive()
        denominator = state.scale.denominator(ledgers.total("denominator"))
        with self._waiting():
            reducer.finish(denominator)
        step = state.log.steps + 1
        if state.conclude(ledgers, reducer.exceeds):
            assert self._judged is not None
            self._close(*self._judged, step, reducer.travelled(self.message_counts()["messages"]))
        else:  # a step that terms do not see
            state.log.keep(ledgers, step)
        self._publish(differ=ledgers.differs("hooks"))
        if ledgers.total("late"):  # what is done to gradients before the update is not done on those ranks
            self._hooks.watch_gradients()
        self._measure(ledgers)
        state.agree_on_factor(ledgers)

    def _close(self, ledgers: Ledgers, told: np.ndarray, step: int, comm_stats: CommStats) -> None:
        """Let the terms look at a finished step, and keep it; `told` is what they told, by rank."""
        if self.controller.terms:
            table = np.hstack([ledgers.rows, told])
            self.controller.on_step_end(step, table, comm_stats, self.objective.reduction)
        self.state.log.keep(ledgers, step)

    def _publish(self, *, differ: bool = False) -> None:
        """Give the parameters what was set aside before, let the user's hooks see it, and end the step.

        `differ`: whether ranks have different hooks, which then must not change anything.
        """
        self._hooks.run(self.reducer.restore_sparse, self._check_hooks if differ else None)
        self.state.log.steps += 1
        watch.on_step(self.name)
        self._begin_step()
        if self._losses is not None:
            self._losses.begin_step()
        self.state.phase.to(Event.FINISH)

    def _check_hooks(self, changed: bool) -> None:
        """Raise on all ranks if hooks that not all of them have changed something; one small all-reduce.

        Raises:
            AgreementError: they did.
        """
        told = np.zeros(self.process_set.size())
        told[self.process_set.rank()] = changed
        told = self.communicator().all_reduce(told, f"{self.name}.hooks")
        if not told.any():
            return
        ranks = ", ".join(str(rank) for rank, flag in enumerate(told) if flag)
        raise AgreementError(
            f"step {self.state.log.steps + 1}: hooks on parameters changed gradients on rank(s) {ranks}, and "
            f"not all ranks have the same hooks, so that they would train apart. Nothing was updated. Set "
            f"hooks that change a gradient on every rank; those that only look at it may be one rank's"
        )

    # -- the plan ---------------------------------------------------------------------------------

    def _make_plan(self, late: bool) -> None:
        """Agree with all ranks on the parameters, make the buckets, and fill them with this step."""
        parameters, reducer = self.parameters.all(), self.reducer
        agreed = check_consistency(
            self.communicator(),
            reducer.infos(),
            lambda: checksums(parameters),
            reducer.order(),
            {
                **self.objective.settings(),
                "backward_passes_per_step": self.state.phase.passes,
                **reducer.settings(),
            },
            name=f"{self.name}.agree",
            broadcast="Call hvd.broadcast_parameters(model.state_dict(), root_rank=0) before the first step.",
        )
        self.controller.prepare(self.communicator())
        self._drop_if_nonfinite()
        self._send_ledger(late)
        factor = self._measure(self._receive())  # gradients held so far are in the old unit
        if self._losses is not None:
            self._losses.check_outside([self.parameters.name(p) for p in parameters])
        reducer.plan(agreed.parameters, agreed.order, lambda dtype: self.ledgers.message(dtype).length)
        self.state.sums.scale = self.state.sums.scale * factor
        reducer.fill_plan(factor, self.communicator())

    def _measure(self, ledgers: Ledgers) -> float:
        return self.state.measure(ledgers, self.reducer.is_half(), self.options.predivide)

    def expect(self, weights: Mapping[str, float], passes: int) -> None:
        """Send what this rank's step will weigh; see the optimizer's method."""
        if not isinstance(self.objective, Objectives):
            raise UsageError(
                "optimizer.expect() is for several objectives; the weights of one travel with the gradients. "
                "Leave it out"
            )
        if self._losses is not None:  # else this rank takes no part
            watch.check()
            if not self.state.phase.done:
                self._prepare()
            self._losses.expect(weights, passes)

    def message_counts(self) -> dict[str, int]:
        """Return how many messages a step sends, and what they hold."""
        return self.reducer.counts(bool(self.controller.width) + 2 * (self._losses is not None))

    def _choices(self) -> dict[str, Any]:
        return {**self.options.tuning.as_dict(), **launched(hvd), "comm_plan": self.message_counts()}

    # -- local steps ------------------------------------------------------------------------------

    def _finish_local(self) -> None:
        """Set every ``.grad`` to this rank's own gradient; a step without weight, or unsound, has none."""
        state, reducer, sums, local = self.state, self.reducer, self.state.sums, self.local
        reducer.keep_local(sums.scale)
        if not local.diverged:  # whatever was done or loaded in between is equal on all ranks
            local.save_parameters()
        row, untracked = sums.row, sums.untracked
        found, scale, *told = _floats(reducer.nonfinite(), sums.scale, *([] if row is None else [row]))
        outcome = local_outcome(told, untracked, bool(found), state.drops)
        reducer.finish(1.0 if outcome.action is Action.EMPTY else scale)
        if state.drops and row is not None and (found or told[_NONFINITE] > 0):
            row = zeroed(row)
        local.count(row, untracked, bool(found) and state.drops)
        self._publish()
        for p in self.parameters.frozen:  # waits for the next exchange
            p.grad = None
        state.outcome = outcome
        if outcome.action is not Action.EMPTY:
            local.add_proximal_gradient()
            return
        for p in self.parameters.all():  # the exchange tells all ranks what was wrong
            if p.grad is not None:  # a GradScaler wants to see some
                p.grad = torch.zeros_like(p.grad)

    def exchange(self) -> None:
        """Average the ranks' parameters, if steps were taken since they were equal."""
        state, local = self.state, self.local
        local.due = False
        if not local.diverged:
            return
        with state.timer.exchange():
            flats, weight, moved = local.updates()
            sums = local.sums
            own = self._own_ledger(sums.row, sums.untracked, float(sums.nonfinite), drift_sqnorm=moved)
            message = self.ledgers.message()
            table = message.write(own)
            told_all = self.ledgers.wire.send(table, f"{self.name}.stretch")
            waits, comm_stats = local.send(flats, weight, self.reducer.wire)
            who = group_ranks(hvd, self.process_set)
            with watch.waiting(f"{self.name}.exchange.{state.log.steps}", who):
                for wait in (told_all, *waits):
                    wait()
            try:
                ledgers, told = self._check(message.read(table.cpu()), state.log.steps, gradients=True)
                total = ledgers.total("denominator")
                if self.objective.reduction == "sum":
                    total = float(np.count_nonzero(ledgers.column("denominator") > 0))
                self._close(ledgers, told, state.log.steps, comm_stats)
            except BaseException:
                local.restore_parameters()
                raise
            local.apply(flats, total)
            if not local.wanted:  # from here on gradients are equal, and so must updates be
                average_optimizer_state(
                    self.parameters.optimizer,
                    weight / total,
                    self.ledgers.wire,
                    self.communicator(),
                    self.name,
                )

    # -- the update -------------------------------------------------------------------------------

    def should_update(self, scaler: bool = False) -> bool:
        """Return whether to update, by what the step came to; forget gradients of a step without.

        Args:
            scaler: whether a GradScaler tells the update itself what is not finite.

        Raises:
            NonFiniteGradientError: a gradient is NaN or infinite, and such a step is not to be skipped.
            UsageError: what was done to this rank's gradients was not done on all ranks.
        """
        outcome = self.state.take_outcome(self._changed)
        if outcome.action is Action.EMPTY or outcome.updates(scaler):
            return outcome.updates(scaler)
        for p in self.parameters.all():
            p.grad = None
        if outcome.action is Action.SKIP_LOCAL:
            self.local.sums.nonfinite += 1  # the exchange tells all ranks
        elif outcome.error is not None:
            self.state.log.undo()  # as for any other error
            raise outcome.error
        else:
            self.state.log.skipped += 1
        return False

    def _changed(self) -> UsageError | None:
        """Return the error of gradients that were changed on this rank, and cannot have been on all."""
        if not self._hooks.gradients_changed():
            return None
        return late_error(self.state.log.steps, self.process_set.rank())

    def updated(self) -> None:
        """After an update, exchange parameters, and compare those of all ranks, if that is due."""
        if self.local.due:
            self.exchange()
        elif self.local.diverged:
            return
        log = self.state.log
        log.notify()
        if due(log.steps, self.options.check_every) and log.steps:
            named = [(self.parameters.name(p), p) for p in self.parameters.all()]
            when = f"{self.name} after step {log.steps}"
            check_synchronized(named, process_set=self.process_set, when=when)

    def clear(self) -> None:
        """Drop the gradients of the step, before the next forward pass.

        Raises:
            UsageError: they are under way.
        """
        self.state.raise_held()
        phase = self.state.phase
        if self._losses is not None and self._losses.began:
            phase.refuse(Event.CLEAR)
        phase.to(Event.CLEAR)
        # An update was skipped (a GradScaler does that), which must not keep others waiting, or there are
        # more parameters to train.
        if self.local.due or self.parameters.unfrozen():
            self.exchange()
        self.state.log.notify()
        self._begin_step()

    def abort(self) -> None:
        """Finish what is under way, drop it, and be ready for a fresh step."""
        try:
            self.ledgers.drain()
            self.reducer.drain()
            if self._losses is not None:
                self._losses.drain()
        finally:
            self._begin_step()
            if self._losses is not None:
                self._losses.begin_step()
            self.state.phase.abort()


def _floats(*values: Any) -> list[float]:
    """Return numbers and tensors as numbers, one after the other; a device is waited for once."""
    if not any(isinstance(value, torch.Tensor) for value in values):
        return [float(value) for value in values]
    parts = [torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in values]
    device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
    return torch.cat(
        [part if part.device == device else to_device_async(part, device) for part in parts]
    ).tolist()

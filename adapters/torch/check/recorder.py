"""What one rank writes of each step of a script: gradients as they are, and what the right one is made of."""

from __future__ import annotations

import functools
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import torch
from hvdloss.torch.check.forwards import LOW, Forwards, depends_on_many
from hvdloss.torch.check.graph import Unreadable, arrive
from hvdloss.torch.check.losses import Calls, LossCall, Sums
from hvdloss.torch.check.parameters import Parameters, sampled
from hvdloss.torch.passes import parameters_of
from torch.optim import optimizer as optimizers
from torch.utils.data import distributed as samplers

__all__ = ["Enough", "Recorder"]

Sampled = dict[str, Any]  # by the parameter's name


class Enough(BaseException):
    """The script has trained for as many steps as are looked at.

    Not an ``Exception``: a script that goes on after errors must end, too.
    """


class Window:
    """What the backward passes since the last step add up to."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all of it."""
        self.passes: list[list[dict[str, Any]]] = []
        self.sums: dict[int, Sampled] = defaultdict(dict)  # by the loss's place in a pass
        self.averaged: Sampled = {}
        self.penalty: Sampled = {}
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        """Note, once, what cannot be told."""
        if text not in self.problems:
            self.problems.append(text)

    def drop(self, names: set[str]) -> None:
        """Forget gradients of parameters that a script sets to zero."""
        for part in (*self.sums.values(), self.averaged, self.penalty):
            for name in names & part.keys():
                del part[name]
        if not any((*self.sums.values(), self.averaged, self.penalty)):
            self.clear()


def _add(part: Sampled, name: str, gradient: Any) -> None:
    part[name] = part[name] + gradient if name in part else gradient


class Recorder:
    """Watches a script and writes ``RANK.jsonl`` and ``RANK-STEP.npz``.

    Args:
        folder: where to.
        rank: this process's number.
        steps: after so many :class:`Enough` is raised, at the next sign of training.
    """

    def __init__(self, folder: Path, rank: int, steps: int) -> None:
        self._folder, self._rank, self._steps = folder, rank, steps
        self._parameters = Parameters()
        self._forwards = Forwards(self._parameters, self._go_on)
        self._calls = Calls(self._forwards.embedded)
        self._window = Window()
        self._observed: Sampled = {}
        self._clipped: set[str] = set()
        self._sampler: dict[str, Any] | None = None
        self._scale, self._low, self._step = 1.0, False, 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See what the script does."""
        with ExitStack() as stack:
            pre = optimizers.register_optimizer_step_pre_hook(self._before_step)
            post = optimizers.register_optimizer_step_post_hook(self._after_step)
            stack.callback(pre.remove)
            stack.callback(post.remove)
            self._wrap(stack, torch.autograd, "backward", self._before_backward, around=True)
            for name in ("clip_grad_norm_", "clip_grad_value_"):
                for owner in (torch.nn.utils, torch.nn.utils.clip_grad):
                    self._wrap(stack, owner, name, self._before_clipping)
            for owner in (torch.optim.Optimizer, torch.nn.Module):
                self._wrap(stack, owner, "zero_grad", self._before_zero)
            self._wrap(stack, torch.amp.GradScaler, "scale", self._before_scaling)
            self._wrap(stack, samplers.DistributedSampler, "__iter__", self._before_sampling)
            stack.enter_context(self._forwards.watched())
            stack.enter_context(self._calls.of_objectives())
            stack.enter_context(self._calls)
            yield

    def _wrap(
        self, stack: ExitStack, owner: Any, name: str, before: Callable[..., None], around: bool = False
    ) -> None:
        """Have a function preceded by one of ours; `around`: and nothing seen as long as it runs."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if args and inspect.isgenerator(args[0]):
                args = (list(args[0]), *args[1:])  # which it gives once
            before(*args, **kwargs)
            if not around:
                return plain(*args, **kwargs)
            self._forwards.looking = False
            try:
                with self._calls.paused():
                    return plain(*args, **kwargs)
            finally:
                self._forwards.looking = True

        setattr(owner, name, wrapped)
        stack.callback(setattr, owner, name, plain)

    def _go_on(self) -> None:
        if self._step >= self._steps:
            raise Enough

    # -- backward passes ------------------------------------------------------------------------------

    def _before_backward(self, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        self._go_on()
        self._observed.clear()
        self._clipped.clear()
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        given = [grad_tensors] if isinstance(grad_tensors, torch.Tensor) else list(grad_tensors or [])
        given += [None] * (len(tensors) - len(given))
        roots = [(t, torch.ones_like(t) if g is None else g) for t, g in zip(tensors, given, strict=True)]
        with self._calls.paused():
            try:
                self._read(roots)
            except Unreadable as found:
                self._window.passes.append([])
                self._window.problem(str(found))
            except RuntimeError as error:  # of PyTorch: a graph that cannot be differentiated twice, say
                self._window.passes.append([])
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                self._window.problem(f"the backward pass cannot be looked into: {text}")
        self._calls.calls.clear()
        self._forwards.inputs.clear()
        self._forwards.results.clear()

    def _read(self, roots: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add to the window what a backward pass is made of."""
        stops = {call.node: call for call in self._calls.calls}
        with torch.no_grad():
            arrived = arrive(roots, stops, self._forwards.outputs)
        calls = [call for call in self._calls.calls if call.node in arrived.at_losses]
        self._window.passes.append([])
        for index, call in enumerate(calls):
            sums = call.sums(arrived, self._scale)
            self._window.passes[-1].append(
                {
                    "name": call.name,
                    "reduction": call.reduction,
                    "ours": call.ours,
                    "factor": sums.factor,
                    "numerator": float(sums.numerator.detach().double()),
                    "denominators": sums.denominators,
                    "elements": sums.present.numel(),
                    "present": int(sums.present.sum()),
                }
            )
            for name, gradient in self._gradients(sums.numerator, sums.factor or 1.0).items():
                _add(self._window.sums[index], name, gradient)
                _add(self._window.averaged, name, sums.factor * gradient)
            self._probe(call, sums)
        gradients = {id(leaf): gradient for leaf, gradient in arrived.at_leaves}
        for name, leaf in self._parameters.of(leaf for leaf, _ in arrived.at_leaves).items():
            found = sampled(gradients[id(leaf)], leaf.numel()) / self._scale
            _add(self._window.penalty, name, found)
            _add(self._window.averaged, name, found)

    def _gradients(self, numerator: torch.Tensor, factor: float) -> Sampled:
        """Return the gradient of this rank's elements, and of nothing else, by no path that a hook sees.

        The pass begins with what the script's own will, for the same rounding; that is undone.
        """
        if numerator.grad_fn is None:
            return {}
        leaves = self._parameters.of(parameters_of([numerator.grad_fn]))
        if not leaves:
            self._window.problem("the loss leads to no parameter that its model shows under a name")
            return {}
        found = torch.autograd.grad(
            numerator,
            list(leaves.values()),
            torch.full_like(numerator, factor * self._scale),
            retain_graph=True,
            allow_unused=True,
        )
        self._low |= any(g is not None and g.dtype in LOW for g in found)
        return {
            name: sampled(gradient, leaf.numel()) / (factor * self._scale)
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
            if gradient is not None
        }

    def _probe(self, call: LossCall, sums: Sums) -> None:
        """Look whether an element of the loss depends on more than its own sample.

        As often on every rank: a sharded model exchanges something in each backward pass.
        """
        forwards = self._forwards
        # Layers that normalise mix samples, which is said elsewhere; what comes after them is looked at.
        probes = forwards.results + ([] if forwards.batch_norms or forwards.synchronized else forwards.inputs)
        flat, present = sums.losses.reshape(-1), sums.present.reshape(-1).nonzero().reshape(-1)
        for end in (0, -1):
            one = flat[int(present[end])] if len(present) else flat.sum()
            if not probes or one.grad_fn is None:
                continue
            found = torch.autograd.grad(one, probes, retain_graph=True, allow_unused=True)
            if len(present) and any(g is not None and depends_on_many(g) for g in found):
                self._window.problem(
                    f"an element of {call.name} depends on several samples of its batch, which one process "
                    f"would have more of"
                )

    # -- what is done to gradients --------------------------------------------------------------------

    def _observe(self, parameters: Any) -> None:
        """Note gradients that were not clipped before."""
        for name, p in self._parameters.of(parameters).items():
            if name not in self._clipped:
                self._observed[name] = sampled(p.grad, p.numel())

    def _before_clipping(self, parameters: Any, *args: Any, **kwargs: Any) -> None:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        self._observe(parameters)
        self._clipped |= self._parameters.of(parameters).keys()

    def _before_zero(self, owner: Any, *args: Any, **kwargs: Any) -> None:
        self._go_on()
        groups = getattr(owner, "param_groups", None)
        owned = owner.parameters() if groups is None else [p for group in groups for p in group["params"]]
        self._window.drop(set(self._parameters.of(owned)))

    def _before_scaling(self, scaler: Any, *args: Any, **kwargs: Any) -> None:
        self._scale = float(scaler.get_scale())

    def _before_sampling(self, sampler: Any) -> None:
        found = {
            "samples": len(sampler.dataset),
            "ranks": sampler.num_replicas,
            "total": sampler.total_size,
        }
        if self._sampler is None or found["samples"] > self._sampler["samples"]:  # that of training
            self._sampler = found

    # -- steps ----------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if self._step >= self._steps:
            return None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._observe(parameters)
            return None
        first = True

        def observed() -> Any:
            nonlocal first
            value = closure()
            if first:
                self._observe(parameters)
            first = False
            return value

        if len(args) > 1:
            return (args[0], observed, *args[2:]), kwargs
        return args, {**kwargs, "closure": observed}

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        named = self._parameters.of(p for p in parameters if p.requires_grad)
        if not named or not named.keys() & self._observed.keys() or self._step >= self._steps:
            return
        self._write(optimizer, named)
        self._step += 1
        for name in named:
            self._observed.pop(name, None)
        self._window.drop(set(named))
        if not named.keys() & self._window.averaged.keys():
            self._window.clear()
            self._forwards.clear()

    def _reduced_by(self, optimizer: Any) -> str:
        """Return who reduces gradients, as far as this process shows it."""
        if hasattr(optimizer, "_hvdloss"):
            return "hvdloss"
        return "Horovod" if hasattr(optimizer, "synchronize") else self._forwards.wrapper

    def _dtype(self, parameters: Iterable[torch.Tensor]) -> str:
        """Return in what gradients were computed: the least exact of it."""
        if self._low or self._forwards.low:
            return "16 bits"
        parameters = list(parameters)
        short = any(p.is_cuda for p in parameters) and (
            torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        )
        if all(p.dtype == torch.float64 for p in parameters):
            return "float64"
        return "TF32" if short else "float32"

    def _write(self, optimizer: Any, named: dict[str, torch.Tensor]) -> None:
        sizes = {name: p.numel() for name, p in named.items()}

        def flat(part: Sampled) -> Any:
            return np.concatenate([part[n] if n in part else sampled(None, sizes[n]) for n in named])

        arrays = {
            "observed": flat(self._observed),
            "averaged": flat(self._window.averaged),
            "penalty": flat(self._window.penalty),
            **{f"sum{index}": flat(part) for index, part in self._window.sums.items()},
        }
        np.savez(self._folder / f"{self._rank}-{self._step}.npz", **arrays)
        forwards = self._forwards
        line = {
            "optimizer": type(optimizer).__name__,
            "reduced_by": self._reduced_by(optimizer),
            "names": list(named),
            "sizes": [len(sampled(None, size)) for size in sizes.values()],
            "dtype": self._dtype(named.values()),
            "passes": self._window.passes,
            "problems": self._window.problems,
            "norms": [_norm(p) for p in named.values()],
            "rows": forwards.rows,
            "batch_norms": forwards.batch_norms,
            "random": forwards.random if forwards.dropout else "",
            "sampler": self._sampler,
        }
        with (self._folder / f"{self._rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def _norm(p: torch.Tensor) -> float:
    """Return the length of a parameter, by which ranks see whether theirs is the same; 0 for a shard."""
    return 0.0 if hasattr(p, "full_tensor") else float(p.detach().double().norm())

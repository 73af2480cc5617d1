"""Making ranks equal: a model's tensors, an optimizer's state, and objects, from one rank to all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

import torch
from hvdloss import watch
from hvdloss.comm.agreement import check_items_consistent, run_on_all_ranks
from hvdloss.comm.collectives import group_by_bytes, named_by_ordinal, resolve_group, root_index
from hvdloss.comm.messages import decode_errors, parse_json
from hvdloss.errors import ConfigError
from hvdloss.torch._backend import hvd
from hvdloss.torch.checkpoint import from_array, to_array
from hvdloss.torch.engines.group import EngineGroup
from hvdloss.torch.ops import communicator_of
from hvdloss.train.tree import flatten_tree, unflatten_tree

__all__ = [
    "Source",
    "allgather_object",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "state_from",
]

_ALIGNED = 16  # bytes; a view needs its dtype's alignment

broadcast_object = named_by_ordinal(hvd.broadcast_object)
allgather_object = named_by_ordinal(hvd.allgather_object)


class Source:
    """The ranks of a broadcast, and which of them it comes from.

    Raises:
        ConfigError: `root_rank` is none of them.
        UsageError: this rank is none of them.
    """

    def __init__(self, root_rank: int, process_set: Any, what: str) -> None:
        self.group, self.rank, self.size = resolve_group(hvd, process_set, what)
        self.root_rank = root_rank
        self.root = root_index(hvd, self.group, self.size, root_rank, what)
        self.here = self.rank == self.root
        self.communicator = communicator_of(self.group)

    def broadcast_bytes(self, text: bytes, name: str) -> bytes:
        """Return the root's bytes. Collectives: one gather."""
        return self.communicator.all_gather_bytes(text if self.here else b"", name)[self.root]

    def send(self, tensors: Iterable[torch.Tensor], name: str) -> None:
        """Broadcast the root's values of tensors with equal shapes and dtypes to every rank, in place.

        Collectives: one broadcast per 64 MiB, or tensor if that is larger.
        """
        held = list(tensors)
        for kind in sorted({t.device.type for t in held}):
            there = [t for t in held if t.device.type == kind]
            sizes = [t.numel() * t.element_size() for t in there]
            for number, places in enumerate(group_by_bytes(sizes)):
                self._send([there[i] for i in places], [sizes[i] for i in places], f"{name}.{kind}.{number}")

    def _send(self, tensors: list[torch.Tensor], sizes: list[int], name: str) -> None:
        aligned = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
        flat = torch.empty(sum(aligned), dtype=torch.uint8, device=tensors[0].device)
        places = [piece[:size] for piece, size in zip(flat.split(aligned), sizes, strict=True)]
        if self.here:
            flat.zero_()
            for place, t in zip(places, tensors, strict=True):
                place.copy_(_bytes(t))
        EngineGroup(self.group).broadcast(flat, self.root_rank, name, in_place=True).wait()
        if not self.here:
            for place, t in zip(places, tensors, strict=True):
                _write(t, place.view(t.dtype).view(t.shape))


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _written(t: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that has memory of its own, where an axis was expanded."""
    place = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())
    return t.detach()[place] if t.numel() else t.detach()


@torch.no_grad()
def _write(t: torch.Tensor, value: torch.Tensor) -> None:
    target = _written(t)
    target.copy_(value[tuple(slice(0, n) for n in target.shape)])


def _described(name: str, t: Any) -> tuple[str, list[Any]]:
    """Return what must be equal on all ranks for a tensor to be broadcast.

    Raises:
        ConfigError: it cannot be, naming it.
    """
    if not isinstance(t, torch.Tensor):
        raise ConfigError(
            f"broadcast_parameters: params[{name!r}] is a {type(t).__name__} and no tensor; leave it "
            f"out, and send it with broadcast_object"
        )
    problem = ""
    if isinstance(t, torch.nn.parameter.UninitializedTensorMixin):
        problem = "has no shape yet; run a batch through the model first, on every rank"
    elif t.layout is not torch.strided or t.is_quantized:
        kind = "quantized" if t.is_quantized else str(t.layout).removeprefix("torch.")
        problem = f"is a {kind} tensor; broadcast the dense tensors that it is made of"
    elif t.device.type == "meta":
        problem = "is on the meta device and has no values; materialise it first (module.to_empty)"
    if problem:
        raise ConfigError(f"broadcast_parameters: params[{name!r}] {problem}")
    expanded = [axis for axis, stride in enumerate(t.stride()) if stride == 0 and t.shape[axis] > 1]
    return name, [str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type, expanded]


def _pairs(params: Any) -> list[tuple[str, Any]]:
    """Return names and tensors of whatever Horovod takes, and of iterators."""
    if isinstance(params, dict):
        return sorted((str(name), value) for name, value in params.items())
    if isinstance(params, torch.Tensor | torch.nn.Module | str) or not isinstance(params, Iterable):
        raise ConfigError(
            f"broadcast_parameters: params is a {type(params).__name__}; pass model.state_dict(), or a "
            f"list of tensors or of (name, tensor) pairs"
        )
    pairs = [one if isinstance(one, tuple) and len(one) == 2 else (None, one) for one in params]
    return [(str(i) if name is None else str(name), value) for i, (name, value) in enumerate(pairs)]


def broadcast_parameters(params: Any, root_rank: int = 0, process_set: Any = None) -> None:
    """Broadcast one rank's values of parameters and buffers to every rank, in place.

    Of any dtype that PyTorch has, and any dense layout: channels_last, transposed, expanded, of no
    dimension, empty, one memory under two names. Horovod's own refuses many of these.

    A split model must not be broadcast to all ranks: it would give every rank the root's part of the head.
    Broadcast it among the ranks that share the data: ``broadcast_parameters(model.state_dict(),
    grid.data.ranks[0], process_set=grid.data)``. (Where all ranks seed alike nothing need be broadcast.)

    Args:
        params: a state dict, or tensors, or pairs of a name and a tensor.
        root_rank: as Horovod counts, among all ranks.
        process_set: the ranks; None for all.

    Raises:
        ConfigError: `root_rank` is not in the process set, or a tensor is sparse, quantized or without
            values; names it.
        AgreementError: ranks have other parameters: names the first one. Nothing has changed.
        UsageError: this rank is not in the process set.

    Collectives: one gather of a few bytes, and one broadcast per 64 MiB.
    """
    source = Source(root_rank, process_set, "broadcast_parameters")
    pairs = _pairs(params)

    def described() -> list[tuple[str, Any]]:
        descriptions = [_described(name, t) for name, t in pairs]
        first: dict[Any, str] = {}  # name of each memory: what is tied on one rank only is another model
        for (name, value), (_, t) in zip(descriptions, pairs, strict=True):
            if t.numel():
                value.append(first.setdefault((t.data_ptr(), t.device), name))
        return [("root_rank", root_rank), *descriptions]

    if source.size == 1:
        described()
        return
    check_items_consistent(
        source.communicator,
        described,
        name="hvdloss.broadcast_parameters",
        what="broadcast_parameters: tensor",
        remedy="Build the same model on every rank, and pass the same names and root_rank.",
    )
    with watch.waiting("broadcast_parameters"):
        source.send((t for _, t in pairs), "hvdloss.broadcast_parameters")


def state_from(tree: Any, source: Source, name: str) -> Any:
    """Return the root's tree of plain values and tensors, these on the CPU; nothing is pickled.

    Args:
        tree: this rank's, of which only the root's counts.
        source: the ranks, and the root.
        name: of the exchange.

    Raises:
        RankError: the root's tree holds something else; on every rank, naming its place.

    Collectives: two gathers, and one broadcast per 64 MiB.
    """
    if source.size == 1:
        return tree
    held: list[Any] = []

    def apart() -> None:
        held.extend(flatten_tree(tree, to_array, name=name) if source.here else (None, {}))

    run_on_all_ranks(source.communicator, apart, f"{name}.state", name)
    structure, arrays = held
    kinds = [[key, array.dtype.str, list(array.shape)] for key, array in arrays.items()]
    header = source.broadcast_bytes(json.dumps([structure, kinds]).encode(), name)
    with decode_errors("state", source.root):
        structure, kinds = parse_json(header)
        received = {
            key: arrays[key] if source.here else np.empty(shape, dtype) for key, dtype, shape in kinds
        }
    source.send((torch.from_numpy(a.reshape(-1).view(np.uint8)) for a in received.values() if a.size), name)
    return tree if source.here else unflatten_tree(structure, received, from_array)


def _moved(value: Any, device: torch.device) -> Any:
    """Return a value of an optimizer's state with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_moved(one, device) for one in value)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    return value


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int = 0, model: Any = None, process_set: Any = None
) -> None:
    """Broadcast one rank's optimizer state and options (learning rates and the like) to every rank.

    Nothing else changes: no step is taken, no gradient touched, and on the root nothing at all. State that
    the root does not have yet, before its first step, no rank has afterwards. (Horovod's own takes a step
    with gradients of zero on every rank, so that Adam's first real step is its second, and decays weights.)

    Args:
        optimizer: any of PyTorch's or yours, wrapped or not, LBFGS too; its state must be of numbers,
            strings, None, tensors, and dicts, lists and tuples of these.
        root_rank: as Horovod counts, among all ranks.
        model: accepted for Horovod's sake.
        process_set: the ranks; None for all.

    Raises:
        ConfigError: `root_rank` is not in the process set.
        AgreementError: the optimizers hold other parameters: names the first one. Nothing has changed.
        RankError: the root's state holds something else; names its place.
        UsageError: this rank is not in the process set.

    Collectives: four small gathers, and one broadcast per 64 MiB.
    """
    source = Source(root_rank, process_set, "broadcast_optimizer_state")
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]

    def described() -> list[tuple[str, Any]]:
        own = [
            (f"param_groups[{i}]['params'][{j}]", list(p.shape))
            for i, group in enumerate(groups)
            for j, p in enumerate(group["params"])
        ]
        return [("root_rank", root_rank), *own]

    if source.size == 1:
        return
    check_items_consistent(
        source.communicator,
        described,
        name="hvdloss.broadcast_optimizer_state",
        what="broadcast_optimizer_state: parameter",
        remedy="Construct the optimizer with the same parameters, in the same groups, on every rank.",
    )
    states = [(i, optimizer.state[p]) for i, p in enumerate(parameters) if p in optimizer.state]
    tree = [
        [{key: value for key, value in group.items() if key != "params"} for group in groups],
        states,
        # Counts of steps lie on the CPU, whatever the parameters do.
        [
            [i, key]
            for i, state in states
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" != parameters[i].device.type
        ],
    ]
    with watch.waiting("broadcast_optimizer_state"):
        options, states, on_cpu = state_from(tree, source, "hvdloss.optimizer_state")
    if source.here:
        return
    # The dicts stay the same objects: schedulers, and the optimizer that was wrapped, hold them.
    for group, given in zip(groups, options, strict=True):
        for key in [key for key in group if key != "params" and key not in given]:
            del group[key]
        for key, value in given.items():
            mine = group.get(key)  # a learning rate may be a tensor
            group[key] = _moved(value, mine.device) if isinstance(mine, torch.Tensor) else value
    stays = {(i, key) for i, key in on_cpu}
    optimizer.state.clear()
    for i, state in states:
        device = parameters[i].device
        optimizer.state[parameters[i]] = {
            key: value if (i, key) in stays else _moved(value, device) for key, value in state.items()
        }

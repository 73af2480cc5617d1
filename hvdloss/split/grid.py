"""Ranks in a grid: those that share a layer, those that share the data, and the stages of a model."""

from __future__ import annotations

from typing import Any, NamedTuple

from hvdloss.errors import ConfigError

__all__ = ["Grid", "GridRanks", "grid_ranks", "make_grid"]


class GridRanks(NamedTuple):
    """The groups of a grid of ranks.

    Attributes:
        model: ranks that share the layers of a stage.
        data: ranks with the same part of the model.
        pipe: ranks that are stages of one model, in their order.
    """

    model: list[list[int]]
    data: list[list[int]]
    pipe: list[list[int]]


def grid_ranks(size: int, model: int, stages: int = 1) -> GridRanks:
    """Return the groups of a grid of ranks.

    Rank ``(stage * replicas + replica) * model + part`` holds this part of this stage: neighbours share
    layers, since they exchange most often, and stages are furthest apart, since they exchange least.

    Args:
        size: how many ranks there are.
        model: how many share a layer.
        stages: how many consecutive parts a model has.

    Raises:
        ConfigError: the ranks cannot be cut so.

    >>> grid_ranks(4, 2)
    GridRanks(model=[[0, 1], [2, 3]], data=[[0, 2], [1, 3]], pipe=[[0], [1], [2], [3]])
    >>> grid_ranks(4, 1, stages=2)
    GridRanks(model=[[0], [1], [2], [3]], data=[[0, 1], [2, 3]], pipe=[[0, 2], [1, 3]])
    """
    for name, value, whole in (("model", model, size), ("stages", stages, size // (model or 1))):
        if not isinstance(value, int) or value < 1 or whole % value:
            among = f"{size} ranks" if name == "model" else f"{size} ranks with model={model}"
            raise ConfigError(
                f"{name}={value!r}: {among} cannot be cut into groups of so many; choose a divisor of {whole}"
            )
    replicas = size // (model * stages)
    rows = [list(range(first, first + model)) for first in range(0, size, model)]
    at = [rows[first : first + replicas] for first in range(0, len(rows), replicas)]
    return GridRanks(
        [ranks for stage in at for ranks in stage],
        [[ranks[part] for ranks in stage] for stage in at for part in range(model)],
        [[stage[replica][part] for stage in at] for replica in range(replicas) for part in range(model)],
    )


class Grid(NamedTuple):
    """Process sets of a grid of ranks, those that this rank is in.

    Attributes:
        model: the ranks with this one's samples and stage, each of which holds another part of its layers:
            for split layers and the split head's loss.
        data: the ranks with this one's part of the model, each of which has other samples: for
            ``DistributedOptimizer``, ``Objective``, ``check_synchronized``.
        pipe: the ranks with this one's samples, each of which is a stage of the model; None if the model
            is one stage.
        before, after: this rank and that of the stage before, or after it; None where there is none.
    """

    model: Any
    data: Any
    pipe: Any = None
    before: Any = None
    after: Any = None


_sets: dict[tuple[str, tuple[int, ...]], Any] = {}


def make_grid(hvd: Any, model: int, stages: int = 1) -> Grid:
    """Make the process sets of :func:`grid_ranks`, or find those made before; all ranks call it alike.

    Args:
        hvd: a Horovod module, or its one-process stand-in.
        model: how many ranks share a layer.
        stages: how many consecutive parts a model has.

    Raises:
        ConfigError: the ranks cannot be cut so, or process sets cannot be made.
    """
    rank, size = (hvd.rank(), hvd.size()) if hvd.is_initialized() else (0, 1)
    families = grid_ranks(size, model, stages)

    def own(groups: list[list[int]]) -> Any:
        """Make the set of each group, and return the one that this rank is in; None if it is in none."""
        made = [(ranks, _set_of(hvd, ranks, size)) for ranks in groups]
        return next((one for ranks, one in made if rank in ranks), None)

    model_set, data_set = own(families.model), own(families.data)
    if stages == 1:
        return Grid(model_set, data_set)
    pipe_set = own(families.pipe)
    links = [own([ranks[n : n + 2] for ranks in families.pipe]) for n in range(stages - 1)]
    stage = pipe_set.rank()
    return Grid(
        model_set,
        data_set,
        pipe_set,
        before=links[stage - 1] if stage else None,
        after=links[stage] if stage < stages - 1 else None,
    )


def _set_of(hvd: Any, ranks: list[int], size: int) -> Any:
    """Return the process set of these ranks, made if need be."""
    if len(ranks) == size:
        return hvd.global_process_set
    key = hvd.__name__, tuple(ranks)
    known = _sets.get(key)
    if known is None or known.process_set_id is None:  # removed
        try:
            known = hvd.add_process_set(ranks)
        except Exception as error:
            raise ConfigError(
                f"the process set of ranks {ranks} could not be made: {error}. Set "
                f"HOROVOD_DYNAMIC_PROCESS_SETS=1 in the environment of all ranks, or call "
                f'hvd.init(process_sets="dynamic")'
            ) from error
        _sets[key] = known
    return known

"""Streams of files and iterables: every row once, ends of which nobody knows, and failures known to all."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch_support import (
    before_case,
    difference,
    flat,
    gathered,
    generator,
    network,
    raises_everywhere,
    regression,
    same_on_all_ranks,
)
from torch_training import counted

import hvdloss
import hvdloss.torch as hvd
from hvdloss.data import Csv, NumpyFiles, Parquet, RowGroups
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 dist-2")

__all__ = ["before_case"]

ROWS = 103


@contextlib.contextmanager
def folder():
    """Give all ranks the same empty folder."""
    with tempfile.TemporaryDirectory() as own:
        try:
            yield Path(gathered(own)[0])
        finally:
            gathered("done")


def table() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    x = random.normal(size=(ROWS, 5))
    return {"id": np.arange(ROWS), "x": x, "y": x[:, :1] * 2 + random.normal(size=(ROWS, 1))}


def write_parquet(path: Path, group: int = 5) -> Parquet:
    """Write two files, on rank 0."""
    if hvd.rank() == 0:
        t = table()
        for number, rows in enumerate((slice(0, 60), slice(60, ROWS))):
            columns = {
                "id": t["id"][rows],
                "x": pa.FixedSizeListArray.from_arrays(pa.array(t["x"][rows].reshape(-1)), 5),
                "y": pa.FixedSizeListArray.from_arrays(pa.array(t["y"][rows].reshape(-1)), 1),
            }
            pq.write_table(pa.table(columns), path / f"part-{number}.parquet", row_group_size=group)
    gathered("written")
    return Parquet(path)


def seen_by_all(numbers: list[int]) -> collections.Counter[int]:
    return collections.Counter(i for text in gathered(json.dumps(numbers)) for i in json.loads(text))


def everything() -> collections.Counter[int]:
    return collections.Counter(range(ROWS))


def case_every_row_of_files_once_per_epoch():
    with folder() as path:
        sources: list[Any] = [write_parquet(path)]
        t = table()
        if hvd.rank() == 0:
            flat_table = pa.table({"id": t["id"], "word": [f"w{i}" for i in t["id"]], "y": t["y"][:, 0]})
            pyarrow.csv.write_csv(flat_table, path / "t.csv")
            for name in ("id", "x"):
                np.save(path / f"{name}.npy", t[name])
        gathered("written")
        sources.append(Csv(path / "t.csv", part_bytes=300))
        sources.append(NumpyFiles({"id": path / "id.npy", "x": path / "x.npy"}, part_rows=10))
        for source in sources:
            for options in (
                {},
                {"num_workers": 2, "persistent_workers": True},
                {"sharding": RowGroups(source.rows, seed=2, shares=[1 + r for r in range(hvd.size())])},
                {"sharding": RowGroups(source.rows, whole=True, shuffle=False), "num_workers": 1},
            ):
                loader = hvd.StreamLoader(source, 4, **options)
                orders = []
                for _ in range(2):
                    steps, numbers = len(loader), []
                    same_on_all_ranks(steps)
                    batches = list(loader)
                    assert len(batches) == steps
                    for batch in batches:
                        assert batch["id"].dtype == torch.int64
                        for name in ("x", "y"):
                            if name in batch:
                                assert torch.equal(
                                    batch[name], torch.from_numpy(t[name])[batch["id"]].view_as(batch[name])
                                )
                        if "word" in batch:
                            assert list(batch["word"]) == [f"w{i}" for i in batch["id"].tolist()]
                        numbers += batch["id"].tolist()
                    assert seen_by_all(numbers) == everything(), (source, options)
                    orders.append(numbers)
                if "sharding" not in options:
                    assert orders[0] != orders[1]  # shuffled anew


def case_an_epoch_goes_on_on_other_ranks_and_workers():
    with folder() as path:
        source = write_parquet(path)
        for data in (source, range(ROWS)):
            rows = (lambda b: b["id"]) if data is source else (lambda b: b)
            loader = hvd.StreamLoader(data, 3, num_workers=2)
            numbers, state = [], None
            for step, batch in enumerate(loader):
                numbers += rows(batch).tolist()
                if step == 2:
                    break
            state = json.loads(json.dumps(loader.state_dict()))
            same_on_all_ranks(state)
            for workers in (1, 0):  # some more steps in the same number of ranks, on other workers
                loader = hvd.StreamLoader(data, 3, num_workers=workers)
                loader.load_state_dict(state)
                for batch in loader:
                    numbers += rows(batch).tolist()
                    break
                state = loader.state_dict()
            few = hvd.add_process_set([0]) if hvd.size() > 1 else hvd.global_process_set
            if hvd.rank() == 0:
                rest = hvd.StreamLoader(data, 3, process_set=few, num_workers=3)
                rest.load_state_dict(state)
                for batch in rest:
                    numbers += rows(batch).tolist()
            if hvd.size() > 1:
                hvd.remove_process_set(few)
            assert seen_by_all(numbers) == everything(), data


def batches_of(counts: list[int], seed: int = 3) -> list[list[Any]]:
    """Return batches of every rank: so many, of different sizes."""
    sizes = [[2 + (i + rank) % 3 for i in range(count)] for rank, count in enumerate(counts)]
    return [[(b.x, b.y) for b in row] for row in regression(generator(seed), sizes, weighted=False)]


def uneven_counts() -> list[list[int]]:
    """Return numbers of batches per rank: one with more, one with none, only the last one with any."""
    size = hvd.size()
    return [
        [3 + 2 * rank for rank in range(size)],
        [5 * (rank % 2) for rank in range(size)],
        [0] * (size - 1) + [3],
        [4] * size,
    ]


def reference(batches: list[list[Any]], passes: int) -> tuple[torch.nn.Module, int]:
    """Train one process on the same global batches."""
    one = network(generator(2))
    optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    steps = max(-(-len(own) // passes) for own in batches)
    for step in range(steps):
        group = [b for own in batches for b in own[step * passes : (step + 1) * passes]]
        x, y = (torch.cat(part) for part in zip(*group, strict=True))
        optimizer.zero_grad()
        ((one(x) - y) ** 2).mean().backward()
        optimizer.step()
    return one, steps


def trained(batches: Any, passes: int = 1, terms: Any = ()) -> tuple[torch.nn.Module, Any, int]:
    model = network(generator(2))
    objective = hvd.Objective("mse", terms=terms)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
        model.named_parameters(),
        objective,
        backward_passes_per_step=passes,
    )
    given = 0
    for x, y in hvd.uneven(batches, optimizer):
        objective(model(x), y).backward()
        given += 1
        if given % passes == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer, given


@needs("gloo-2", more="gloo-3 mpi-2 dist-2")
def case_ends_that_nobody_knows_are_one_process_with_the_same_global_batches():
    errors = []
    for number, counts in enumerate(uneven_counts()):
        for passes in (1, 2):
            batches = batches_of(counts, seed=number)
            own = batches[hvd.rank()]
            model, optimizer, given = trained((b for b in own), passes)
            one, steps = reference(batches, passes)
            assert given == steps * passes, (counts, passes, given)
            assert optimizer.last_step.step == steps
            errors.append(difference(flat(model.parameters()), flat(one.parameters())))
            assert errors[-1] < 1e-12, (counts, passes, errors)
    model = network(generator(2))
    model, optimizer, given = trained(iter(()))  # no rank has any
    assert given == 0
    assert optimizer.last_step is None
    return {"error, float64": max(errors)}


@needs("gloo-2", more="gloo-3 mpi-2 dist-2")
def case_the_flag_costs_no_message():
    counts = [3 + 4 * rank for rank in range(hvd.size())]
    own = batches_of(counts)[hvd.rank()]
    model = network(generator(2))
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters(), objective
    )
    steps = []
    with counted() as calls:
        for x, y in hvd.uneven(own, optimizer):
            before = collections.Counter(calls)
            objective(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(dict(calls - before))
    assert len(steps) == max(counts)
    travel = optimizer.last_step.choices["comm_plan"]["messages"]
    assert all(step == {"allreduce_async_": travel} for step in steps[1:]), (travel, steps)


def case_local_steps_end_together():
    counts = [2 + 5 * rank for rank in range(hvd.size())]
    terms = (hvdloss.CommunicationCost(policies=(hvdloss.terms.policies.SyncPeriod(3),)),)
    model, optimizer, given = trained(batches_of(counts)[hvd.rank()], terms=terms)
    same_on_all_ranks(flat(model.parameters()).tolist())
    same_on_all_ranks(given)
    assert max(counts) <= given < max(counts) + 3
    del optimizer


class Failing:
    """Batches that end in an error, on one rank."""

    def __init__(self, batches: list[Any], rank: int, after: int, error: Exception) -> None:
        self.batches, self.bad, self.after, self.error = batches, hvd.rank() == rank, after, error

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if self.bad and number == self.after:
                raise self.error
            yield batch


@needs("gloo-2", more="gloo-3 mpi-2 dist-2")
def case_what_one_rank_cannot_read_is_raised_on_all():
    last = hvd.size() - 1
    for after, passes in ((0, 1), (1, 1), (3, 2)):
        batches = batches_of([7] * hvd.size())
        own = Failing(batches[hvd.rank()], last, after, KeyError("no such thing"))
        words = (f"rank {last}", "KeyError", "no such thing")
        raises_everywhere(hvdloss.RankError, lambda own=own, passes=passes: trained(own, passes), *words)
    # What was read before is used, and training can go on.
    batches = batches_of([3] * hvd.size())
    model = network(generator(2))
    objective = hvd.Objective("mse")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
        model.named_parameters(),
        objective,
    )
    own = hvd.uneven(Failing(batches[hvd.rank()], 0, 2, ValueError("torn")), optimizer)

    def epoch(own: Any = own) -> None:
        for x, y in own:
            optimizer.zero_grad()
            objective(model(x), y).backward()
            optimizer.step()

    raises_everywhere(hvdloss.RankError, epoch, "rank 0: ValueError: torn")
    one, _ = reference([row[:2] for row in batches], 1)
    assert difference(flat(model.parameters()), flat(one.parameters())) < 1e-12
    assert optimizer.last_step.step == 2
    raises_everywhere(hvdloss.RankError, epoch, "rank 0: ValueError: torn")  # the next epoch has it again
    epoch(hvd.uneven(batches[hvd.rank()], optimizer))
    same_on_all_ranks(flat(model.parameters()).tolist())


def case_files_that_are_damaged_missing_or_changed():
    with folder() as path:
        source = write_parquet(path)
        victim = path / "part-1.parquet"

        def run(source: Any, spoil: Any, **options: Any) -> None:
            model = network(generator(2))
            objective = hvd.Objective("mse")
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters(), objective
            )
            loader = hvd.StreamLoader(
                source, 4, sharding=lambda rows: RowGroups(rows, shuffle=False), collate_fn=pair, **options
            )
            for number, (x, y) in enumerate(hvd.uneven(loader, optimizer)):
                if number == 0:
                    gathered("begun")
                    if hvd.rank() == 0:
                        spoil()
                    gathered("spoiled")
                optimizer.zero_grad()
                objective(model(x), y).backward()
                optimizer.step()

        kept = victim.read_bytes() if hvd.rank() == 0 else b""

        def damage() -> None:  # a page of the last row group, without a trace outside
            stamp = os.stat(victim)
            start = pq.ParquetFile(victim).metadata.row_group(8).column(1).data_page_offset
            with victim.open("r+b") as opened:
                opened.seek(start)
                opened.write(b"\xff" * 40)
            os.utime(victim, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

        spoils = {
            "was changed since it was opened": lambda: os.utime(victim),
            "there is no such file": victim.unlink,
            "cannot be read": damage,
        }
        last = hvd.size() - 1
        for workers, (words, spoil) in zip((0, 2, 0), spoils.items(), strict=True):
            ahead = {"prefetch_factor": 1} if workers else {}  # not so far that all is read by then
            run_it = functools.partial(run, source, spoil, num_workers=workers, **ahead)
            text = raises_everywhere(hvdloss.DataError, run_it, words, str(victim))
            assert "rank " in text, text
            if words == "cannot be read":
                assert f"rank {last}: {victim}, row group 8" in text, text
            if hvd.rank() == 0:
                victim.write_bytes(kept)
            gathered("mended")
            source = write_parquet(path)
        # One rank alone does not have the file, or has others.
        other = path / f"of-{hvd.rank()}"
        other.mkdir()
        if hvd.rank() != last:
            pq.write_table(pa.table({"x": [1.0] * (1 + hvd.rank())}), other / "a.parquet")
        if hvd.size() > 1:
            for loop in (list, unevenly):
                text = raises_everywhere(
                    hvdloss.DataError,
                    lambda loop=loop: loop(hvd.StreamLoader(Parquet(other), 4)),
                    "no .parquet",
                )
                assert re.match(rf"(before the first step: |step \d+: )?rank {last}: ", text), text
        if hvd.rank() == last:
            pq.write_table(pa.table({"x": [1.0] * 7}), other / "a.parquet")
        if hvd.size() > 1:
            for loop in (list, unevenly):
                raises_everywhere(
                    hvdloss.AgreementError,
                    lambda loop=loop: loop(hvd.StreamLoader(Parquet(other), 4)),
                    "differ between ranks",
                )


def unevenly(loader: Any) -> list[Any]:
    """Go through a loader in a loop whose optimizer would make steps."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return list(
        hvd.uneven(
            loader, hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=0.1), None, hvd.Objective("mse"))
        )
    )


def pair(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return columns["x"], columns["y"]


def case_the_position_of_a_loop_leaves_out_what_was_read_ahead():
    with folder() as path:
        source = write_parquet(path)
        for data in (source, range(ROWS)):
            rows = (lambda b: b["id"]) if data is source else (lambda b: b)
            weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
            objective = hvd.Objective("mse")
            optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=0.1), None, objective)

            def step(ids: torch.Tensor, weight=weight, objective=objective, optimizer=optimizer) -> None:
                optimizer.zero_grad()
                objective(weight * torch.ones(len(ids), 1), ids.double()[:, None] * 0.01).backward()
                optimizer.step()

            numbers = []
            batches = hvd.uneven(hvd.StreamLoader(data, 3), optimizer)
            for number, batch in enumerate(batches):
                step(rows(batch))
                numbers += rows(batch).tolist()
                if number == 3:
                    state = batches.state_dict()
                    break
            same_on_all_ranks(state)
            assert sum(map(sum, state["parts"])) == 4 * 3 * hvd.size()
            batches = hvd.uneven(hvd.StreamLoader(data, 5, num_workers=1), optimizer)
            batches.load_state_dict(state)
            for batch in batches:
                step(rows(batch))
                numbers += rows(batch).tolist()
            assert seen_by_all(numbers) == everything(), data

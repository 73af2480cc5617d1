"""Files in ``fit`` and in ``tf.data``: every row once, and failures known to all."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from keras_support import before_case, difference, network, same_on_all_ranks, sgd

import hvdloss
import hvdloss.keras as hvd
from hvdloss.data import Parquet, RowGroups
from hvdloss.tensorflow.ops import communicator_of
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-3 mpi-2")

__all__ = ["before_case"]

ROWS = 47


def gathered(text: str) -> list[str]:
    ranks = communicator_of(hvd.global_process_set)
    return [data.decode() for data in ranks.all_gather_bytes(text.encode(), "gathered")]


@contextlib.contextmanager
def folder():
    """Give all ranks the same empty folder."""
    with tempfile.TemporaryDirectory() as own:
        try:
            yield Path(gathered(own)[0])
        finally:
            gathered("done")


def arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(ROWS, 5))
    return x, 2 * x[:, :1] + rng.normal(size=(ROWS, 1))


def written(path: Path) -> Path:
    """Write the rows to one file, on rank 0; return it."""
    file = path / "rows.parquet"
    if hvd.rank() == 0:
        x, y = arrays()
        columns = {
            "id": np.arange(ROWS),
            "x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 5),
            "y": pa.FixedSizeListArray.from_arrays(pa.array(y.reshape(-1)), 1),
        }
        pq.write_table(pa.table(columns), file, row_group_size=4)
    gathered("written")
    return file


def pair(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return columns["x"], columns["y"]


def batches_of(rule: RowGroups, epoch: int, size: int):
    """Return the global batches of an epoch, as row numbers."""
    shards = [rule.row_numbers(pieces, epoch) for pieces in rule.shards(hvd.size(), epoch)]
    for step in range(max(-(-len(shard) // size) for shard in shards)):
        yield np.concatenate([shard[step * size : (step + 1) * size] for shard in shards])


def case_fit_on_files_is_one_process():
    errors = []
    x, y = arrays()
    with folder() as path:
        source = Parquet(written(path))
        for options in ({"seed": 1, "shares": [1 + 2 * r for r in range(hvd.size())]}, {"whole": True}):
            rule = RowGroups(source.rows, **options)
            model, one = network(), network()
            model.compile(hvd.DistributedOptimizer(sgd()), hvd.Objective("mse"))
            data = hvd.StreamDataset(source, 3, sharding=rule, collate_fn=pair)
            model.fit(data, epochs=2, verbose=0)
            one.compile(sgd(), "mse")
            for epoch in range(2):
                for rows in batches_of(rule, epoch, 3):
                    one.train_on_batch(x[rows], y[rows])
            errors.append(difference(model.get_weights(), one.get_weights()))
            assert errors[-1] < 1e-10, errors
            same_on_all_ranks(model.get_weights())
    return {"error, float64": max(errors)}


def seen_by_all(rows: list[int]) -> collections.Counter[int]:
    return collections.Counter(i for text in gathered(json.dumps(rows)) for i in json.loads(text))


def case_every_row_once_on_from_the_middle_and_as_tf_data():
    everything = collections.Counter(range(ROWS))
    with folder() as path:
        source = Parquet(written(path))
        data = hvd.StreamDataset(source, 3, collate_fn=lambda c: c["id"])
        seen = [i for number in range(4) for i in data[number].tolist()]
        assert data[2].tolist() == seen[6:9]  # out of order too
        state = json.loads(json.dumps(data.state_dict(4)))
        again = hvd.StreamDataset(source, 5, collate_fn=lambda c: c["id"])
        again.load_state_dict(state)
        seen += [i for number in range(len(again)) for i in again[number].tolist()]
        assert seen_by_all(seen) == everything
        stream = hvd.StreamDataset(source, 3)
        batches = stream.as_tf_data()
        for epoch in range(2):
            rows = [i for batch in batches for i in batch["id"].numpy().tolist()]
            assert stream.epoch.number == epoch
            assert seen_by_all(rows) == everything
        assert batches.element_spec["x"] == tf.TensorSpec((None, 5), tf.float64)


def case_what_one_rank_cannot_read_is_raised_on_all():
    x, y = arrays()
    with folder() as path:
        file = written(path)
        source = Parquet(file)
        rule = RowGroups(source.rows, shuffle=False)
        last = hvd.size() - 1
        if hvd.rank() == 0:  # the last row group, which is the last rank's, without a trace outside
            stamp = os.stat(file)
            start = pq.ParquetFile(file).metadata.row_group(len(source.rows) - 1).column(1).data_page_offset
            with file.open("r+b") as opened:
                opened.seek(start)
                opened.write(b"\xff" * 40)
            os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        gathered("spoiled")
        for eagerly, accumulate in ((False, None), (True, None), (False, 2)):
            model, one = network(), network()
            optimizer = sgd()
            if accumulate:
                optimizer = keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=accumulate)
            model.compile(hvd.DistributedOptimizer(optimizer), hvd.Objective("mse"), run_eagerly=eagerly)
            data = hvd.StreamDataset(source, 3, sharding=rule, collate_fn=pair)
            with pytest.raises(hvdloss.DataError) as found:
                model.fit(data, verbose=0)
            text = str(found.value)
            place = f"rank {last}: {file}, row group {len(source.rows) - 1}: cannot be read"
            assert re.match(rf"step \d+: {re.escape(place)}", text), text
            assert len(set(gathered(text))) == 1
            same_on_all_ranks(model.get_weights())
            if not accumulate:
                one.compile(sgd(), "mse")
                made = model.optimizer.last_step.step
                assert made > 0
                for rows in list(batches_of(rule, 0, 3))[:made]:
                    one.train_on_batch(x[rows], y[rows])
                assert difference(model.get_weights(), one.get_weights()) < 1e-10
        # From the first batch on, and an exception of a callback.
        only = RowGroups(source.rows, shuffle=False, shares=[0.0] * last + [1.0])
        rows = hvd.StreamDataset(source, ROWS, sharding=only, collate_fn=pair)
        with pytest.raises(hvdloss.DataError, match=f"rank {last}"):
            model.fit(rows, verbose=0)

        class Breaks(keras.callbacks.Callback):
            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                if batch == 1 and hvd.rank() == last:
                    raise ValueError("torn")

        model.compile(hvd.DistributedOptimizer(sgd()), hvd.Objective("mse"))
        with pytest.raises(hvdloss.RankError, match=f"rank {last}: ValueError: torn"):
            model.fit(x, y, batch_size=4, verbose=0, callbacks=[Breaks()])
        model.fit(x, y, batch_size=4, verbose=0)  # and goes on
        same_on_all_ranks(model.get_weights())

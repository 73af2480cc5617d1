"""Horovod's elastic jobs: a rank is killed, and every row of the epoch is used once all the same."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.ranks import environment, missing_controller

ROWS = 61


@pytest.mark.more
@pytest.mark.timeout(300)
def test_a_killed_rank_costs_no_row(tmp_path):
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    rng = np.random.default_rng(0)
    columns = {f"x{i}": rng.normal(size=ROWS) for i in range(3)}
    table = {"id": np.arange(ROWS), "y": rng.normal(size=ROWS), **columns}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet", row_group_size=7)
    discover = tmp_path / "discover.sh"  # two names of this machine: Horovod gives up on a host as a whole
    discover.write_text("#!/bin/sh\necho localhost:2\necho 127.0.0.1:1\n")
    discover.chmod(0o755)
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("horovodrun")),
            *("--gloo", "-np", "3", "--min-np", "2", "--max-np", "3"),
            *("--host-discovery-script", str(discover), "--network-interfaces", "lo"),
            *(sys.executable, str(Path(__file__).with_name("elastic_job.py")), str(tmp_path), "127.0.0.1"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert (tmp_path / "died").exists()
    lines = [json.loads(line) for log in tmp_path.glob("log-*") for line in log.read_text().splitlines()]
    # What was done after the last commit before the loss was undone, and done again by two.
    first = [line for line in lines if line["size"] == 3]
    again = [line for line in lines if line["size"] == 2]
    assert again
    resumed = min(line["step"] for line in again)
    assert resumed == 3
    used = [line for line in first if line["step"] < resumed] + again
    assert collections.Counter(i for line in used for i in line["ids"]) == collections.Counter(range(ROWS))
    # And the parameters are those of one process with the same global batches.
    x = torch.from_numpy(np.stack(list(columns.values()), 1))
    y = torch.from_numpy(table["y"])[:, None]
    one = torch.nn.Linear(3, 1, dtype=torch.float64)
    for p in one.parameters():
        torch.nn.init.zeros_(p)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
    for step in range(max(line["step"] for line in used) + 1):
        ids = [i for line in used if line["step"] == step for i in line["ids"]]
        optimizer.zero_grad()
        ((one(x[ids]) - y[ids]) ** 2).mean().backward()
        optimizer.step()
    trained = torch.load(tmp_path / "model.pt")
    for name, value in one.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-12, atol=1e-14)

"""Files larger than memory, on three ranks; all killed in the middle of an epoch; the rest on two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.ranks import environment, missing_controller

LEDGER_WIDTH = 64
FILES, GROUPS, GROUP_ROWS = 4, 15, 20_000  # 60 row groups of 5 MiB: 300 MiB
ALLOWED = 100 << 20  # of memory, beyond what a rank has before it reads anything
BATCH = 1024


def write(folder: Path) -> int:
    """Write the rows; return how many bytes they have in memory."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    row = 0
    for number in range(FILES):
        schema = pa.schema(
            [("id", pa.int64()), ("x", pa.list_(pa.float32(), LEDGER_WIDTH)), ("y", pa.float32())]
        )
        with pq.ParquetWriter(folder / f"{number}.parquet", schema, compression="none") as writer:
            for _ in range(GROUPS):
                x = rng.standard_normal(GROUP_ROWS * LEDGER_WIDTH, dtype=np.float32)
                columns = [
                    np.arange(row, row + GROUP_ROWS),
                    pa.FixedSizeListArray.from_arrays(pa.array(x), LEDGER_WIDTH),
                    x[::LEDGER_WIDTH],
                ]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=GROUP_ROWS)
                row += GROUP_ROWS
    return row * (LEDGER_WIDTH * 4 + 8 + 4)


def launch(folder: Path, ranks: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            str(Path(sys.executable).with_name("horovodrun")),
            *("--gloo", "-np", str(ranks)),
            *(
                sys.executable,
                str(Path(__file__).with_name("stream_job.py")),
                str(folder),
                str(BATCH),
                str(ALLOWED),
            ),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def processes(folder: Path) -> list[int]:
    """Return the ranks that work on a folder, by their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and words[1].endswith(b"stream_job.py"):
            found.append(int(entry.name))
    return found


def used(folder: Path, ranks: int, before: int | None = None) -> list[int]:
    """Return the rows that steps used, before a given one."""
    out = []
    for log in folder.glob(f"log-{ranks}-*"):
        for line in log.read_text().splitlines():
            try:
                step, ids = json.loads(line)
            except ValueError:  # cut off by the kill
                continue
            if before is None or step < before:
                out += ids
    return out


@pytest.mark.more
@pytest.mark.timeout(600)
def test_files_larger_than_memory_survive_a_kill_on_fewer_ranks(tmp_path):
    if reason := missing_controller("gloo"):
        pytest.skip(reason)
    try:
        interrupted_and_resumed(tmp_path)
    finally:
        for left in processes(tmp_path):
            os.kill(left, signal.SIGKILL)


def interrupted_and_resumed(tmp_path):
    size = write(tmp_path / "rows")
    assert size > 3 * ALLOWED
    job = launch(tmp_path, 3)
    checkpoint = tmp_path / "checkpoint.pt"
    deadline = time.monotonic() + 200
    # Far enough into the epoch of about 390 steps, and a while after a checkpoint.
    while not (tmp_path / "log-3-0").exists() or len((tmp_path / "log-3-0").read_text().splitlines()) < 130:
        assert job.poll() is None, job.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = processes(tmp_path)
    assert len(ranks) == 3
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    assert job.wait(60) != 0
    assert checkpoint.exists()

    second = launch(tmp_path, 2)
    output = second.communicate(timeout=300)[0]
    assert second.returncode == 0, output[-4000:]
    first = [json.loads(line)[0] for line in (tmp_path / "log-2-0").read_text().splitlines()]
    resumed = first[0]
    assert resumed >= 120
    assert resumed % 20 == 0
    rows = np.array(used(tmp_path, 3, before=resumed) + used(tmp_path, 2))
    expected = FILES * GROUPS * GROUP_ROWS
    assert len(rows) == expected
    assert np.array_equal(np.sort(rows), np.arange(expected))

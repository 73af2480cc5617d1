"""How fast files are streamed, beside what pyarrow alone reads in one process per rank.

    python -m hvdloss.benchmarks.read_rate --out runs/read_rate

Every rank reads the same part of the same Parquet files (float32 vectors, a label, a number; in the page
cache), in batches, and touches every batch:

- pyarrow: ``ParquetFile.iter_batches``, columns as NumPy arrays.
- row groups: ``ParquetFile.read_row_group`` and slices of it: the fastest way we know with pyarrow alone.
- stream: :class:`hvdloss.torch.StreamLoader`, tensors, row groups in their order.
- shuffled: the same with row groups and their rows in an order of every epoch.

Passes are interleaved in rounds, in an order that rotates; rates are rows per second of all ranks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hvdloss.benchmarks.common import environment, horovodrun, timed_rounds, write_json

PEERS = ("pyarrow", "row groups", "stream", "shuffled")
MODULE = "hvdloss.benchmarks.read_rate"


def write(folder: Path, files: int, groups: int, rows: int, width: int, compression: str) -> None:
    """Write files of random rows."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    for number in range(files):
        vectors = pa.array(rng.standard_normal(groups * rows * width, dtype=np.float32))
        table = pa.table(
            {
                "x": pa.FixedSizeListArray.from_arrays(vectors, width),
                "y": rng.integers(0, 10, groups * rows),
                "id": np.arange(groups * rows) + number * groups * rows,
            }
        )
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=rows, compression=compression)


def inner(args: argparse.Namespace) -> None:
    """Measure under ranks."""
    import pyarrow.parquet as pq

    import hvdloss.torch as hvd
    from hvdloss.data import Parquet, RowGroups

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    source = Parquet(args.folder)
    count = len(source.parts)
    mine = source.parts[rank * count // size : (rank + 1) * count // size]
    totals: dict[str, float] = {}

    def took(peer: str, arrays: Any) -> None:
        assert arrays[0].shape[1]
        totals[peer] += float(arrays[1].sum()) + float(arrays[2].sum())

    def matrix(column: Any) -> Any:
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)

    def pyarrow_alone() -> None:
        totals["pyarrow"] = 0.0
        by_file: dict[str, list[int]] = {}
        for part in mine:
            by_file.setdefault(part.file, []).append(part.place[0])
        for file, groups in by_file.items():
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(args.batch, row_groups=groups):
                    took("pyarrow", (matrix(batch["x"]), batch["y"].to_numpy(), batch["id"].to_numpy()))

    def row_groups() -> None:
        totals["row groups"] = 0.0
        for part in mine:
            with pq.ParquetFile(part.file) as opened:
                table = opened.read_row_group(part.place[0]).combine_chunks()
            for first in range(0, table.num_rows, args.batch):
                piece = table.slice(first, args.batch)
                columns = [piece.column(name).chunk(0) for name in ("x", "y", "id")]
                took("row groups", (matrix(columns[0]), columns[1].to_numpy(), columns[2].to_numpy()))

    def streamed(peer: str, shuffle: bool) -> Callable[[], None]:
        rule = RowGroups(source.rows, shuffle=shuffle)
        loader = hvd.StreamLoader(
            source, args.batch, sharding=rule, collate_fn=lambda c: (c["x"], c["y"], c["id"])
        )

        def step() -> None:
            totals[peer] = 0.0
            for batch in loader:
                if len(batch[0]):
                    took(peer, batch)

        return step

    steps = {
        "pyarrow": pyarrow_alone,
        "row groups": row_groups,
        "stream": streamed("stream", False),
        "shuffled": streamed("shuffled", True),
    }
    for step in steps.values():
        step()  # files are in the page cache
    # All read the same rows; shuffled ones are others of the ranks' together.
    assert totals["pyarrow"] == totals["row groups"] == totals["stream"], totals
    seconds = timed_rounds(hvd, steps, args.rounds, 1, f"reading, {size} ranks")
    if rank == 0:
        numbers = {"environment": environment(hvd), "rows": len(source), "seconds": seconds}
        write_json(args.json, numbers)
    hvd.shutdown()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Write the files, start the ranks, and return all numbers."""
    found: dict[str, Any] = {}
    for compression in args.compression:
        with tempfile.TemporaryDirectory(prefix="hvdloss-") as folder:
            write(Path(folder), 4, args.groups, args.rows, args.width, compression)
            for ranks in args.ranks:
                given = ["--folder", folder, "--batch", str(args.batch), "--rounds", str(args.rounds)]
                one = horovodrun(MODULE, ranks, given)
                one["rate"] = {p: one["rows"] / statistics.median(v) for p, v in one["seconds"].items()}
                one["of_pyarrow"] = {
                    p: statistics.median(
                        a / b for a, b in zip(one["seconds"]["pyarrow"], one["seconds"][p], strict=True)
                    )
                    for p in PEERS
                }
                found[f"{compression}, {ranks} ranks"] = one
    return found


def main() -> None:
    """Measure, print a table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--groups", type=int, default=6, help="row groups of each of 4 files")
    parser.add_argument("--rows", type=int, default=20_000, help="of a row group")
    parser.add_argument("--width", type=int, default=64, help="numbers of a row's vector")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--compression", nargs="+", default=["none", "snappy"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="folder for the numbers")
    args = parser.parse_args()
    if args.inner:
        inner(args)
        return
    found = measure(args)
    print(f"{'rows per second, and of pyarrow':32}" + "".join(f"{peer:>22}" for peer in PEERS))
    for name, one in found.items():
        cells = "".join(f"{one['rate'][p]:>14,.0f} ({one['of_pyarrow'][p]:4.2f})" for p in PEERS)
        print(f"{name:32}{cells}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(str(args.out / "read_rate.json"), found)


if __name__ == "__main__":
    main()

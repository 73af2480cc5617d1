"""Files of data: what they give, and what is said when they cannot."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdloss import ConfigError, DataError
from hvdloss.data import Csv, NumpyFiles, Parquet


def whole(source):
    parts = [source.read(number) for number in range(len(source.parts))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_parquet_columns_become_arrays(tmp_path):
    table = pa.table(
        {
            "integer": pa.array([1, 2, 3, 4, 5], pa.int32()),
            "nulls": pa.array([1, None, 3, 4, 5], pa.int64()),
            "flag": [True, False, True, False, True],
            "vector": pa.array([[i, i + 0.5] for i in range(5)], pa.list_(pa.float32(), 2)),
            "matrix": pa.array([[[i, 1], [2, 3]] for i in range(5)], pa.list_(pa.list_(pa.int8(), 2), 2)),
            "word": ["a", "b", "c", "d", "e"],
            "kind": pa.array(["x", "y", "x", "y", "x"]).dictionary_encode(),
            "ragged": [[1], [1, 2], [], [3], [4]],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = Parquet(tmp_path)
    assert source.rows == [2, 2, 1]
    assert len(source) == 5
    assert [part.label for part in source.parts] == ["row group 0", "row group 1", "row group 2"]
    got = whole(source)
    assert got["integer"].dtype == np.int32
    assert got["flag"].dtype == np.bool_
    np.testing.assert_array_equal(got["nulls"], [1, np.nan, 3, 4, 5])
    np.testing.assert_array_equal(got["vector"], [[i, i + 0.5] for i in range(5)])
    assert got["matrix"].shape == (5, 2, 2)
    assert got["word"].tolist() == list("abcde")
    assert got["kind"].tolist() == list("xyxyx")
    assert [list(row) for row in got["ragged"]] == [[1], [1, 2], [], [3], [4]]
    empty = source.empty()
    assert {n: (c.dtype, c.shape[1:]) for n, c in empty.items()} == {
        n: (c.dtype, c.shape[1:]) for n, c in source.read(0).items() if n != "nulls"
    } | {"nulls": (empty["nulls"].dtype, ())}
    assert all(len(column) == 0 for column in empty.values())
    few = Parquet(str(tmp_path / "*.parquet"), columns=["word", "vector"])
    assert set(few.read(1)) == set(few.empty()) == {"word", "vector"}
    assert few.fingerprint() != source.fingerprint()
    again = pickle.loads(pickle.dumps(source))  # as a worker process gets it
    assert again.read(2)["integer"].tolist() == [5]


def test_a_column_has_one_dtype_in_all_parts(tmp_path):
    table = pa.table({"n": pa.array([1, 2, None, 4], pa.int64()), "b": pa.array([True, False, True, None])})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = Parquet(tmp_path)
    for part in (source.read(0), source.read(1), source.empty()):
        assert part["n"].dtype == part["b"].dtype == np.float64
    np.testing.assert_array_equal(whole(source)["b"], [1, 0, 1, np.nan])
    (tmp_path / "a.csv").write_text("n,m\n1,1\n2,2\n,3\n4,4\n")
    with pytest.raises(DataError, match=r"column 'n' is float64 here, but int64 .*types="):
        whole(Csv(tmp_path / "a.csv", part_bytes=5))
    mended = Csv(tmp_path / "a.csv", part_bytes=5, types={"n": "float64"})
    np.testing.assert_array_equal(whole(mended)["n"], [1, 2, np.nan, 4])


def test_folders_that_are_called_like_files_and_marks_of_byte_order(tmp_path):
    for name in ("day1.parquet", "day2.parquet"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"a": [1, 2]}), tmp_path / name / "part-0.parquet")
    assert Parquet(tmp_path).rows == Parquet(tmp_path / "*.parquet").rows == [2, 2]
    (tmp_path / "b.csv").write_bytes("x,y\n1,2\n".encode("utf-8-sig"))
    assert list(Csv(tmp_path / "b.csv", columns=["x"]).read(0)) == ["x"]


def test_damage_is_always_a_data_error(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": rng.normal(size=300), "w": [str(i) for i in range(300)]}), path)
    good, refused = path.read_bytes(), 0
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        try:
            whole(Parquet(path).open())
        except DataError as error:
            refused += str(path) in str(error)
            continue
    assert refused > 50


def test_a_column_of_no_known_type_is_a_data_error(tmp_path):
    """Asked for its statistics, Arrow would end the process."""
    pq.write_table(pa.table({"x": [1.0, 2.0]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    double, unknown = b"\x1c\x15\x0a\x19", b"\x1c\x15\x2a\x19"  # the head of a column chunk, its type
    assert data.count(double) == 1
    (tmp_path / "a.parquet").write_bytes(data.replace(double, unknown))
    with pytest.raises(DataError, match=r"a\.parquet, row group 0: cannot be read: OSError"):
        Parquet(tmp_path / "a.parquet").read(0)


def test_csv_parts_are_whole_lines(tmp_path):
    for ending in ("\n", "\r\n"):
        rows = [f'{i},"a, {i}",{i / 2}' for i in range(50)]
        text = ending.join(["number,word,half", *rows[:20], "", *rows[20:]])
        for last in ("", ending, ending * 3):
            (tmp_path / "a.csv").write_bytes((text + last).encode())
            for part_bytes in (1, 40, 10**6):
                source = Csv(tmp_path / "a.csv", part_bytes=part_bytes)
                got = whole(source)
                assert len(source) == 50
                np.testing.assert_array_equal(got["number"], np.arange(50))
                assert got["word"].tolist() == [f"a, {i}" for i in range(50)]
                np.testing.assert_array_equal(got["half"], np.arange(50) / 2)
    (tmp_path / "b.csv").write_text("1;2\n3;4\n")
    bare = Csv(tmp_path / "b.csv", names=["a", "b"], delimiter=";", columns=["b"], types={"b": "float32"})
    np.testing.assert_array_equal(whole(bare)["b"], np.float32([2, 4]))
    assert whole(bare)["b"].dtype == bare.empty()["b"].dtype == np.float32


def test_csv_that_does_not_fit_its_first_part(tmp_path):
    (tmp_path / "a.csv").write_text("a\n1\n2\nthree\n")
    source = Csv(tmp_path / "a.csv", part_bytes=2)
    with pytest.raises(DataError, match=r"a\.csv, bytes 6 to 12.*three"):
        whole(source)
    (tmp_path / "b.csv").write_text('a,b\n1,"two\nlines"\n')
    with pytest.raises(DataError, match=r"b\.csv, bytes"):
        whole(Csv(tmp_path / "b.csv"))
    with pytest.raises(ConfigError, match=r"no \['c'\], but \['a', 'b'\]"):
        Csv(tmp_path / "b.csv", columns=["c"]).open()
    (tmp_path / "c.csv").write_text("a,c\n1,2\n")
    with pytest.raises(DataError, match=r"c\.csv: its first line names \['a', 'c'\]"):
        Csv([tmp_path / "b.csv", tmp_path / "c.csv"]).open()


def test_a_header_of_numpy_that_breaks_off_is_a_data_error(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6.0))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"(6,), }", b"(6,)(  "))
    with pytest.raises(DataError, match=r"a\.npy"):
        NumpyFiles({"x": tmp_path / "a.npy"}).open()


def test_numpy_files(tmp_path):
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.arange(10))
    source = NumpyFiles({"x": tmp_path / "x.npy", "y": tmp_path / "y.npy"}, part_rows=4)
    assert source.rows == [4, 4, 2]
    np.testing.assert_array_equal(whole(source)["x"], x)
    np.testing.assert_array_equal(whole(source)["y"], np.arange(10))
    assert source.empty()["x"].shape == (0, 3)
    assert NumpyFiles({"x": tmp_path / "x.npy"}).rows == [10]
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    assert NumpyFiles({"x": tmp_path / "none.npy"}).rows == []
    np.save(tmp_path / "short.npy", np.arange(9))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(x))
    for files, words in (
        ({"x": "x.npy", "y": "short.npy"}, r"different numbers of rows: \{'x': 10, 'y': 9\}"),
        ({"x": "objects.npy"}, "dtype object"),
        ({"x": "fortran.npy"}, "Fortran order"),
        ({}, "names no array"),
    ):
        with pytest.raises(ConfigError, match=words):
            NumpyFiles({name: tmp_path / file for name, file in files.items()}).open()
    with pytest.raises(DataError, match=r"gone\.npy: there is no such file"):
        NumpyFiles({"x": tmp_path / "gone.npy"}).open()
    os.truncate(tmp_path / "x.npy", 200)
    with pytest.raises(DataError, match=r"x\.npy: .*it was cut off"):
        NumpyFiles({"x": tmp_path / "x.npy"}).open()
    with pytest.raises(DataError, match=r"x\.npy: was changed"):
        source.read(1)


def test_files_that_are_not_there_or_not_what_they_seem(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("this is no Parquet file at all, really")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": [1.5]}), tmp_path / "b.parquet")
    for paths, words in (
        (tmp_path / "gone.parquet", r"gone\.parquet: there is no such file"),
        (str(tmp_path / "*.pq"), r"\*\.pq: no file has such a name"),
        (tmp_path / "empty", r"empty: the folder has no \.parquet or \.pq file"),
        (tmp_path / "text.parquet", r"text\.parquet: cannot be read: ArrowInvalid"),
        ([tmp_path / "a.parquet", tmp_path / "b.parquet"], r"b\.parquet: has other columns or types"),
    ):
        with pytest.raises(DataError, match=words):
            Parquet(paths).open()
    with pytest.raises(ConfigError, match=r"columns: .*has no \['z'\]"):
        Parquet(tmp_path / "a.parquet", columns=["z"]).open()
    with pytest.raises(ConfigError, match="name no file"):
        Parquet([]).open()


@pytest.mark.parametrize("columns", [None, ["n"], ["n", "m"]])
def test_statistics_that_do_not_fit_are_an_error_and_not_the_end_of_the_process(tmp_path, columns):
    least = 0x1122334455667788
    path = tmp_path / "a.parquet"
    table = pa.table({"m": [1, 2, 3], "n": [least, None, least + 1]})
    pq.write_table(table, path, store_schema=False, compression="none")
    data, bytes_of = path.read_bytes(), least.to_bytes(8, "little")
    length = int.from_bytes(data[-8:-4], "little")
    pages, footer = data[: -8 - length], data[-8 - length : -8]
    assert footer.count(b"\x08" + bytes_of) == 2  # twice the least value of "n", after its length
    footer = footer.replace(b"\x08" + bytes_of, b"\x04" + bytes_of[:4])
    path.write_bytes(pages + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read: OSError: Unexpected end of stream"):
        Parquet(path, columns).open()
    assert Parquet(path, ["m"]).read(0)["m"].tolist() == [1, 2, 3]


def test_a_file_that_changes_under_its_reader(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": np.arange(10)}), path, row_group_size=5)
    source = Parquet(path).open()
    source.read(0)
    pq.write_table(pa.table({"a": np.arange(20)}), path, row_group_size=5)
    with pytest.raises(DataError, match=r"a\.parquet: was changed since it was opened"):
        source.read(1)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.parquet, row group 1: there is no such file"):
        source.read(1)

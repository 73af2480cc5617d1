"""Files of data: what they give, and what is said when they cannot."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
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


# -- which files are data, and what names of folders tell ----------------------------------------------


def wrote(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def rows(source, *names):
    """Return a source's rows, in order."""
    parts = [source.read(n) for n in range(len(source.parts))]
    return [row for part in parts for row in zip(*(part[name].tolist() for name in names), strict=True)]


def test_hidden_and_temporary_files_are_no_data(tmp_path):
    folder = tmp_path / "_mine" / ".data"  # the folder itself may be called so
    wrote(folder / "a.parquet", x=[1])
    wrote(folder / "sub" / "b.PARQUET", x=[2])
    wrote(folder / "sub" / "part-00000", x=[3])  # Hive's names have no ending
    for other in (
        "_temporary/0/c.parquet",
        ".ipynb_checkpoints/a-checkpoint.parquet",
        ".a.parquet",
        "sub/_b.parquet",
    ):
        wrote(folder / other, x=[9])
    (folder / "_SUCCESS").touch()
    (folder / "notes.txt").write_text("no data")
    (folder / "sub" / "a.parquet.crc").write_bytes(b"no data")
    assert rows(Parquet(folder), "x") == [(1,), (2,), (3,)]
    assert rows(Parquet(f"{folder}/**/*.parquet"), "x") == [(1,)]
    assert rows(Parquet(f"{folder}/sub/_*.parquet"), "x") == [(9,)]  # asked for by name
    assert rows(Parquet(folder / ".a.parquet"), "x") == [(9,)]
    (folder / "a.csv").write_text("x\n1\n")
    (folder / ".ipynb_checkpoints" / "a-checkpoint.csv").write_text("x\n9\n")
    assert rows(Csv(folder), "x") == [(1,)]


@pytest.mark.parametrize("way", ["folder", "relative", "pattern", "uri", "fsspec", "pyarrow"])
def test_names_of_folders_are_columns_as_for_pyarrow(tmp_path, monkeypatch, way):
    folder = tmp_path / "run=7"  # is not below the folder that is given
    wrote(folder / "year=2020" / "who=a%20b" / "1.parquet", x=[1.5, 2.5])
    wrote(folder / "year=2021" / "who=c" / "2.parquet", x=[3.5])
    monkeypatch.chdir(tmp_path)
    options = {}
    given = {"folder": folder, "relative": "run=7", "pattern": f"{folder}/year=*/who=*/*.parquet"}.get(way)
    if way == "uri":
        given = folder.as_uri()
    elif way == "pyarrow":
        given, options = (
            "run=7",
            {"filesystem": pa.fs.SubTreeFileSystem(str(tmp_path), pa.fs.LocalFileSystem())},
        )
    elif way == "fsspec":
        memory = pytest.importorskip("fsspec").filesystem("memory")
        for file in folder.rglob("*.parquet"):
            memory.pipe(f"/{way}/{file.relative_to(tmp_path)}", file.read_bytes())
        given, options = f"/{way}/run=7", {"filesystem": memory}
    source = pickle.loads(pickle.dumps(Parquet(given, **options).open()))
    right = pa.dataset.dataset(str(folder), partitioning="hive").to_table(columns=["x", "year", "who"])
    assert rows(source, "x", "year", "who") == list(zip(*right.to_pydict().values(), strict=True))
    assert {name: str(column.dtype) for name, column in source.empty().items()} == {
        "x": "float64",
        "year": "int32",
        "who": "object",
    }
    chosen = Parquet(given, ["year"], **options)
    assert rows(chosen, "year") == [(2020,), (2020,), (2021,)]
    assert list(chosen.empty()) == ["year"]
    with pytest.raises(ConfigError, match="month"):
        Parquet(given, ["month"], **options).open()


def test_folders_without_a_value_or_for_one_of_the_files_own_columns(tmp_path):
    wrote(tmp_path / "a" / "year=2020" / "1.parquet", x=[1])
    wrote(tmp_path / "a" / "year=__HIVE_DEFAULT_PARTITION__" / "1.parquet", x=[2])
    (one,), (two,) = (Parquet(tmp_path / "a").read(n)["year"] for n in range(2))
    assert one == 2020.0
    assert np.isnan(two)
    wrote(tmp_path / "b" / "x=7" / "1.parquet", x=[1])
    with pytest.raises(DataError, match=r"1\.parquet: has the columns \['x'\]"):
        Parquet(tmp_path / "b").open()


def test_a_remote_file_that_is_gone_or_changed_is_named():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1]}), sink)
    memory.pipe("/gone/a.parquet", sink.getvalue().to_pybytes())
    source = Parquet("/gone", filesystem=memory).open()
    memory.pipe("/gone/a.parquet", sink.getvalue().to_pybytes() + b" ")
    with pytest.raises(DataError, match=r"gone/a\.parquet: was changed"):
        source.read(0)
    memory.rm("/gone/a.parquet")
    with pytest.raises(DataError, match=r"gone/a\.parquet.*no such file"):
        source.read(0)
    with pytest.raises(DataError, match="other"):
        Parquet("/other", filesystem=memory).open()
    with pytest.raises(ConfigError, match="different file systems"):
        Parquet(["file:///a.parquet", "b.parquet"]).open()


def test_extension_types_are_what_they_are_stored_as(tmp_path):
    tensors = np.arange(24.0).reshape(4, 2, 3)

    def stored(kind, values, storage):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, storage))

    table = pa.table(
        {
            "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(tensors),
            "uuid": stored(pa.uuid(), [bytes([i] * 16) for i in range(4)], pa.binary(16)),
            "bool": stored(pa.bool8(), [0, 1, 1, None], pa.int8()),
            "json": stored(pa.json_(), ["{}", "1", "[]", "2"], pa.string()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    source = Parquet(tmp_path)
    assert np.array_equal(np.concatenate([source.read(n)["tensor"] for n in range(2)]), tensors)
    assert source.empty()["tensor"].shape == (0, 2, 3)
    assert [one[0] for one in rows(source, "uuid")] == [bytes([i] * 16) for i in range(4)]
    assert [one[0] for one in rows(source, "json")] == ["{}", "1", "[]", "2"]
    assert np.array_equal([one[0] for one in rows(source, "bool")], [0, 1, 1, np.nan], equal_nan=True)

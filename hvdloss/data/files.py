"""Data that lies in files, in parts that are read one at a time: Parquet, CSV, NumPy arrays.

A source knows its files' parts and how many rows each has, and reads one part into NumPy arrays. Which
rank reads which part, and in which order, is said by :class:`hvdloss.data.RowGroups`. Files that are
missing, damaged or changed while they are in use are a :class:`hvdloss.errors.DataError` that names the
file and the part.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hvdloss._util.checks import check_int
from hvdloss._util.extras import optional_import
from hvdloss.errors import ConfigError, DataError

__all__ = ["Csv", "NumpyFiles", "Parquet", "Part", "Source"]

#: What readers raise for bytes that are none of theirs.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    ArithmeticError,
    KeyError,
    csv.Error,
    SyntaxError,
    TokenError,
)

Columns = dict[str, npt.NDArray[Any]]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Part:
    """A part of a source.

    Attributes:
        file: where it lies.
        label: what it is there, as messages call it.
        rows: number of rows.
        place: where in the file: a row group's number, or first and end byte or row.
    """

    file: str
    label: str
    rows: int
    place: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.file}, {self.label}"


class _Found(NamedTuple):
    """A file, and the folder below which folder names (``year=2026``) are columns of its rows."""

    file: str
    base: str


def _listed(paths: Paths, endings: tuple[str, ...], filesystem: Any = None) -> list[_Found]:
    """Return the files that `paths` name: files, folders, patterns.

    Args:
        paths: on this machine; or, all of them, of a file system of pyarrow's.
        endings: of a folder's files that are data; an empty one for names without any.
        filesystem: of pyarrow; None for this machine's.

    Raises:
        DataError: there is none.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    out: list[_Found] = []
    for one in (os.fspath(each) for each in given):
        if _is_folder(one, filesystem):
            out += _inside(one, one, endings, filesystem)
        elif filesystem is None and glob.has_magic(one) and not os.path.exists(one):
            found = sorted(glob.glob(one, recursive=True))
            if not found:
                raise DataError(f"{one}: no file has such a name")
            base = os.path.dirname(one[: one.index(next(c for c in one if c in "*?["))])
            # What begins so is no data, unless the pattern says so itself.
            hidden = {"_", "."} - {part[:1] for part in os.path.relpath(one, base or ".").split(os.sep)}
            for match in found:
                if {part[:1] for part in os.path.relpath(match, base or ".").split(os.sep)} & hidden:
                    continue
                out += _inside(match, base, endings, None) if os.path.isdir(match) else [_Found(match, base)]
        else:
            out.append(_Found(one, os.path.dirname(one)))
    if not out:
        raise ConfigError(f"paths={paths!r} name no file")
    return out


def _is_folder(path: str, filesystem: Any) -> bool:
    if filesystem is None:
        return os.path.isdir(path)
    return bool(filesystem.get_file_info(path).type.name == "Directory")


def _inside(folder: str, base: str, endings: tuple[str, ...], filesystem: Any) -> list[_Found]:
    """Return a folder's files as pyarrow.dataset finds them, in the order of their names.

    What begins with a dot or an underscore is none: hidden copies, ``_temporary``, ``_SUCCESS``.

    Raises:
        DataError: there is none.
    """
    import pyarrow as pa
    from pyarrow import dataset, fs

    factory = dataset.FileSystemDatasetFactory(
        filesystem or fs.LocalFileSystem(),
        fs.FileSelector(folder, recursive=True),
        dataset.ParquetFileFormat(),  # of which nothing is read
        dataset.FileSystemFactoryOptions(),
    )
    files = sorted(factory.finish(pa.schema([])).files, key=lambda file: PurePosixPath(file).parts)
    found = [file for file in files if os.path.splitext(file)[1].lower() in endings]
    if not found:
        shown = " or ".join(ending for ending in endings if ending)
        raise DataError(f"{folder}: the folder has no {shown} file")
    return [_Found(file, base) for file in found]


def _stamp(file: str) -> tuple[int, int, int]:
    """Return what changes when a file does: size, time of the last change, inode."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ino


class Source(ABC):
    """Columns of rows, in parts that are read one at a time.

    Making one touches no file; :meth:`open`, and whatever needs the files' shape, looks at them once. A
    source can be pickled, for worker processes.

    Raises:
        DataError: a file is missing, damaged, or was changed since it was opened.
    """

    _stamps: dict[str, tuple[int, ...]]

    @abstractmethod
    def _find(self) -> list[Part]:
        """Look at the files, and return their parts."""

    @abstractmethod
    def _read(self, part: Part) -> Columns:
        """Read a part."""

    @abstractmethod
    def _nothing(self) -> Columns:
        """Return every column without rows."""

    def open(self) -> Source:
        """Look at the files, once; return the source."""
        _ = self.parts
        return self

    @cached_property
    def parts(self) -> list[Part]:
        """The parts, in order."""
        self._stamps = {}
        return self._find()

    @property
    def rows(self) -> list[int]:
        """How many rows each part has."""
        return [part.rows for part in self.parts]

    def __len__(self) -> int:
        """Return how many rows all parts have."""
        return sum(self.rows)

    def read(self, number: int) -> Columns:
        """Read a part: one array of ``parts[number].rows`` rows per column.

        Raises:
            DataError: the file is missing, damaged, or was changed since it was opened.
        """
        part = self.parts[number]
        with self._of(str(part)):
            self._unchanged(part.file)
            columns = self._read(part)
            lengths = {len(column) for column in columns.values()}
            if lengths - {part.rows}:
                raise DataError(
                    f"{part}: has {sorted(lengths)} rows now, and had {part.rows} when it was opened; it "
                    f"was written to since, or is damaged{self._hint}"
                )
            for name, column in columns.items():
                if column.dtype != (kind := self._kind_of[name]):
                    raise DataError(
                        f"{part}: column {name!r} is {column.dtype} here, but {kind} by the files' types, so "
                        f"it has nulls here; write it as floating-point numbers{self._hint}"
                    )
            self._unchanged(part.file)  # what was read is then what was there
        return columns

    @cached_property
    def _kind_of(self) -> dict[str, np.dtype[Any]]:
        return {name: column.dtype for name, column in self.empty().items()}

    _hint = ""  # what else may be the reason, for messages

    def empty(self) -> Columns:
        """Return every column without rows.

        Raises:
            DataError: see :meth:`read`.
        """
        with self._of(self.parts[0].file if self.parts else "the files"):
            return {name: np.array(column) for name, column in self._nothing().items()}  # writable

    def fingerprint(self) -> str:
        """Return what is equal for the same files: names, parts, rows and columns, not their contents."""
        parts = [[os.path.basename(part.file), part.rows, *part.place] for part in self.parts]
        kinds = {name: [str(c.dtype), list(c.shape[1:])] for name, c in self.empty().items()}
        return hashlib.sha256(json.dumps([parts, kinds]).encode()).hexdigest()[:16]

    def _note(self, file: str) -> None:
        """Note a file as it is now."""
        with self._of(file):
            self._stamps[file] = self._stamp(file)

    def _stamp(self, file: str) -> tuple[int, ...]:
        return _stamp(file)

    def _unchanged(self, file: str) -> None:
        if self._stamp(file) != self._stamps[file]:
            raise DataError(
                f"{file}: was changed since it was opened, so its rows are no longer those that were shared "
                f"out; write new data to a new file, and start the epoch again"
            )

    @contextmanager
    def _of(self, where: str) -> Iterator[None]:
        """Turn what reading raises into an error that says where."""
        try:
            yield
        except (DataError, ConfigError):
            raise
        except FileNotFoundError as error:
            raise DataError(f"{where}: there is no such file (any more)") from error
        except Exception as error:
            ours = isinstance(error, _UNREADABLE)
            if not ours and not type(error).__module__.startswith("pyarrow"):
                raise
            text = " ".join(str(error).split())[:300]
            raise DataError(f"{where}: cannot be read: {type(error).__name__}: {text}{self._hint}") from error


def _column(column: Any) -> npt.NDArray[Any]:
    """Return a column of Arrow as an array; lists of one length as rows of a matrix."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # of no chunk
            column = pa.concat_arrays(column.chunks) if column.num_chunks else _none_of(kind)
    if isinstance(kind, pa.BaseExtensionType):
        return _extension(column)
    if pa.types.is_fixed_size_list(kind) and not column.null_count:
        inside = _column(column.flatten())
        return inside.reshape(len(column), kind.list_size, *inside.shape[1:])
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _extension(column: Any) -> npt.NDArray[Any]:
    """Return an array of an extension type: tensors in their shape, others as what they are stored as."""
    import pyarrow as pa

    if isinstance(column.type, pa.FixedShapeTensorType) and not column.null_count:
        return np.asarray(column.to_numpy_ndarray())
    boolean = isinstance(column.type, pa.Bool8Type)
    return _column(column.storage.cast(pa.bool_()) if boolean else column.storage)


def _none_of(kind: Any) -> Any:
    """Return an array of Arrow's without entries."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array([], kind.storage_type))
    return pa.array([], kind)


def _whole(kind: Any) -> bool:
    """Return whether Arrow's type is of integers or booleans, which have no NaN for a null."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _columns(table: Any) -> Columns:
    return {name: _column(table.column(name)) for name in table.column_names}


class Parquet(Source):
    """Parquet files; their row groups are the parts.

    Numbers and booleans become arrays of their dtype (integers and booleans of a column with nulls: float64,
    NaN), lists of fixed
    size rows of a matrix, strings, bytes and other lists arrays of objects; an extension type's values what
    they are stored as, and tensors of a fixed shape that shape.

    In a folder, files are found as by pyarrow.dataset: at any depth, but for names that begin with a dot or
    an underscore (hidden copies, ``_temporary``). Folders' names such as ``year=2026`` (Hive's) are columns.

    Args:
        paths: a file, a folder (in the order of their names its files that end in ``.parquet``, ``.pq`` or
            have no ending), a pattern, or several; or URIs (``s3://bucket/folder``).
        columns: to read; None for all.
        use_threads: decode columns in parallel.
        filesystem: that `paths` are of: pyarrow's or fsspec's; None for this machine's, or that of the URIs.

    Raises:
        ConfigError: pyarrow is not installed, or a column is not in the files.
        DataError: see :class:`Source`.
    """

    def __init__(
        self,
        paths: Paths,
        columns: Sequence[str] | None = None,
        *,
        use_threads: bool = True,
        filesystem: Any = None,
    ) -> None:
        optional_import("pyarrow", "data", "reading Parquet files")
        self._metadata: dict[str, Any] = {}
        self._nulls: set[str] = set()  # columns of integers and booleans that have any
        self.paths, self.use_threads = paths, use_threads
        self.columns = None if columns is None else list(columns)
        self.filesystem = filesystem

    def _located(self) -> tuple[Any, Paths]:
        """Return the file system, None for this machine's, and the paths in it."""
        from pyarrow import fs

        if self.filesystem is not None:
            own = isinstance(self.filesystem, fs.FileSystem)
            return self.filesystem if own else fs.PyFileSystem(fs.FSSpecHandler(self.filesystem)), self.paths
        paths = [self.paths] if isinstance(self.paths, str | os.PathLike) else list(self.paths)
        remote = [isinstance(path, str) and bool(re.match(r"[a-z][a-z0-9+.-]*://", path)) for path in paths]
        if not any(remote):
            return None, self.paths
        found = [fs.FileSystem.from_uri(path) for path in paths if all(remote)]
        if not found or any(one[0] != found[0][0] for one in found):
            raise ConfigError(f"paths={self.paths!r} are of different file systems; give those of one")
        return found[0][0], [one[1] for one in found]

    def _stamp(self, file: str) -> tuple[int, ...]:
        if self._remote is None:
            return _stamp(file)
        info = self._remote.get_file_info(file)
        if not info.is_file:
            raise FileNotFoundError(file)
        return info.size, info.mtime_ns or 0

    def _opened(self, file: str, **options: Any) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(file, filesystem=self._remote, **options)

    def _folders(self, found: list[_Found]) -> dict[str, dict[str, Any]]:
        """Return, by file, the columns that names of folders make: arrays of one entry."""
        import pyarrow as pa
        from pyarrow import dataset, fs

        out: dict[str, dict[str, Any]] = {one.file: {} for one in found}
        for base in {one.base for one in found}:
            files = [one.file for one in found if one.base == base]
            inside = [file.removeprefix(base).rpartition("/")[0] for file in files]
            keys = {folder.partition("=")[0] for one in inside for folder in one.split("/") if "=" in folder}
            if not keys:
                continue
            with self._of(files[0]):
                with self._opened(files[0]) as opened:
                    twice = sorted(keys & set(opened.schema_arrow.names))
                if twice:
                    raise DataError(
                        f"{files[0]}: has the columns {twice}, which the names of its folders have as well; "
                        f"name the folders otherwise, or write the files without these columns"
                    )
                whole = dataset.dataset(
                    [os.path.abspath(file) if self._remote is None else file for file in files],
                    filesystem=self._remote or fs.LocalFileSystem(),
                    format="parquet",
                    partitioning="hive",
                    partition_base_dir=os.path.abspath(base) if self._remote is None else base,
                )
            for file, fragment in zip(files, whole.get_fragments(), strict=True):
                for name, value in dataset.get_partition_keys(fragment.partition_expression).items():
                    out[file][name] = pa.array([value], whole.schema.field(name).type)
        return out

    def _find(self) -> list[Part]:
        import pyarrow as pa

        out: list[Part] = []
        first: Any = None
        self._metadata, self._nulls = {}, set()
        with self._of(str(self.paths)):
            self._remote, paths = self._located()
            listed = _listed(paths, (".parquet", ".pq", ""), self._remote)
        for file in dict.fromkeys(one.file for one in listed):
            self._note(file)
        self._of_folders = self._folders(listed)
        for file, _ in listed:
            folders = self._of_folders[file]
            # Buffered, so that the look for nulls takes in what it decodes, and not whole columns.
            with self._of(file), self._opened(file, buffer_size=1 << 14) as opened:
                schema, found = opened.schema_arrow, opened.metadata
                self._metadata[file] = found
                own = schema
                for name, one in folders.items():
                    schema = schema.append(pa.field(name, one.type))
                    self._nulls |= {name} if one.null_count and _whole(one.type) else set()
                missing = [name for name in self.columns or () if name not in schema.names]
                if missing:
                    raise ConfigError(f"columns: {file} has no {missing}, but {schema.names}")
                schema = schema.remove_metadata()
                first = first or schema
                if not schema.equals(first):
                    raise DataError(f"{file}: has other columns or types than {out[0].file}: {schema}")
                self._nulls |= self._with_nulls(opened, own)
                out += [
                    Part(file, f"row group {n}", found.row_group(n).num_rows, (n,))
                    for n in range(found.num_row_groups)
                ]
        self._schema = first
        return out

    def _with_nulls(self, opened: Any, schema: Any) -> set[str]:
        """Return the columns of integers and booleans that have nulls, by an open file's statistics."""
        asked = [field.name for field in schema if field.nullable and _whole(field.type)]
        if self.columns is not None:
            asked = [name for name in asked if name in self.columns]
        if not asked:
            return set()
        found = opened.metadata
        places = {found.schema.column(j).path: j for j in range(found.num_columns)}
        nulls = set()
        for n in range(found.num_row_groups):
            # Asked for statistics that are damaged, Arrow ends the process; reading a row, it raises.
            next(opened.iter_batches(1, row_groups=[n], columns=asked, use_threads=False), None)
            for name in asked:
                statistics = found.row_group(n).column(places[name]).statistics
                if statistics is not None and statistics.null_count:
                    nulls.add(name)
        return nulls

    def _read(self, part: Part) -> Columns:
        import pyarrow as pa

        folders = self._of_folders[part.file]
        columns = None if self.columns is None else [name for name in self.columns if name not in folders]
        # Opened again, since several threads may read, but without searching for the row groups again.
        with self._opened(part.file, metadata=self._metadata[part.file]) as opened:
            table = opened.read_row_group(part.place[0], columns=columns, use_threads=self.use_threads)
        for name, one in folders.items():
            if self.columns is None or name in self.columns:
                table = table.append_column(name, one.take(pa.array(np.zeros(part.rows, np.int64))))
        return self._as_arrays(table)

    def _as_arrays(self, table: Any) -> Columns:
        """Return columns as arrays, of the same dtype in every row group."""
        columns = _columns(table)
        for name in self._nulls & set(columns):
            columns[name] = columns[name].astype(np.float64)
        return columns

    def _nothing(self) -> Columns:
        import pyarrow as pa

        table = pa.table([_none_of(field.type) for field in self._schema], schema=self._schema)
        return self._as_arrays(table if self.columns is None else table.select(self.columns))


class Csv(Source):
    """CSV files; runs of whole lines are the parts. Opening one reads it once, to count lines.

    A value must not have a line break in it. Types are found in the first part, and hold for all.

    Args:
        paths: a file, a folder (its ``*.csv``, but for names that begin with a dot or an underscore), a
            pattern, or several.
        columns: to read; None for all.
        types: by column, as Arrow names them (``"float64"``, ``"string"``); others are found.
        delimiter: between values.
        names: of the columns, for files without a first line that names them.
        part_bytes: of a part, about.

    Raises:
        ConfigError: pyarrow is not installed, or an argument that cannot be used.
        DataError: see :class:`Source`.
    """

    def __init__(
        self,
        paths: Paths,
        columns: Sequence[str] | None = None,
        *,
        types: Mapping[str, str] | None = None,
        delimiter: str = ",",
        names: Sequence[str] | None = None,
        part_bytes: int = 16 << 20,
    ) -> None:
        optional_import("pyarrow", "data", "reading CSV files")
        self.paths, self.delimiter = paths, delimiter
        self.columns = None if columns is None else list(columns)
        self.types = dict(types or {})
        self.names = None if names is None else list(names)
        self.part_bytes = check_int("part_bytes", part_bytes, 1)

    _hint = " (a line break inside a value? a value that does not fit its column's type: types={...}?)"

    def _find(self) -> list[Part]:
        out: list[Part] = []
        self._names = self.names or []
        for file, _ in _listed(self.paths, (".csv",)):
            self._note(file)
            with self._of(file), open(file, "rb") as opened:
                if self.names is None:
                    line = opened.readline()
                    text = io.StringIO(line.decode("utf-8-sig"))
                    header = next(csv.reader(text, delimiter=self.delimiter), [])
                    if self._names and header != self._names:
                        raise DataError(f"{file}: its first line names {header}, but others' {self._names}")
                    self._names = header
                for start, end, rows in _lines(opened, self.part_bytes):
                    out.append(Part(file, f"bytes {start} to {end}", rows, (start, end)))
        missing = [name for name in [*(self.columns or ()), *self.types] if name not in self._names]
        if missing:
            raise ConfigError(f"columns or types: the files have no {missing}, but {self._names}")
        self._kinds: dict[str, Any] = {}
        if out:
            with self._of(str(out[0])):
                self._kinds = {field.name: field.type for field in self._table(out[0]).schema}
        return out

    def _table(self, part: Part) -> Any:
        import pyarrow as pa
        from pyarrow import csv as reader

        with open(part.file, "rb") as opened:
            opened.seek(part.place[0])
            text = opened.read(part.place[1] - part.place[0])
        kinds = {name: pa.type_for_alias(kind) for name, kind in self.types.items()}
        return reader.read_csv(
            pa.BufferReader(text),
            read_options=reader.ReadOptions(column_names=self._names),
            parse_options=reader.ParseOptions(delimiter=self.delimiter),
            convert_options=reader.ConvertOptions(
                column_types={**self._kinds, **kinds}, include_columns=self.columns or []
            ),
        )

    def _read(self, part: Part) -> Columns:
        return _columns(self._table(part))

    def _nothing(self) -> Columns:
        import pyarrow as pa

        return {name: _column(pa.array([], kind)) for name, kind in self._kinds.items()}


def _lines(opened: io.BufferedReader, part_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield runs of whole lines from here on: first and end byte, and the number of nonempty lines."""
    start = opened.tell()
    while text := opened.read(part_bytes):
        text += opened.readline()  # to the end of the last line
        breaks = np.flatnonzero(np.frombuffer(text, np.uint8) == 10)
        lengths = np.diff(breaks, prepend=-1) - 1
        # A line that ends in \r\n has one character more; only that is left of an empty one.
        alone = lengths == 1
        if alone.any():
            before = np.frombuffer(text, np.uint8)[breaks[alone] - 1]
            lengths[np.flatnonzero(alone)[before == 13]] = 0
        rows = int((lengths > 0).sum()) + (not text.endswith(b"\n"))
        end = start + len(text)
        if rows:
            yield start, end, rows
        start = end


class NumpyFiles(Source):
    """Arrays in ``.npy`` files, one per column, all of the same number of rows; runs of rows are the parts.

    They are read as memory maps are, a part at a time, but into memory: a file that is cut off meanwhile is
    an error, and not the end of the process. Nothing is unpickled.

    Args:
        files: by column, the file.
        part_rows: rows of a part; None for parts of about 16 MiB.

    Raises:
        ConfigError: arrays of different lengths, of Fortran order, or of objects.
        DataError: see :class:`Source`.
    """

    def __init__(self, files: Mapping[str, str | os.PathLike[str]], *, part_rows: int | None = None) -> None:
        self.files = {name: os.fspath(file) for name, file in files.items()}
        if not self.files:
            raise ConfigError("files={} names no array")
        self.part_rows = None if part_rows is None else check_int("part_rows", part_rows, 1)

    def _find(self) -> list[Part]:
        self._heads: dict[str, tuple[int, Any, tuple[int, ...]]] = {}
        rows = {}
        for name, file in self.files.items():
            self._note(file)
            with self._of(file), open(file, "rb") as opened:
                version = np.lib.format.read_magic(opened)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
                shape, fortran, kind = (read or np.lib.format.read_array_header_2_0)(opened)
                if fortran or kind.hasobject or not shape:
                    raise ConfigError(
                        f"files={{{name!r}: {file!r}}}: an array of shape {shape} and dtype {kind}, "
                        f"{'Fortran' if fortran else 'C'} order; save one with rows of numbers in C order "
                        f"(numpy.ascontiguousarray)"
                    )
                self._heads[name] = (opened.tell(), kind, shape[1:])
                rows[name] = shape[0]
                needed = opened.tell() + kind.itemsize * int(np.prod(shape, dtype=np.int64))
                if self._stamps[file][0] < needed:
                    raise DataError(
                        f"{file}: has {self._stamps[file][0]} bytes, but an array of shape {shape} and dtype "
                        f"{kind} needs {needed}; it was cut off"
                    )
        if len(set(rows.values())) > 1:
            raise ConfigError(f"files: arrays have different numbers of rows: {rows}")
        total = next(iter(rows.values()))
        row_bytes = sum(
            kind.itemsize * int(np.prod(shape, dtype=np.int64)) for _, kind, shape in self._heads.values()
        )
        step = self.part_rows or max(1, (16 << 20) // max(row_bytes, 1))
        first = next(iter(self.files.values()))
        return [
            Part(first, f"rows {start} to {min(start + step, total)}", min(step, total - start), (start,))
            for start in range(0, total, step)
        ]

    def _read(self, part: Part) -> Columns:
        out: Columns = {}
        for name, (head, kind, shape) in self._heads.items():
            file = self.files[name]
            with self._of(f"{file}, {part.label}"):
                self._unchanged(file)
                each = int(np.prod(shape, dtype=np.int64))
                with open(file, "rb") as opened:
                    opened.seek(head + part.place[0] * each * kind.itemsize)
                    flat = np.fromfile(opened, kind, part.rows * each)
                if len(flat) < part.rows * each:
                    raise DataError(f"{file}, {part.label}: the file ends before them; it was cut off")
                self._unchanged(file)
            out[name] = flat.reshape(part.rows, *shape)
        return out

    def _nothing(self) -> Columns:
        return {name: np.zeros((0, *shape), kind) for name, (_, kind, shape) in self._heads.items()}

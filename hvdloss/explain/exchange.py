"""Exchange of arrays and errors between ranks: one gather of bytes, never pickles."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdloss import errors
from hvdloss.comm.communicator import Communicator
from hvdloss.comm.messages import decode_errors, parse_json
from hvdloss.errors import AgreementError, HvdlossError

__all__ = ["RankMessage", "exchange_messages", "require_equal", "text_table"]

# NumPy parses an array's header with Python's parser, which is not thread-safe in CPython 3.11 (issue 106905:
# "AST constructor recursion depth mismatch"); simulated ranks are threads.
_reading = threading.Lock()


class RankMessage:
    """A message of one rank to all.

    Args:
        note: JSON values by name.
        arrays: by name; numbers or strings.
    """

    def __init__(self, note: Mapping[str, Any] | None = None, **arrays: npt.ArrayLike) -> None:
        self.note = dict(note or {})
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.arrays[name]

    def pack(self) -> bytes:
        """Encode it as bytes."""
        buffer = io.BytesIO()
        header = np.frombuffer(json.dumps(self.note).encode(), dtype=np.uint8)
        np.savez(buffer, **{f"a.{name}": array for name, array in self.arrays.items()}, note=header)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def unpack(cls, data: bytes) -> RankMessage:
        """Decode the bytes of :meth:`pack`.

        Raises:
            AgreementError: other bytes.
        """
        with decode_errors("arrays"):
            # Only an archive: np.load would also accept a single array, or a pickle.
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                    raise ValueError("compressed, which ranks do not send")  # and may unpack to terabytes
            with _reading, np.load(io.BytesIO(data), allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            note = parse_json(arrays.pop("note").tobytes())
            return cls(note, **{name[2:]: array for name, array in arrays.items()})


def exchange_messages(
    ranks: Communicator, name: str, doing: str, work: Callable[[], RankMessage]
) -> list[RankMessage]:
    """Run `work` on every rank, and return all ranks' messages, in rank order.

    Args:
        ranks: that take part.
        name: of the gather.
        doing: what `work` does, for errors.
        work: returns this rank's message. An exception of it is raised on every rank.

    Raises:
        HvdlossError: on every rank alike, the exception of the first rank whose work failed: of the same
            class if it is one of :mod:`hvdloss.errors`, else RankError. It names the rank.

    Collectives: one gather.
    """
    failure: Exception | None = None
    try:
        mine = b"+" + work().pack()
    except Exception as error:
        failure = error
        kind = type(error).__name__
        known = isinstance(error, HvdlossError) and kind in errors.__all__
        text = str(error) if known else f"{kind}: {error}"
        mine = b"-" + json.dumps([kind if known else "RankError", text]).encode()
    parts = ranks.all_gather_bytes(mine, name)
    for rank, part in enumerate(parts):
        if part[:1] == b"-":
            with decode_errors("error", rank):
                kind, text = parse_json(part[1:])
                raised = {name: getattr(errors, name) for name in errors.__all__}[kind]
            raise raised(f"rank {rank}, {doing}: {text}") from (failure if rank == ranks.rank else None)
    return [RankMessage.unpack(part[1:]) for part in parts]


_ANY = object()


def require_equal(what: str, values: Sequence[Any], but: Any = _ANY) -> Any:
    """Return the common value of all ranks; raise, on every rank alike, if it differs.

    Args:
        what: it is, for the message.
        values: one per rank.
        but: the value of ranks without one of their own; they do not count.

    Raises:
        AgreementError: naming the first two ranks that differ.
    """
    known = [(rank, value) for rank, value in enumerate(values) if value != but]
    for rank, value in known:
        if value != known[0][1]:
            raise AgreementError(
                f"{what} differs between ranks: rank {rank} has {value!r}, rank {known[0][0]} has "
                f"{known[0][1]!r}; call with the same on every rank"
            )
    return known[0][1] if known else but


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned text; the first column to the left, all others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    lines = []
    for row in (columns, *rows):
        first, *rest = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]))
    return "\n".join(line.rstrip() for line in lines)

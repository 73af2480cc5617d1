"""Checkpoints of a whole training run: written whole or not at all, verified when they are loaded.

A checkpoint is a file of JSON (the manifest) and one file of tensors (safetensors) for each part that has
any. The manifest takes its name last, so it makes the checkpoint: it has the size and the SHA-256 of every
other file, and of itself. Every checkpoint has a number of its own, and no file is ever written over.
Nothing is pickled, and nothing that is read can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hvdloss.comm.communicator import Communicator, OneProcess
from hvdloss.comm.messages import decode_all
from hvdloss.errors import CheckpointError, ConfigError
from hvdloss.train.files import write_atomically
from hvdloss.train.tree import (
    FromArray,
    ToArray,
    flatten_tree,
    numpy_array,
    of_numpy,
    pack_arrays,
    unflatten_tree,
    unpack_arrays,
)
from hvdloss.train.tree import strictly as read_json

__all__ = [
    "Checkpoint",
    "CheckpointWarning",
    "Loaded",
    "Part",
    "StateDict",
    "read_checkpoint",
    "state_from_bytes",
    "state_to_bytes",
]

FORMAT, VERSION = "hvdloss checkpoint", 1
LARGEST_MANIFEST = 1 << 28  # bytes
_PIECE = 1 << 27  # bytes of one message
_MANIFEST = re.compile(r"(\d{8})\.json")
_TENSORS = re.compile(r"(\d{8})\.([A-Za-z_]\w{0,63})\.safetensors")
_UNFINISHED = re.compile(r"\.unfinished-\d{8}\.(json|[A-Za-z_]\w{0,63}\.safetensors)")
_VALUES, _RANDOM = "values_", "random_"  # parts that are no object of the user's


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over for an older one."""


class Part(Protocol):
    """The part of a checkpoint that belongs to one object; equal on all ranks.

    Its method ``before_save()``, if it has one, is called first, to make the ranks equal.
    """

    def state(self) -> Any:
        """Return its state: dicts, lists, tuples of arrays, numbers, strings, None. May use collectives."""

    def load(self, state: Any) -> None:
        """Restore a state."""


class StateDict:
    """Of an object with ``state_dict()`` and ``load_state_dict(state)``."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state(self) -> Any:
        """Return its state."""
        return self.value.state_dict()

    def load(self, state: Any) -> None:
        """Load its state."""
        self.value.load_state_dict(state)


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        step: that it was saved with.
        values: that it was saved with.
        number: of the checkpoint, from 1.
        ranks: number of ranks that saved it.
        skipped: why newer checkpoints were passed over, by the file's name; empty without any.
    """

    step: int
    values: dict[str, Any]
    number: int
    ranks: int
    skipped: dict[str, str] = field(default_factory=dict)


def random_state() -> dict[str, Any]:
    """Return the random states of Python and NumPy."""
    version, internal, gauss = random.getstate()
    return {
        "python": [version, np.array(internal, dtype=np.uint32), gauss],
        "numpy": np.random.get_state(legacy=False),
    }


def set_random_state(state: Any) -> None:
    """Restore the random states."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(map(int, internal)), gauss))
    np.random.set_state(state["numpy"])


class Checkpoint:
    """Saves and loads a training run; see the adapters' for an example.

    Args:
        path: the folder of the checkpoints; it need only be there for the rank that writes and reads.
        parts: what is saved, by name: objects with ``state_dict()`` and ``load_state_dict(state)``, whose
            state is made of tensors, numbers, strings, dicts, lists and tuples; and what the framework's
            adapter knows besides. Their states are the same on all ranks.
        keep: number of checkpoints to keep: the latest ones.
        root: the rank that writes and reads.
        random_numbers: whether each rank's random state is saved, and restored when as many
            ranks load them.
        mode, folder_mode: of the files, and of the folder if it is made: private by default.
        communicator: returns the ranks when called.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        parts: Mapping[str, Part],
        *,
        keep: int = 3,
        root: int = 0,
        random_numbers: bool = True,
        mode: int = 0o600,
        folder_mode: int = 0o700,
        communicator: Callable[[], Communicator] = OneProcess,
    ) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ConfigError(f"keep={keep!r} must be an integer of at least 1")
        for name in parts:
            if not re.fullmatch(r"[A-Za-z]\w{0,62}", name) or name.endswith("_"):
                raise ConfigError(f"{name!r:.100} cannot be the name of a part; take letters and digits")
        self.path, self.keep, self.root = Path(path), keep, root
        self.random_numbers, self.mode, self.folder_mode = random_numbers, mode, folder_mode
        self._parts, self._communicator = dict(parts), communicator
        self._damaged: set[int] = set()

    # What adapters know of their framework:

    def to_array(self, value: Any) -> Any:
        """Return the kind of an array of the framework, and its values as NumPy's; None for anything else."""
        return numpy_array(value)

    def from_array(self, kind: str, array: Any) -> Any:
        """Return an array of the framework."""
        return of_numpy(kind, array)

    def random_state(self) -> Any:
        """Return this rank's random state."""
        return random_state()

    def set_random_state(self, state: Any) -> None:
        """Restore this rank's random state."""
        set_random_state(state)

    # -- saving -----------------------------------------------------------------------------------

    def save(self, step: int, **values: Any) -> Path:
        """Write a checkpoint; all ranks call it after the same step.

        Args:
            step: a number of at least 0, to know it by: how many steps were made, or the epoch.
            values: more to save, as it is on the rank that writes: numbers, strings, arrays, and dicts, lists
                and tuples of them.

        Returns:
            its file, the same on all ranks.

        Raises:
            ConfigError: something that cannot be saved, by name.
            CheckpointError: it could not be written. All on every rank, and the former ones are kept.

        Collectives: three small gathers, of which one is of the ranks' random numbers; and those of the
        parts: of a stream's position, of an exchange after local steps.
        """
        communicator = self._communicator()
        number = [0]
        states: dict[str, Any] = {}
        state: list[Any] = [None]

        def take() -> None:
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise ConfigError(f"step={step!r} must be an integer of at least 0")
            if clash := sorted(set(values) & {"step", "number"}):
                raise ConfigError(f"{clash[0]} cannot be the name of a value")
            for part in self._parts.values():
                getattr(part, "before_save", lambda: None)()
            for name, part in self._parts.items():
                states[name] = part.state()
            if self.random_numbers:
                state[0] = self.random_state()

        self._on_all_ranks(take, "save")
        if self.random_numbers:
            mine = _as_bytes(flatten_tree(state[0], self.to_array, name="random numbers"))
            ranks = communicator.all_gather_bytes(mine, "hvdloss.checkpoint.random")
            states[_RANDOM] = [np.frombuffer(one, dtype=np.uint8) for one in ranks]
        states[_VALUES] = values

        def write() -> None:
            if communicator.rank == self.root:
                number[0] = self._write(step, states, communicator.size)

        numbers = self._on_all_ranks(write, "save", number)
        return self.path / f"{numbers[self.root]:08d}.json"

    def _write(self, step: int, states: Mapping[str, Any], ranks: int) -> int:
        held = {name: flatten_tree(state, self.to_array, name=name) for name, state in states.items()}
        known = self._numbers()
        number = max(known, default=0) + 1
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "number": number,
            "step": step,
            "ranks": ranks,
            "parts": {},
        }
        options: dict[str, Any] = {"mode": self.mode, "folder_mode": self.folder_mode}
        for name, (tree, arrays) in held.items():
            data = pack_arrays(arrays)
            entry = {"tree": tree, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            manifest["parts"][name] = entry
            if data:
                write_atomically(self._tensors(number, name), lambda f, d=data: f.write(d), **options)  # type: ignore[misc]
        text = _signed(manifest)
        if len(text) > LARGEST_MANIFEST:
            raise ConfigError(f"the values that are no arrays have {len(text)} bytes; save arrays instead")
        write_atomically(self.path / f"{number:08d}.json", lambda file: file.write(text), **options)
        self._damaged &= known
        sound = sorted(known - self._damaged | {number})
        self._prune(set(sound[-self.keep :]))
        return number

    def _tensors(self, number: int, part: str) -> Path:
        return self.path / f"{number:08d}.{part}.safetensors"

    def _numbers(self) -> set[int]:
        """Return the numbers of all checkpoints there are, damaged ones too."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return set()
        return {int(found[1]) for name in names if (found := _MANIFEST.fullmatch(name))}

    def _prune(self, kept: set[int]) -> None:
        """Remove older checkpoints, and what killed writers left; manifests first, which make them."""
        names = os.listdir(self.path)
        for pattern in (_MANIFEST, _TENSORS, _UNFINISHED):
            for name in names:
                found = pattern.fullmatch(name)
                if found and (pattern is _UNFINISHED or int(found[1]) not in kept):
                    with contextlib.suppress(OSError):
                        (self.path / name).unlink()

    # -- loading ----------------------------------------------------------------------------------

    def load(self, number: int | None = None, *, fallback: bool = True) -> Loaded | None:
        """Go on from the newest checkpoint that is intact, on every rank.

        Args:
            number: of the checkpoint; None for the newest.
            fallback: if the newest is damaged, use the one before, with a warning that says what
                was passed over; False to raise instead.

        Returns:
            step and values; None where there is no checkpoint at all. Nothing is changed then.

        Raises:
            CheckpointError: damaged, none at all of that number, or it does not fit the parts (what was
                loaded before that stays loaded). The same on every rank.
            CheckpointWarning: (a warning) a damaged one was passed over.

        Collectives: two small gathers, one of the checkpoint's bytes per 128 MiB, and one more small one.
        """
        communicator = self._communicator()
        found: list[Any] = [None]

        def find() -> None:
            if communicator.rank == self.root:
                found[0] = self._find(number, fallback)

        self._on_all_ranks(find, "load")
        message = self._from_root(communicator, found[0])
        if message is None:
            return None
        manifest, data = message
        loaded: list[Loaded] = []

        def load() -> None:
            loaded.append(self._load(manifest, data, communicator))

        self._on_all_ranks(load, "load")
        skipped = manifest["skipped"]
        if skipped:
            lines = "; ".join(f"{name}: {why}" for name, why in skipped.items())
            warnings.warn(
                f"{self.path}: going on from checkpoint {manifest['number']} (step {manifest['step']}), as "
                f"newer ones are damaged: {lines}",
                CheckpointWarning,
                stacklevel=2,
            )
        return loaded[0]

    def _find(self, number: int | None, fallback: bool) -> tuple[dict[str, Any], dict[str, bytes]] | None:
        """Return the manifest and the files of the newest intact checkpoint."""
        numbers = sorted(self._numbers(), reverse=True)
        if number is not None:
            if number not in numbers:
                raise CheckpointError(f"there is no checkpoint {number!r}; there are {numbers[::-1]}")
            numbers = [number]
        skipped: dict[str, str] = {}
        for one in numbers:
            try:
                manifest, data = read_checkpoint(self.path, one)
            except CheckpointError as error:
                self._damaged.add(one)
                skipped[f"{one:08d}.json"] = str(error)
                if not fallback or number is not None:
                    raise
                continue
            manifest["skipped"] = skipped
            return manifest, data
        if skipped:
            lines = "; ".join(f"{name}: {why}" for name, why in skipped.items())
            raise CheckpointError(f"every checkpoint is damaged: {lines}")
        return None

    def _from_root(self, communicator: Communicator, found: Any) -> Any:
        """Return what the root found, on every rank."""
        blob, head = b"", b"null"
        if found is not None:
            manifest, data = found
            head = json.dumps([manifest, [[name, len(one)] for name, one in data.items()]]).encode()
            blob = b"".join(data.values())
        if communicator.size == 1:
            return found
        texts = communicator.all_gather_bytes(head, "hvdloss.checkpoint.manifest")
        (received,) = decode_all([texts[self.root]], "checkpoint")
        if received is None:
            return None
        manifest, sizes = received
        total = sum(size for _, size in sizes)
        pieces = []
        for start in range(0, total, _PIECE):
            mine = blob[start : start + _PIECE]
            pieces.append(communicator.all_gather_bytes(mine, "hvdloss.checkpoint.data")[self.root])
        whole = memoryview(b"".join(pieces))
        data, at = {}, 0
        for name, size in sizes:
            data[name] = bytes(whole[at : at + size])
            at += size
        return manifest, data

    def _load(self, manifest: dict[str, Any], data: dict[str, bytes], communicator: Communicator) -> Loaded:
        parts = manifest["parts"]
        if missing := [name for name in self._parts if name not in parts]:
            there = ", ".join(name for name in parts if not name.endswith("_")) or "none"
            raise CheckpointError(
                f"checkpoint {manifest['number']} has no part {missing[0]!r}; it has {there}"
            )

        def tree(name: str) -> Any:
            try:
                return unflatten_tree(
                    parts[name]["tree"], unpack_arrays(data.get(name, b"")), self.from_array
                )
            except CheckpointError as error:
                raise CheckpointError(f"part {name!r} of checkpoint {manifest['number']}: {error}") from error

        states = {name: tree(name) for name in self._parts}
        values = tree(_VALUES) if _VALUES in parts else {}
        own = None
        if self.random_numbers and _RANDOM in parts and manifest["ranks"] == communicator.size:
            ranks = tree(_RANDOM)
            own = _of_bytes(np.asarray(ranks[communicator.rank]).tobytes(), self.from_array)
        for name, part in self._parts.items():
            try:
                part.load(states[name])
            except Exception as error:
                raise CheckpointError(
                    f"part {name!r} of checkpoint {manifest['number']} does not fit: "
                    f"{type(error).__name__}: {error}"
                ) from error
        if own is not None:
            self.set_random_state(own)
        return Loaded(
            manifest["step"], dict(values), manifest["number"], manifest["ranks"], manifest["skipped"]
        )

    # -- together ---------------------------------------------------------------------------------

    def _on_all_ranks(self, act: Callable[[], Any], what: str, value: list[int] | None = None) -> list[Any]:
        """Run `act` on every rank; raise on all if it fails on one. Returns the ranks' values."""
        outcome: list[Any] = ["", "", None, str(self.path)]  # ranks may have different paths
        cause: Exception | None = None
        try:
            act()
        except Exception as error:  # raised on every rank below
            if type(error).__module__.startswith("horovod"):
                raise  # ranks are gone, and no exchange is possible
            outcome[:2], cause = [type(error).__name__, str(error)], error
        else:
            outcome[2] = value[0] if value else None
        name = f"hvdloss.checkpoint.{what}"
        texts = self._communicator().all_gather_bytes(json.dumps(outcome).encode(), name)
        outcomes = decode_all(texts, "checkpoint", lambda one: isinstance(one, list) and len(one) == 4)
        for rank, (kind, text, _, path) in enumerate(outcomes):
            if not kind:
                continue
            if kind == ConfigError.__name__:
                raise ConfigError(f"rank {rank}: {text}") from cause
            text = text if kind == CheckpointError.__name__ else f"{kind}: {text}"
            raise CheckpointError(f"{path!r}: rank {rank} could not {what} a checkpoint: {text}") from cause
        return [one[2] for one in outcomes]


# -- reading ----------------------------------------------------------------------------------------------


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, allow_nan=False).encode()


def _signed(manifest: Mapping[str, Any]) -> bytes:
    """Return a manifest's text, with the hash of all the rest in it."""
    return _canonical({**manifest, "sha256": hashlib.sha256(_canonical(manifest)).hexdigest()})


def _as_bytes(held: Any) -> bytes:
    tree, arrays = held
    text, data = json.dumps(tree).encode(), pack_arrays(arrays)
    return len(text).to_bytes(8, "little") + text + data


def _of_bytes(data: bytes, from_array: FromArray) -> Any:
    size = int.from_bytes(data[:8], "little")
    return unflatten_tree(read_json(data[8 : 8 + size]), unpack_arrays(data[8 + size :]), from_array)


def state_to_bytes(tree: Any, to_array: ToArray = numpy_array, *, name: str = "state") -> bytes:
    """Return a tree as bytes, for a message; see :func:`hvdloss.train.tree.flatten_tree`."""
    return _as_bytes(flatten_tree(tree, to_array, name=name))


def state_from_bytes(data: bytes, from_array: FromArray = of_numpy) -> Any:
    """Return the tree of :func:`state_to_bytes`.

    Raises:
        CheckpointError: other bytes.
    """
    return _of_bytes(data, from_array)


def parse_manifest(text: bytes, number: int) -> dict[str, Any]:
    """Return a manifest that is whole.

    Raises:
        CheckpointError: it is not.
    """
    manifest = read_json(text)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError("this is no manifest of a checkpoint")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"its version is {manifest.get('version')!r:.100}, and this program reads {VERSION}; load it "
            f"with the release that wrote it"
        )
    claimed = manifest.pop("sha256", None)
    try:
        found = hashlib.sha256(_canonical(manifest)).hexdigest()
    except (ValueError, RecursionError, UnicodeEncodeError) as error:
        raise CheckpointError(f"this is no manifest of a checkpoint: {error!s:.100}") from error
    if claimed != found:
        raise CheckpointError("the manifest was changed or cut off: its SHA-256 is another one")
    whole = all(
        isinstance(manifest.get(key), int) and not isinstance(manifest[key], bool) and manifest[key] >= 0
        for key in ("number", "step", "ranks")
    )
    parts = manifest.get("parts")
    if not whole or manifest["number"] != number or not isinstance(parts, dict):
        raise CheckpointError(f"the manifest is not that of checkpoint {number}")
    for name, part in parts.items():
        fine = (
            _TENSORS.fullmatch(f"{number:08d}.{name}.safetensors")
            and isinstance(part, dict)
            and set(part) == {"tree", "bytes", "sha256"}
            and isinstance(part["bytes"], int)
            and not isinstance(part["bytes"], bool)
            and part["bytes"] >= 0
            and isinstance(part["sha256"], str)
        )
        if not fine:
            raise CheckpointError(f"the manifest's part {name!r:.100} is none")
    return manifest


def _contents(path: Path, size: int | None) -> bytes:
    """Return a file's bytes: of this size, or (None) of at most what a manifest may have."""
    try:
        with open(path, "rb") as file:
            there = os.fstat(file.fileno()).st_size
            if size is None and there > LARGEST_MANIFEST:
                raise CheckpointError(f"{path.name} has {there} bytes, more than any manifest")
            if size is not None and there != size:
                raise CheckpointError(f"{path.name} has {there} bytes, but was written with {size}")
            return file.read(there)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror or error}") from error


def read_checkpoint(path: str | os.PathLike[str], number: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the manifest of a checkpoint, and its files by part; nothing that was changed since.

    Args:
        path: of the folder.
        number: of the checkpoint.

    Raises:
        CheckpointError: it is damaged, cut off, or none: by file and reason.
    """
    path = Path(path)
    manifest = parse_manifest(_contents(path / f"{number:08d}.json", None), number)
    data: dict[str, bytes] = {}
    for name, part in manifest["parts"].items():
        held = b""
        if part["bytes"]:
            file = path / f"{number:08d}.{name}.safetensors"
            held = _contents(file, part["bytes"])
            if hashlib.sha256(held).hexdigest() != part["sha256"]:
                raise CheckpointError(
                    f"{file.name} was changed since it was written: its SHA-256 is another one"
                )
            data[name] = held
        try:
            unflatten_tree(part["tree"], unpack_arrays(held), lambda kind, array: None)
        except CheckpointError as error:
            raise CheckpointError(f"part {name!r}: {error}") from error
    return manifest, data

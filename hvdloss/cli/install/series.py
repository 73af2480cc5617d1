"""Horovod's source is changed by a series of patches, kept as Debian keeps its own.

``patches/series`` names them in the order in which they apply. Each is a unified diff below a DEP-3 header
(https://dep-team.pages.debian.net/deps/dep3/), so that `patch`, `quilt` and `git apply` read them too.
unidiff parses them, and refuses a diff that is damaged. They are applied here, and not by `patch`, since
that program may be missing, guesses where a hunk belongs, and has written some files when it fails at others.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from unidiff.errors import UnidiffParseError
from unidiff.patch import PatchedFile, PatchSet

from hvdloss.cli.errors import Exit, InstallError

FOLDER = Path(__file__).with_name("patches")


class _Mismatch(Exception):
    """A hunk is not what stands in the file."""


@dataclass(frozen=True)
class Patch:
    """One patch of the series.

    Attributes:
        name: the name of its file.
        header: its fields, as DEP-3 has them.
        diff: what it changes.
    """

    name: str
    header: str
    diff: str

    @property
    def synopsis(self) -> str:
        """What it mends, in one line."""
        return self.header.partition("\n")[0].removeprefix("Description: ")


def read_series(folder: Path = FOLDER) -> tuple[Patch, ...]:
    """Return the patches that ``folder/series`` names, in its order."""
    patches = []
    for name in (folder / "series").read_text(encoding="utf-8").split():
        header, _, diff = (folder / name).read_bytes().decode().partition("\n---\n")
        patches.append(Patch(name, header, diff))
    return tuple(patches)


def version_of(patches: Iterable[Patch]) -> str:
    """Return a series' version: 12 hexadecimal digits, other ones for other diffs (headers do not count)."""
    digest = hashlib.sha256()
    for patch in patches:
        digest.update(patch.diff.encode())
    return digest.hexdigest()[:12]


def apply_series(tree: Path, patches: Iterable[Patch]) -> list[Path]:
    """Apply patches to the source in `tree`; return the files changed.

    Every line of a hunk has to stand exactly where the diff says: the source is pinned by its hash. The first
    file is written when all patches are known to apply.

    Raises:
        InstallError: a patch does not apply; it is named, and nothing has been changed.
    """
    texts: dict[Path, list[str]] = {}
    for patch in patches:
        try:
            files = PatchSet.from_string(patch.diff)
            understood = sum(2 + sum(1 + len(hunk) for hunk in file) for file in files)
            if not files or not all(files) or understood != patch.diff.count("\n"):
                raise _Mismatch("its diff is damaged")
            for file in files:
                path = tree / file.path
                if path not in texts:
                    texts[path] = io.StringIO(path.read_bytes().decode()).readlines()  # at \n alone
                texts[path] = _patched(file, texts[path])
        except OSError as error:
            raise _refused(patch, f"{file.path} cannot be read ({error.strerror})") from error
        except (_Mismatch, UnidiffParseError, UnicodeDecodeError) as error:
            raise _refused(patch, str(error)) from error
    for path, lines in texts.items():
        path.write_bytes("".join(lines).encode())
    return list(texts)


def _patched(file: PatchedFile, lines: list[str]) -> list[str]:
    """Return a file's lines with all hunks of one patch applied."""
    out: list[str] = []
    done = 0
    for hunk in file:
        start = hunk.source_start - (hunk.source_length > 0)  # "-5,0" is after line 5
        end = start + hunk.source_length
        if start < done or lines[start:end] != [line.value for line in hunk.source_lines()]:
            raise _Mismatch(f"{file.path} is not as it expects at lines {start + 1} to {end}")
        out += lines[done:start]
        out += [line.value for line in hunk.target_lines()]
        done = end
    return out + lines[done:]


def _refused(patch: Patch, reason: str) -> InstallError:
    return InstallError(
        f"Horovod's source is not the one that the patches are for: {patch.name} does not apply: {reason}.",
        "use the pinned source (leave --source out), or report this with the patch's name",
        status=Exit.BUILD,
    )

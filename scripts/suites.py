"""Say which of the slow suites have to run: those whose code the last days' commits touched.

    python scripts/suites.py              # names on stdout; on stderr a line for each suite that says why
    python scripts/suites.py --days 7
    python scripts/suites.py --all        # what `make test-all` runs besides `make test`

A suite NAME is run by ``make test-NAME``. What has changed is the difference between the files now and those
of the last commit that is older than `--days`, counted from the newest one. Without that much history every
suite runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What every launch of ranks rests on.
HARNESS = (
    "tests/ranks/*",
    "tests/conftest.py",
    "constraints.txt",
    "scripts/setup.sh",
    "hvdloss/cli/install/recipe.py",
    "hvdloss/cli/install/patches/*",
)
# What finds lost ranks, and goes on with those that are left.
RANKS_COME_AND_GO = (
    "hvdloss/train/elastic.py",
    "hvdloss/watch/*",
    "hvdloss/comm/world.py",
    "hvdloss/train/preemption.py",
    "adapters/*/_elastic.py",
    "hvdloss/cli/install/*",
)
NOT_COMPUTED_WITH = (
    *("hvdloss/cli/*", "hvdloss/check/*", "hvdloss/report/*", "hvdloss/report/trackers/*"),
)  # of the core, by adapters


@dataclass(frozen=True)
class Suite:
    """A slow suite, and the code it is there for.

    Attributes:
        name: of its target: ``make test-<name>``.
        what: in a few words.
        paths: patterns of the shell; ``*`` stands for folders too.
        but: those among them that it is not there for.
    """

    name: str
    what: str
    paths: tuple[str, ...]
    but: tuple[str, ...] = ()

    def touched(self, changed: Sequence[str]) -> list[str]:
        """Return those of the changed files that the suite is there for."""
        return [name for name in changed if _matches(name, self.paths) and not _matches(name, self.but)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# In the order in which they run: where time is short, the last ones are left out.
SUITES = (
    Suite(
        "more-torch",
        "PyTorch on 3 and 4 ranks and over MPI",
        (*HARNESS, "hvdloss/*", "adapters/torch/*", "tests/torch/*", "tests/laws/*", "tests/parallel/*"),
        but=(*NOT_COMPUTED_WITH, "tests/parallel/tf_*", "tests/parallel/keras_*"),
    ),
    Suite(
        "more-tensorflow",
        "TensorFlow and Keras on 3 and 4 ranks and over MPI",
        (
            *HARNESS,
            "hvdloss/*",
            *("adapters/tensorflow/*", "adapters/keras/*"),
            *("tests/tensorflow/*", "tests/keras/*", "tests/laws/*", "tests/parallel/*"),
        ),
        but=(*NOT_COMPUTED_WITH, "tests/parallel/torch_*"),
    ),
    Suite(
        "elastic",
        "elastic jobs: ranks killed, stopped, added, preempted",
        (*HARNESS, *RANKS_COME_AND_GO, "hvdloss/report/record.py", "tests/elastic/*"),
    ),
    Suite(
        "hosts",
        "hosts of network namespaces, cut, slowed and killed",
        (*RANKS_COME_AND_GO, "benchmarks/*hosts.py", "scripts/hosts_tools.sh", "tests/hosts/*"),
    ),
    Suite(
        "reliability",
        "every kind of fault, inflicted once",
        (
            *HARNESS,
            *RANKS_COME_AND_GO,
            *(
                "hvdloss/comm/agreement.py",
                "hvdloss/comm/guard.py",
                "hvdloss/losses/ledger.py",
                "tests/reliability/*",
            ),
        ),
    ),
    Suite("pages", "slow pages of the documentation", ("README.md", "docs/*", "tests/docs/*")),
    Suite(
        "tools",
        "slow examples, commands, explanations and packages",
        (
            *HARNESS,
            *(
                "hvdloss/cli/*",
                "hvdloss/check/*",
                "adapters/torch/check/*",
                "hvdloss/explain/*",
                "benchmarks/*",
                "examples/*",
                "scripts/package.py",
            ),
            *(f"tests/{name}/*" for name in ("cli", "core", "examples", "security", "package")),
        ),
    ),
    Suite(
        "integrations",
        "Lightning, Transformers, MLflow, W&B, Ray, launchers",
        (
            *HARNESS,
            *(
                "adapters/torch/integrations/lightning.py",
                "adapters/torch/integrations/transformers.py",
                "hvdloss/report/trackers/*",
            ),
            *(
                "hvdloss/report/*",
                "examples/launch/*",
                "docs/howto/launching.md",
                "docs/howto/integrations.md",
            ),
            *("pyproject.toml", "tests/integrations/*", "tests/parallel/lightning_*"),
            "tests/parallel/transformers_*",
        ),
    ),
    Suite(
        "docker",
        "the container image, built and run",
        (
            *("Dockerfile", ".dockerignore", "compose*.yaml", "constraints.txt", "pyproject.toml"),
            *("scripts/docker*", "hvdloss/cli/install/*", "tests/docker/*"),
        ),
    ),
)


def changed_files(days: float, root: Path = ROOT) -> list[str] | None:
    """Return the files that differ from those `days` before the newest commit; None if that is not known."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout

    try:
        before = int(git("log", "-1", "--format=%ct")) - round(days * 86400)
        # Of the branch itself: what was merged lately has changed lately, however old its commits are.
        base = git("rev-list", "-1", "--first-parent", f"--before={before}", "HEAD").strip()
        if not base:
            return None
        names = git("diff", "--name-only", "--no-renames", "-z", base).split("\0")
        names += git("ls-files", "--others", "--exclude-standard", "-z").split("\0")
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return sorted({name for name in names if name})


def decide(changed: Sequence[str] | None, suites: Sequence[Suite] = SUITES) -> list[tuple[Suite, bool, str]]:
    """Return for each suite whether it has to run, and why."""
    out = []
    for suite in suites:
        if changed is None:
            out.append((suite, True, "there is no history to tell what has changed"))
            continue
        touched = suite.touched(changed)
        rest = f" and {len(touched) - 1} more" if len(touched) > 1 else ""
        why = (
            f"{touched[0]}{rest} changed"
            if touched
            else f"none of its code is among {len(changed)} changed files"
        )
        out.append((suite, bool(touched), why))
    return out


def main() -> None:
    """Print the names of the suites that have to run."""
    parser = argparse.ArgumentParser(description="Say which of the slow suites have to run.")
    parser.add_argument("--days", type=float, default=2.0, help="how far back changes count (default: 2)")
    parser.add_argument("--all", action="store_true", help="every suite, whatever has changed")
    args = parser.parse_args()
    if args.all:
        decided = [(suite, True, "all were asked for") for suite in SUITES]
    else:
        decided = decide(changed_files(args.days))
    for suite, runs, why in decided:
        mark = "runs" if runs else "LEFT OUT"
        print(f"*** {mark}: test-{suite.name} ({suite.what}): {why}", file=sys.stderr)
    print("\n".join(suite.name for suite, runs, _ in decided if runs))


if __name__ == "__main__":
    main()

"""Fuzz the readers of tests/fuzz/targets.py, guided by coverage (`make fuzz`).

    python tests/fuzz/run.py                        # each for 20 seconds
    python tests/fuzz/run.py --seconds 600 parquet  # one of them for longer
    python tests/fuzz/run.py parquet --again FILE   # one input again: what a crash file holds

Needs atheris (pip install 'hvdloss[fuzz]'). The corpus stays in runs/fuzz/NAME, so that the next run goes on
from there; what crashed lies beside it, and is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = HERE.parents[1] / "runs" / "fuzz"
MEMORY_MB = 4096
SLOW_SECONDS = 10


def names() -> list[str]:
    sys.path.insert(0, str(HERE))
    from targets import TARGETS

    return [target.name for target in TARGETS]


def child(name: str, arguments: list[str]) -> None:
    """Be one fuzzer: libFuzzer drives from here on."""
    import atheris

    sys.path.insert(0, str(HERE))
    # Arrow and NumPy are no Python; what is instrumented is what is ours.
    with atheris.instrument_imports(include=["hvdloss"]):
        import targets

    target = next(one for one in targets.TARGETS if one.name == name)
    atheris.Setup([sys.argv[0], *arguments], lambda data: targets.run(target, data))
    atheris.Fuzz()


def fuzz(name: str, seconds: float) -> tuple[bool, str]:
    """Fuzz one target; return whether all was well, and a line about it."""
    sys.path.insert(0, str(HERE))
    from targets import TARGETS

    target = next(one for one in TARGETS if one.name == name)
    corpus, crashes = RUNS / name / "corpus", RUNS / name / "crashes"
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    before = set(crashes.iterdir())
    command = [sys.executable, str(HERE / "run.py"), "--child", name, str(corpus)]
    command += [f"-max_total_time={max(1, round(seconds))}", f"-artifact_prefix={crashes}/"]
    command += [f"-rss_limit_mb={MEMORY_MB}", f"-timeout={SLOW_SECONDS}", "-max_len=4096", "-verbosity=1"]
    began = time.monotonic()
    log = RUNS / name / "log.txt"
    with log.open("wb") as sink:
        status = subprocess.run(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            timeout=seconds + 120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).returncode
    lines = log.read_text(errors="replace").splitlines()
    found = sorted(set(crashes.iterdir()) - before)
    runs = next((line.split()[1] for line in reversed(lines) if line.startswith("Done ")), "?")
    word = "ok" if status == 0 else f"FAILED (status {status})"
    text = f"{name:20} {word:8} {runs:>9} inputs in {time.monotonic() - began:5.1f} s"
    if status:
        shown = [line for line in lines if not line.startswith(("#", "INFO"))][-40:]
        text += "\n" + "\n".join(f"    {line}" for line in shown)
        for path in found:
            text += f"\n    crash: {path}\n    {path.read_bytes()[:200]!r}"
            text += f"\n    again: python tests/fuzz/run.py {name} --again {path}"
    return status == 0, text


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description="Fuzz readers of bytes, guided by coverage.")
    parser.add_argument("targets", nargs="*", help="their names; all if none is given")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each (%(default)s)")
    parser.add_argument("--again", type=Path, help="read this one input, and show what happens")
    args = parser.parse_args()
    known = names()
    unknown = sorted(set(args.targets) - set(known))
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(known)}")
    if args.again:
        import targets

        target = next(one for one in targets.TARGETS if one.name == args.targets[0])
        targets.run(target, args.again.read_bytes())
        print("read without anything that it may not raise")
        return
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("fuzz: SKIPPED: atheris is not installed (pip install 'hvdloss[fuzz]')", file=sys.stderr)
        return
    failed = []
    for name in args.targets or known:
        well, text = fuzz(name, args.seconds)
        print(text, flush=True)
        if not well:
            failed.append(name)
    if failed:
        sys.exit(f"fuzz: {', '.join(failed)} raised what a reader must not raise")


if __name__ == "__main__":
    main()

"""The command line as such: help, version, statuses, lazy imports."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from hvdloss import __version__
from hvdloss.cli import cli
from hvdloss.cli.errors import Exit
from tests.cli.conftest import ROOT, run_cli


def test_help_lists_the_commands_with_one_line_each():
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    for name in ("doctor", "install"):
        assert name in result.output


def test_version():
    result = run_cli("--version")
    assert result.returncode == 0
    assert __version__ in result.stdout


def test_every_command_has_help():
    for name in ("doctor", "install"):
        result = CliRunner().invoke(cli, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert "Exit status" in result.output


def test_an_unknown_command_or_framework_is_a_usage_error():
    assert CliRunner().invoke(cli, ["frobnicate"]).exit_code == 2
    result = CliRunner().invoke(cli, ["install", "--frameworks", "torch,jax"])
    assert result.exit_code == 2
    assert "'jax'" in result.output


def test_neither_hvdloss_nor_help_imports_what_it_does_not_need():
    """`import hvdloss` is for training code; the command line's packages stay out of it."""
    program = (
        "import sys, hvdloss\n"
        "loaded = {'click', 'rich', 'torch', 'tensorflow', 'horovod'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "from hvdloss.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "loaded = {'rich', 'torch', 'tensorflow', 'hvdloss.cli.install'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def documented_statuses() -> dict[int, str]:
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    return {int(n): text for n, text in re.findall(r"^\| (\d+) \| (.*?) \|$", page, re.MULTILINE)}


def test_the_page_of_commands_has_every_exit_status():
    assert documented_statuses() == {int(status): status.meaning for status in Exit}


@pytest.mark.parametrize("name", ["bench", "check", "doctor", "explain", "install", "report", "simulate"])
def test_what_help_says_of_exit_statuses_is_true_of_all(name):
    """A command names those of its own; none that the table does not have."""
    text = " ".join(CliRunner().invoke(cli, [name, "--help"]).output.split())
    for part in ("step", "allreduce") if name == "bench" else ():
        text += " ".join(CliRunner().invoke(cli, [name, part, "--help"]).output.split())
    (told,) = re.findall(r"Exit status: ([^.]*)\.", text)[:1]
    numbers = {int(n) for n in re.findall(r"(?:^|; )(\d+) ", told)}
    assert 0 in numbers
    assert numbers <= documented_statuses().keys()


LONG = ("simulate", "--ranks", "10000", "--steps", "100000")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_its_number(number):
    process = subprocess.Popen(
        [sys.executable, "-m", "hvdloss.cli", *LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        # It is at work when it has loaded NumPy and begun to compute: by then signals are handled.
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            if int(ticks[11]) > 200:  # two seconds of processor time
                break
            time.sleep(0.2)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert out == ""
    assert f"Stopped by {number.name}" in err


def test_progress_is_for_a_terminal_and_not_for_ranks():
    arguments = ["simulate", "--ranks", "64", "--steps", "300"]
    piped = run_cli(*arguments)
    assert piped.returncode == 0
    assert piped.stderr == ""

    shown = on_terminal(*arguments)
    assert "━" in shown or "╸" in shown, shown
    assert "64 ranks" in shown
    of_a_rank = on_terminal(*arguments, env={"HOROVOD_RANK": "1"})
    assert of_a_rank == ""


def on_terminal(*arguments: str, env: dict[str, str] | None = None) -> str:
    """Run a command whose stderr is a terminal, and return what came there."""
    outer, inner = pty.openpty()
    # A pipe has room for 64 KiB, a terminal for 4 KiB: read while it runs.
    process = subprocess.Popen(
        [sys.executable, "-m", "hvdloss.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=inner,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", **(env or {})},
    )
    os.close(inner)
    shown = b""
    try:
        while True:
            try:
                part = os.read(outer, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.wait(120) == 0
    finally:
        process.kill()
        os.close(outer)
    return shown.decode(errors="replace")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hvdloss ", {"bench", "doctor", "explain", "install", "report", "simulate"}),
        ("hvdloss sim", {"simulate"}),
    ],
)
def test_bash_completes_commands(line, expected, tmp_path):
    """With click's script, as docs/reference/commands.md has it."""
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    (source,) = re.findall(r"echo '(eval .*bash_source.*)' >>", page)
    words = line.split(" ")
    command = tmp_path / "hvdloss"  # of this Python, whatever is on PATH
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hvdloss.cli "$@"\n')
    command.chmod(0o755)
    program = f"""
set -e
PATH={shlex.quote(str(tmp_path))}:$PATH
{source}
COMP_WORDS=({" ".join(word or "''" for word in words)})
COMP_CWORD={len(words) - 1}
_hvdloss_completion hvdloss
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("bash is not installed")
    done = subprocess.run([shell, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert expected <= set(done.stdout.split())
    if line.endswith("sim"):
        assert set(done.stdout.split()) == expected


def test_completion_knows_a_commands_options():
    env = {"_HVDLOSS_COMPLETE": "bash_complete", "COMP_WORDS": "hvdloss doctor --j", "COMP_CWORD": "2"}
    assert run_cli(env=env).stdout.split() == ["plain,--json"]

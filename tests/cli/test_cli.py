"""The command line as such: help, version, statuses, lazy imports."""

from __future__ import annotations

import subprocess
import sys

from click.testing import CliRunner

from hvdloss import __version__
from hvdloss.cli import cli

from .conftest import ROOT, run_cli


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

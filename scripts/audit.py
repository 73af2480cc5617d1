"""`make audit` and `make sbom`: known vulnerabilities in what is installed, and a list of it (CycloneDX).

    python scripts/audit.py audit
    python scripts/audit.py sbom --out runs/sbom.json

The tools (the extra `audit`) get an environment of their own, .venv-audit, so that they are neither looked at
nor listed themselves. The audit asks PyPI's advisories through pip-audit, then OSV's. Where neither can be
reached it reads a copy of https://github.com/pypa/advisory-database (git clone it, and name the folder in
HVDLOSS_ADVISORIES), and says how old it is; without one it says loudly that nothing was looked at.
Exit status: 0 nothing known, or skipped; 1 something found; 2 the tool failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / ".venv-audit"
OWN = {"hvdloss"}
CHECKED = 0.5  # of the packages a service must know, or it is no service


@dataclass(frozen=True)
class Found:
    """A known vulnerability of an installed version."""

    package: str
    version: str
    name: str
    fixed: str
    text: str

    def __str__(self) -> str:
        fixed = f"; fixed in {self.fixed}" if self.fixed else "; not fixed"
        return f"{self.package} {self.version}: {self.name}{fixed}: {' '.join(self.text.split())[:160]}"


def normal(name: str) -> str:
    """A package's name as PyPI spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """What is installed for this Python, without local labels (``+cpu``), which no advisory knows."""
    found = {normal(one.metadata["Name"]): one.version.partition("+")[0] for one in distributions()}
    return dict(sorted((name, version) for name, version in found.items() if name not in OWN))


def skipped(why: str) -> int:
    """Say loudly that nothing was done."""
    print(f"\n*** SKIPPED: {why}\n", file=sys.stderr)
    return 0


def tool(name: str) -> Path | None:
    """A tool of the extra `audit`, installed if need be; None where that is impossible."""
    path = TOOLS / "bin" / name
    if not path.exists():
        wanted = _extra("audit")
        venv.create(TOOLS, with_pip=True)
        done = subprocess.run(
            [TOOLS / "bin" / "python", "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True
        )
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
    return path if path.exists() else None


def _extra(name: str) -> list[str]:
    """The requirements of an extra in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(rf"^{name} = \[(.*?)\]", text, re.M | re.S)
    assert block, name
    return re.findall(r'"([^"]+)"', re.sub(r"#.*", "", block[1]))


# -- the audit ----------------------------------------------------------------------------------------


def asked(service: str, packages: dict[str, str]) -> tuple[list[Found], int] | None:
    """Ask a service through pip-audit: what it knows, and how many packages it knew; None without answer."""
    pip_audit = tool("pip-audit")
    if pip_audit is None:
        return None
    wanted = TOOLS / "installed.txt"
    wanted.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
    command = [pip_audit, "-r", wanted, "--no-deps", "--disable-pip", "-s", service, "-f", "json"]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off", "--timeout", "10"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        told = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return None
    # A mirror without advisories answers "not found" for each, which is no clean bill.
    knew = [one for one in told if "skip_reason" not in one]
    found = [
        Found(
            one["name"],
            one["version"],
            "/".join([bug["id"], *bug.get("aliases", [])]),
            ", ".join(bug["fix_versions"]),
            bug["description"],
        )
        for one in knew
        for bug in one["vulns"]
    ]
    return found, len(knew)


def in_copy(folder: Path, packages: dict[str, str]) -> list[Found]:
    """What a copy of the advisory database knows of these packages."""
    import yaml

    out = []
    for package, version in packages.items():
        for path in sorted((folder / "vulns" / package).glob("*.yaml")):
            bug = yaml.safe_load(path.read_text(encoding="utf-8"))
            if "withdrawn" in bug:
                continue
            for affected in bug["affected"]:
                if normal(affected["package"]["name"]) == package and hits(affected, version):
                    names = "/".join([bug["id"], *bug.get("aliases", [])])
                    fixes = ", ".join(fixes_of(affected))
                    out.append(Found(package, version, names, fixes, bug.get("details", "")))
                    break
    return out


def _events(affected: dict[str, Any]) -> Iterable[list[dict[str, str]]]:
    return (one["events"] for one in affected.get("ranges", ()) if one["type"] == "ECOSYSTEM")


def fixes_of(affected: dict[str, Any]) -> list[str]:
    """The versions that an advisory says are fixed."""
    return [event["fixed"] for events in _events(affected) for event in events if "fixed" in event]


def hits(affected: dict[str, Any], version: str) -> bool:
    """Whether a version is affected: listed, or within a range (https://ossf.github.io/osv-schema/)."""
    from packaging.version import InvalidVersion, Version

    def key(text: str) -> Version:
        try:
            return Version(text)
        except InvalidVersion:
            return Version("0")

    mine = key(version)
    if mine in {key(one) for one in affected.get("versions", ())}:
        return True
    for events in _events(affected):
        inside = False
        for event in events:
            if "introduced" in event and mine >= key(event["introduced"]):
                inside = True
            if "fixed" in event and mine >= key(event["fixed"]):
                inside = False
            if "last_affected" in event and mine > key(event["last_affected"]):
                inside = False
        if inside:
            return True
    return False


def age_of(folder: Path) -> str:
    """When a copy of the database was last changed, by git or by the newest of its files."""
    done = subprocess.run(
        ["git", "-C", str(folder), "log", "-1", "--format=%cs"], capture_output=True, text=True
    )
    if done.returncode == 0 and done.stdout.strip() and (folder / ".git").exists():
        return done.stdout.strip()
    newest = ""
    for path in (folder / "vulns").rglob("*.yaml"):
        if dates := re.findall(r'^(?:modified|published): "?(\d{4}-\d\d-\d\d)', path.read_text(), re.M):
            newest = max(newest, *dates)
    return newest or "unknown"


def audit() -> int:
    """Say what is known of what is installed."""
    packages = installed()
    for service, name in (("pypi", "PyPI's advisories"), ("osv", "OSV's advisories")):
        told = asked(service, packages)
        if told is not None and told[1] >= CHECKED * len(packages):
            return shown(told[0], f"{told[1]} of {len(packages)} packages, by {name} as of now")
        print(f"audit: {name} cannot be had here", file=sys.stderr)
    copy = os.environ.get("HVDLOSS_ADVISORIES")
    if copy is None:
        return skipped(
            "audit: no service of advisories can be reached, so NOTHING was looked at. Offline: have a clone "
            "of https://github.com/pypa/advisory-database, and run HVDLOSS_ADVISORIES=its-folder make audit"
        )
    if not (Path(copy) / "vulns").is_dir():
        print(f"audit: HVDLOSS_ADVISORIES={copy}: has no folder vulns", file=sys.stderr)
        return 2
    found = in_copy(Path(copy), packages)
    return shown(found, f"{len(packages)} packages, by a copy of advisories up to {age_of(Path(copy))}")


def shown(found: Sequence[Found], by: str) -> int:
    """Print what was found, and by what."""
    for one in found:
        print(one)
    print(f"audit: {len(found)} known vulnerabilities in {by}")
    return 1 if found else 0


# -- the list -----------------------------------------------------------------------------------------


def sbom(out: Path) -> int:
    """Write what is installed as a CycloneDX list, checked against its schema."""
    cyclonedx = tool("cyclonedx-py")
    if cyclonedx is None:
        return skipped("sbom: cyclonedx-bom cannot be installed here, so there is no list")
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [cyclonedx, "environment", sys.executable, "--pyproject", ROOT / "pyproject.toml"]
    command += ["--output-reproducible", "--validate", "--of", "JSON", "-o", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return 2
    told = json.loads(out.read_text())
    listed = {normal(one["name"]) for one in told["components"]}
    missing = sorted(set(installed()) - listed)
    if missing:
        print(f"sbom: {', '.join(missing)} are installed, but not listed", file=sys.stderr)
        return 2
    print(f"sbom: {len(listed)} components, CycloneDX {told['specVersion']}, valid: {out}")
    return 0


def main() -> int:
    """Run a command."""
    parser = argparse.ArgumentParser(description="Known vulnerabilities in what is installed; a list of it.")
    parser.add_argument("command", choices=("audit", "sbom"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "sbom.json", help="of the list")
    args = parser.parse_args()
    return audit() if args.command == "audit" else sbom(args.out)


if __name__ == "__main__":
    sys.exit(main())

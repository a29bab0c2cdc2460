"""Known vulnerabilities of everything that is installed beside this interpreter, by pip-audit. Needs the internet.

    make audit

Exit code 0: every package was looked up, and nothing is known of any. 1: something is known. 2: not audited, because
the service did not answer, or not for every package; then nothing is said about how safe they are.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

OWN = "sapo"
SECONDS = 900
CLEAN, FOUND, NOT_AUDITED = 0, 1, 2


def installed() -> list[str]:
    """NAME==VERSION of each, ourselves aside. A local version (2.13.0+cpu) is a build of the public one."""
    found = {each.name: each.version.partition("+")[0] for each in distributions() if each.name}
    return sorted(f"{name}=={version}" for name, version in found.items() if name != OWN)


def look_up(packages: list[str]) -> tuple[Any, str]:
    """pip-audit's report, None where there is none; and what it said."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted, report = Path(scratch, "requirements.txt"), Path(scratch, "report.json")
        wanted.write_text("\n".join(packages))
        command = [
            sys.executable, "-m", "pip_audit", "--requirement", wanted, "--no-deps", "--disable-pip",
            "--format", "json", "--output", report, "--progress-spinner", "off", "--cache-dir", Path(scratch, "cache"),
        ]  # fmt: skip
        try:
            ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
            return json.loads(report.read_bytes()), ran.stderr
        except subprocess.TimeoutExpired:
            return None, f"no end after {SECONDS} s"
        except (OSError, ValueError):
            return None, ran.stderr


def judge(packages: list[str], report: Any, said: str) -> tuple[int, str]:
    """Exit code, and what to print."""
    if not isinstance(report, dict) or not isinstance(report.get("dependencies"), list):
        return NOT_AUDITED, f"not audited: {(said.strip().splitlines() or ['no report'])[-1]}"
    looked_up = [each for each in report["dependencies"] if isinstance(each.get("vulns"), list)]
    known = [f"{each['name']} {each['version']}: {vuln['id']}" for each in looked_up for vuln in each["vulns"]]
    names = {_normal(each["name"]) for each in looked_up}
    left_out = [each for each in packages if _normal(each.partition("==")[0]) not in names]
    lines = [*known, *(f"not audited: {each}" for each in left_out if looked_up)]
    if known:
        return FOUND, "\n".join([*lines, f"{len(known)} known vulnerabilities"])
    if left_out:
        return NOT_AUDITED, "\n".join([*lines, f"not audited: {len(left_out)} of {len(packages)} packages"])
    return CLEAN, f"nothing known of {len(packages)} packages"


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    everything = installed()
    code, text = judge(everything, *look_up(everything))
    print(text)
    raise SystemExit(code)

"""`make audit` says that all is well only when every package was looked up."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.small_run import free_address

AUDIT = Path(__file__).parents[2] / ".ci" / "audit.py"
judge = runpy.run_path(str(AUDIT))["judge"]
PACKAGES = ["numpy==2.0.0", "torch==2.13.0"]


def report(*vulnerabilities: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Of the packages in turn; None: it was passed over."""
    rows: list[dict[str, Any]] = []
    for package, found in zip(PACKAGES, vulnerabilities, strict=True):
        name, _, version = package.partition("==")
        rows.append({"name": name, "version": version, "vulns": found} if found is not None else {"name": name})
        if found is None:
            rows[-1]["skip_reason"] = "Dependency not found"
    return {"dependencies": rows}


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (report([], []), 0, "nothing known of 2 packages"),
        (report([], [{"id": "CVE-1"}]), 1, "torch 2.13.0: CVE-1"),
        (report(None, [{"id": "CVE-1"}]), 1, "not audited: numpy==2.0.0"),
        (report([], None), 2, "not audited: 1 of 2 packages"),
        ({"dependencies": []}, 2, "not audited: 2 of 2 packages"),
        ({}, 2, "not audited: connection refused"),
        (None, 2, "not audited: connection refused"),
        ("nonsense", 2, "not audited: connection refused"),
    ],
)
def test_the_verdict(given: Any, code: int, said: str) -> None:
    found, text = judge(PACKAGES, given, "first line\nconnection refused\n")
    assert found == code
    assert said in text
    assert code == 0 or "nothing known" not in text


def test_a_service_that_cannot_be_reached_is_no_verdict() -> None:
    pytest.importorskip("pip_audit", reason="pip-audit comes with sapo[dev]")
    nowhere = f"http://{free_address()}"
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "ALL_PROXY": nowhere}
    ran = subprocess.run(
        [sys.executable, AUDIT], env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "not audited" in ran.stdout
    assert "nothing known" not in ran.stdout

"""`sapo` loads its modules without searching them for garbage, and searches as Python does once it serves."""

import gc
import json
import subprocess
import sys

SERVES = """
import gc, json, sys
from services import cli
from services.runtime import lifecycle

def run(service):
    print(json.dumps({"searches": searches() - before, "kept": gc.get_freeze_count(), "threshold": gc.get_threshold()}))
    return 0

def searches():
    return sum(each["collections"] for each in gc.get_stats())

lifecycle.run, before = run, searches()
sys.argv = ["sapo", "serve", "ingest"]
cli.main()
"""


def test_a_service_is_loaded_without_searches_and_then_searches_as_python_does() -> None:
    result = subprocess.run([sys.executable, "-c", SERVES], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["searches"] <= 3, "Python by itself: dozens, the last ones through everything"
    assert seen["kept"] > 10_000, "what was loaded is not looked at again"
    assert seen["threshold"] == list(gc.get_threshold())

"""Scripts of the tests that need several devices, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def on_eight_devices(script: Path, *arguments: object, **environment: str) -> tuple[Any, str]:
    """What a script prints as JSON in its last line on 8 virtual devices, and all that it says on
    stderr. Warnings are errors there as well."""
    eight = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *map(str, arguments)],
        env={**os.environ, **eight, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr

"""What a new process says."""

from __future__ import annotations

import subprocess
import sys


def python(code: str) -> str:
    """What Python prints that runs this code and ends well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

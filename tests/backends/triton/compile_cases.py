"""Compile the variants of one family ahead of time and print what they use.

    python -m tests.backends.triton.compile_cases quantize_rows

A process of its own, since Triton either interprets or compiles. Prints {case: {capability: {kernel: figures}}}.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

from qfx.backends.triton.device import A100, H100
from qfx.backends.triton.launch import recorded


def main(family: str, names: list[str]) -> int:
    """Compile cases of `tests.backends.triton.aot_<family>`; those named, or all."""
    from qfx.backends.triton.ahead import compile_launch

    found: dict[str, Any] = {}
    for case in importlib.import_module(f"tests.backends.triton.aot_{family}").CASES:
        if names and case.name not in names:
            continue
        for device in (A100, H100):
            capability = device.capability[0] * 10 + device.capability[1]
            with recorded(device) as launches:
                case.run()
            row = found.setdefault(case.name, {}).setdefault(str(capability), {})
            for launch in launches:
                built = compile_launch(launch, device)
                expected = case.expect.get(capability, {}).get(built.kernel, "")
                row[built.kernel] = {
                    "registers": built.registers,
                    "shared": built.shared,
                    "spilled": built.spilled,
                    "fits": built.shared <= device.shared,
                    "has": bool(re.search(expected, built.ptx)),
                    "expected": expected,
                }
    json.dump(found, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

"""Compile the variants of kernels ahead of time and print what they use of the chip.

    python -m tests.backends.triton.compile_cases quantize_rows           one family, or several
    python -m tests.backends.triton.compile_cases --once quantize_rows    without what differs by the target alone
    python -m tests.backends.triton.compile_cases --write                 all, into tests/assets/triton_resources.json
    python -m tests.backends.triton.compile_cases --front-end             none: what Triton would compile for a launch

A process of its own, since Triton either interprets or compiles. Prints {case: {capability: {kernel: figures}}}, for
the last {"launches": how many, "differ": [those for which Triton's own front end would compile something else]}.
`--once`: a launch of a later chip that has the constants, types and options of the first chip's, and of which the same
is expected, is not compiled; null stands for its figures.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

from qfx.backends.triton.device import A100, H100, Device
from qfx.backends.triton.launch import Launch, recorded
from tests.backends.triton.cases import Case

HERE = Path(__file__).parent
GOLDEN = HERE.parents[1] / "assets" / "triton_resources.json"
FAMILIES = sorted(path.stem.removeprefix("aot_") for path in HERE.glob("aot_*.py"))


_KNOWN: dict[Any, Any] = {}  # what was compiled in this process


def compiled(family: str, *, once: bool = False) -> dict[str, Any]:
    """The figures of the cases of a family, a row for each launch."""
    found: dict[str, Any] = {}
    for case in cases_of(family):
        assert case.name not in found, f"two cases are called {case.name!r}"
        known: set[Any] = set()
        for device in (A100, H100):
            capability = device.capability[0] * 10 + device.capability[1]
            with recorded(device) as launches:
                case.run()
            row = found.setdefault(case.name, {}).setdefault(str(capability), {})
            expectations = case.expect.get(capability, {})
            for launch in launches:
                kernel = launch.kernel.fn.__name__
                same = (_identity(launch), expectations.get(kernel))
                if once and device is not A100 and same in known:
                    row.setdefault(kernel, []).append(None)
                    continue
                known.add(same)
                built = _built(launch, device)
                figures = {"registers": built.registers, "shared": built.shared, "spilled": built.spilled}
                faults = []
                if built.spilled:
                    faults.append(f"spills {built.spilled} bytes")
                if built.shared > device.shared:
                    faults.append(f"needs {built.shared} bytes of shared memory, there are {device.shared}")
                expected = expectations.get(built.kernel)
                if expected is not None and not re.search(expected, built.ptx):
                    faults.append(f"no instruction {expected!r}")
                row.setdefault(built.kernel, []).append({**figures, "faults": faults})
            missing = set(expectations) - set(row)
            assert not missing, f"{case.name}: expected kernels that were not launched on {capability}: {missing}"
    return found


def cases_of(family: str) -> list[Case]:
    """The cases of `tests.backends.triton.aot_<family>`."""
    cases: list[Case] = importlib.import_module(f"tests.backends.triton.aot_{family}").CASES
    return cases


def _identity(launch: Launch) -> tuple[Any, ...]:
    """What tells a launch from others, but for the chip: the kernel, its types and constants, and the options."""
    from qfx.backends.triton import ahead

    return (ahead.source_of(launch).hash(), *sorted(launch.options.items()))


def _built(launch: Launch, device: Device) -> Any:
    """The launch compiled, once for all those that Triton cannot tell apart."""
    from qfx.backends.triton import ahead

    key = (device.capability, *_identity(launch))
    if key not in _KNOWN:
        _KNOWN[key] = ahead.compile_launch(launch, device)
    return _KNOWN[key]


class _Driver:
    """What Triton asks of a GPU before it compiles; there is none."""

    def __init__(self, device: Device) -> None:
        self.capability = device.capability[0] * 10 + device.capability[1]

    def get_current_device(self) -> int:
        return self.capability  # kernels of one are not those of another

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def front_end(families: list[str]) -> dict[str, Any]:
    """Each launch as on a GPU, up to the compiler: are types, constants, alignment and options those of `ahead`?"""
    from triton.compiler.compiler import make_backend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from qfx.backends.triton import ahead

    bound: list[tuple[Any, ...]] = []

    def compiled_never(*asked: Any) -> None:
        _, _, signature, _, constants, options, attrs, _ = asked
        bound.append((dict(signature), dict(constants), {k: v for k, v in attrs.items() if v}, vars(options)))

    JITFunction._do_compile = compiled_never
    count, differ = 0, []
    for family, device in itertools.product(families, (A100, H100)):
        on = _Driver(device)
        driver.set_active(on)
        for case in cases_of(family):
            with recorded(device) as launches:
                case.run()
            for launch in launches:
                options = {**launch.options, "enable_fp_fusion": True}
                bound.clear()
                launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **options)
                source, count = ahead.source_of(launch), count + 1
                settled = vars(make_backend(on.get_current_target()).parse_options(options))
                expected = (dict(source.signature), source.constants, source.attrs, settled)
                differ += [
                    f"{family}, {case.name}, {launch.kernel.fn.__name__}: {left} is not {right}"
                    for left, right in zip(bound[0], expected, strict=True)
                    if left != right
                ]
    return {"launches": count, "differ": differ}


def main(arguments: list[str]) -> int:
    """The command above."""
    if arguments == ["--write"]:
        table = {"triton": _version(), "families": {family: compiled(family) for family in FAMILIES}}
        GOLDEN.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        return 0
    if arguments == ["--front-end"]:
        json.dump(front_end(FAMILIES), sys.stdout)
        return 0
    once = arguments[:1] == ["--once"]
    cases = {family: compiled(family, once=once) for family in arguments[once:]}
    json.dump({"triton": _version(), "cases": cases}, sys.stdout, indent=1)
    return 0


def _version() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

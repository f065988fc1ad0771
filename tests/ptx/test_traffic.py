"""What is counted of a kernel's accesses."""

from __future__ import annotations

import pytest

from tests.ptx import traffic
from tests.ptx.test_races import run


def counted(body: str, space: str) -> traffic.Row:
    """The one row of a space."""
    with traffic.counted() as found:
        run(body)
    (row,) = (r for r in found.rows.values() if r.space == space)
    return row


@pytest.mark.parametrize(
    ("body", "bytes_", "moved"),
    [
        ("ld.global.b32 %r10, [%rd4];", 512, 512),
        ("ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd7];", 2048, 2048),
        ("ld.global.b32 %r10, [%rd7];", 512, 2048),  # one word of four
        ("ld.global.b32 %r10, [%rd1];", 16, 128),  # one word for all
        ("@%p2 ld.global.b8 %r10, [%rd4];", 64, 256),  # one byte of four, by half of the threads
        ("st.global.b32 [%rd5], %r1;", 512, 512),
        ("cp.async.cg.shared.global [%r8], [%rd7], 16; cp.async.wait_all;", 2048, 2048),
    ],
)
def test_sectors(body: str, bytes_: int, moved: int) -> None:
    row = counted(body, "global")
    assert (row.executions, row.bytes, row.moved, row.waste) == (4, bytes_, moved, moved / bytes_)


@pytest.mark.parametrize(
    ("body", "passes", "least"),
    [
        ("ld.shared.b32 %r10, [%r5];", 4, 4),
        ("shl.b32 %r10, %r1, 3; ld.shared.b32 %r11, [%r10];", 8, 4),  # every second bank
        ("and.b32 %r10, %r5, 3; ld.shared.b32 %r11, [%r10];", 4, 4),  # one word for all
        ("ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r8];", 16, 16),
        ("and.b32 %r10, %r3, 7; shl.b32 %r10, %r10, 7; st.shared.v4.b32 [%r10], {%r3, %r3, %r3, %r3};", 128, 16),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r8];", 16, 16),
        ("cp.async.cg.shared.global [%r8], [%rd7], 16; cp.async.wait_all;", 16, 16),
    ],
)
def test_banks(body: str, passes: int, least: int) -> None:
    if "st.shared" in body:
        body = "setp.lt.u32 %p4, %r1, 8; @!%p4 bra $out;" + body + "$out:"
        passes, least = passes // 16, least // 16
    row = counted(body, "shared")
    assert (row.passes, row.least, row.waste) == (passes, least, passes / least)


def test_a_table_names_the_line() -> None:
    with traffic.counted() as counts:
        run(".loc 1 7 9, function_name $x, inlined_at 1 9 9 // some.py:7:9\nld.global.b32 %r10, [%rd7];\n")
        run("ld.global.b32 %r10, [%rd4];")
    found = counts.table(above=1.0).splitlines()
    assert len(found) == 3
    assert "(some.py:7): ld.global.b32 %r10, [%rd7]" in found[1] and found[1].split()[0] == "4.00"


def test_the_other_half_of_a_sector_is_moved_once() -> None:
    """Threads of 32 bytes each read one half of them and then the other."""
    body = "mul.wide.u32 %rd8, %r1, 32; add.s64 %rd9, %rd1, %rd8;"
    body += "".join(f"ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd9+{at}];\n" for at in (0, 16))
    with traffic.counted() as found:
        run(body, programs=2)
    assert [(row.bytes, row.waste) for row in found.rows.values()] == [(4096, 2.0)] * 2
    assert found.once("kernel") == (8192, 8192)

"""instructions: loops of machine code and what they read, on text as nvdisasm writes it and on a kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.backends.triton.instructions import Loop, loops, parsed

TEXT = """
	.section	.text.kernel,"ax",@progbits
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0020*/                   IMAD.WIDE R2, R0, R5, c[0x0][0x210] ;
        /*0030*/                   LDC.64 R8, c[0x0][0x218] ;
.L_x_1:
        /*0040*/                   LDG.E.128 R12, desc[UR4][R2.64+0x10] ;
        /*0050*/               @P0 LDG.E.U8 R6, desc[UR4][R8.64] ;
        /*0060*/                   LOP3.LUT R13, R13, 0xf000f, RZ, 0xc0, !PT ;
        /*0070*/                   HMMA.16816.F32 R16, R12, R14, R16 ;
        /*0080*/                   IADD3 R2, P1, R2, 0x100, RZ ;
        /*0090*/                   IMAD.X R3, RZ, RZ, R3, P1 ;
        /*00a0*/              @!P0 BRA `(.L_x_1) ;
        /*00b0*/               @P2 BRA `(.L_x_2) ;
        /*00c0*/                   STG.E desc[UR4][R2.64], R16 ;
.L_x_2:
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_3);
"""


def test_a_loop_and_what_it_reads() -> None:
    code = parsed(TEXT)
    assert [step.op for step in code][4:7] == ["LDG.E.128", "LDG.E.U8", "LOP3.LUT"]
    found = loops(code, {0x210: "w_ptr", 0x218: "zero_ptr"})
    assert found == [Loop(7, 2, {"w_ptr": 512, "zero_ptr": 32})]


def test_branches_forward_and_the_end_are_no_loops() -> None:
    assert loops(parsed(TEXT.replace("@!P0 BRA `(.L_x_1)", "@!P0 BRA `(.L_x_2)")), {}) == []


def test_what_is_not_an_argument_is_not_counted() -> None:
    assert loops(parsed(TEXT), {0x400: "w_ptr"}) == [Loop(7, 2, {})]


def test_a_product_with_four_bits_reads_more_than_it_starts_instructions() -> None:
    command = [sys.executable, "-m", "tests.backends.triton.instructions", "weight_only", "i4/g128/f16 m=1 "]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "QFX_TEST_PTX": ""}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert said.count("fragments: ") == 2
    counted = re.findall(r"\bw \d+ \((\S+) an instruction\)", said)
    assert len(counted) == 2 and all(float(number) > 7 for number in counted)

"""The machine that carries out PTX: what its instructions give, and what it finds wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx.faults import FaultError
from tests.ptx.machine import Machine
from tests.ptx.memory import Global
from tests.ptx.parse import parse
from tests.ptx.values import from_bf16, to_bf16
from tests.ptx.wgmma import swizzled

HEAD = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
.reqntid THREADS
{
.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<9>;
ld.param.b64 %rd1, [kernel_param_0];
ld.param.b64 %rd2, [kernel_param_1];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
"""
END = "\nst.global.b32 [%rd5], %r3;\nret;\n}\n"
LOAD = "ld.global.b32 %r2, [%rd4];\n"


def run(body: str, given: torch.Tensor, *, threads: int = 32, programs: int = 1, shared: int = 1024) -> torch.Tensor:
    """What a kernel leaves in %r3 of each thread, whose words are those of `given` in %r2."""
    program = parse(HEAD.replace("THREADS", str(threads)) + body + END)
    found = torch.full((threads,), -1, dtype=torch.int32)
    memory = Global([given, found])
    params = {f"kernel_param_{i}": memory.address(t).to_bytes(8, "little") for i, t in enumerate((given, found))}
    Machine(program, (programs, 1, 1), range(programs), params, memory, shared, {}).run()
    memory.give_back()
    return found


WORDS = torch.randint(-(2**31), 2**31, (64,), generator=torch.Generator().manual_seed(0)).to(torch.int32)


@pytest.mark.parametrize(
    ("body", "due"),
    [
        ("add.s32 %r3, %r2, -7;", lambda x: x - 7),
        ("shr.u32 %r3, %r2, 5;", lambda x: (x.long() & 0xFFFFFFFF) >> 5),
        ("shr.s32 %r3, %r2, 40;", lambda x: x >> 31),
        ("bfe.s32 %r3, %r2, 4, 8;", lambda x: x << 20 >> 24),
        ("bfi.b32 %r3, %r2, 0xABCD, 8, 16;", lambda x: (x & 0xFFFF) << 8 | 0xCD),
        ("div.s32 %r3, %r2, -3;", lambda x: torch.div(x, -3, rounding_mode="trunc")),
        ("rem.s32 %r3, %r2, 7;", lambda x: torch.fmod(x, 7)),
        ("mul.hi.s32 %r3, %r2, %r2;", lambda x: x.long() * x.long() >> 32),
        ("setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 5, %r2, %p1;", lambda x: torch.where(x < 0, 5, x)),
        ("prmt.b32 %r3, %r2, 0, 0x0123;", lambda x: x.view(torch.uint8).reshape(-1, 4).flip(1).view(torch.int32)[:, 0]),
        ("prmt.b32 %r3, %r2, 0, 0x888b;", lambda x: torch.where(x < 0, 255, 0) + (x << 24 >> 31 << 8)),
        ("shf.l.wrap.b32 %r3, %r2, 5, 36;", lambda x: (x.long() & 0xFFFFFFFF) >> 28 | 5 << 4),
        ("shf.r.clamp.b32 %r3, 7, %r2, 40;", lambda x: x),
        ("lop3.b32 %r3, %r2, 0xFF, 0xF00, 0xEA;", lambda x: x & 0xFF | 0xF00),
        ("cvt.rn.f32.s32 %r3, %r2;", lambda x: x.float().view(torch.int32)),
        ("shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", lambda x: x.reshape(-1, 2).flip(1).flatten()),
        ("redux.sync.max.s32 %r3, %r2, -1;", lambda x: x.max().expand(32)),
        ("{ .reg .b32 t; mov.b32 t, %r2; { .reg .b32 t; mov.b32 t, 9; } mov.b32 %r3, t; }", lambda x: x),
    ],
)
def test_one_instruction(body: str, due: object) -> None:
    x = WORDS[:32].clone()
    assert torch.equal(run(LOAD + body, x), due(x).to(torch.int32))  # type: ignore[operator]


def test_floats_are_rounded_once_and_saturate() -> None:
    x = torch.tensor([1.0, -0.4, 3e9, float("nan"), -3e9, 2.5, 1e-40, -1e-40] * 4)
    word = x.view(torch.int32)
    whole = run(LOAD + "cvt.rzi.s32.f32 %r3, %r2;", word)[:6]
    assert whole.tolist() == [1, 0, 2**31 - 1, 0, -(2**31), 2]
    half = run(LOAD + "cvt.rn.bf16x2.f32 %r3, 0f3F800000, %r2;", word)
    assert torch.equal(half.view(torch.bfloat16).reshape(-1, 2)[:, 0].nan_to_num(7), x.bfloat16().nan_to_num(7))
    assert half.view(torch.bfloat16)[1] == 1.0
    flushed = run(LOAD + "mul.ftz.f32 %r3, %r2, 0f3F800000;", word).view(torch.float32)
    assert flushed[6] == 0 and flushed[0] == 1
    greater = run(LOAD + "max.f32 %r3, %r2, 0f00000000;", word).view(torch.float32)
    assert greater[3] == 0, "the number of a number and NaN"
    assert run(LOAD + "max.NaN.f32 %r3, %r2, 0f00000000;", word).view(torch.float32)[3].isnan()


def test_bf16_of_a_tie_in_f64() -> None:
    """Rounding to f32 on the way would make a tie of what lies just above one."""
    assert from_bf16(to_bf16(np.asarray([1 + 2.0**-8 + 2.0**-40])))[0] == 1 + 2.0**-7
    assert from_bf16(to_bf16(np.asarray([1 + 2.0**-8])))[0] == 1.0


def test_threads_part_and_meet() -> None:
    body = """
    mov.b32 %r3, 0;
    $loop: setp.ge.u32 %p1, %r3, %r1;
    @%p1 bra $out;
    add.s32 %r3, %r3, 1;
    bra.uni $loop;
    $out: bar.sync 0;
    """
    assert run(LOAD + body, WORDS, threads=64).tolist() == list(range(64))


def test_a_barrier_in_a_branch_is_found() -> None:
    body = "setp.lt.u32 %p1, %r1, 7; @%p1 bra $out; bar.sync 0; $out: mov.b32 %r3, 0;"
    with pytest.raises(FaultError, match="wait for others that do not come"):
        run(body, WORDS)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("ld.global.b32 %r3, [%rd4+256];", "outside"),
        ("ld.global.b32 %r3, [%rd4+2];", "not aligned"),
        ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd4];", "not aligned"),
        ("st.global.b32 [%rd4+-256], %r1; mov.b32 %r3, 0;", "outside"),
        ("st.shared.b32 [%r1+2048], %r1; mov.b32 %r3, 0;", "shared address"),
    ],
)
def test_accesses_that_a_gpu_would_not_forgive(body: str, said: str) -> None:
    with pytest.raises(FaultError, match=said):
        run(body, WORDS)


def test_shared_memory_begins_with_what_no_one_wrote() -> None:
    body = "shl.b32 %r4, %r1, 2; ld.shared.b32 %r3, [%r4]; st.shared.b32 [%r4], %r1; bar.sync 0;"
    assert run(body, WORDS).tolist() == [-1] * 32
    assert run(body + "xor.b32 %r4, %r4, 4; ld.shared.b32 %r3, [%r4];", WORDS).tolist() == [i ^ 1 for i in range(32)]


def test_copies_fill_up_with_zeros() -> None:
    body = """
    shl.b32 %r4, %r1, 4;
    setp.lt.u32 %p1, %r1, 4; selp.b32 %r5, 16, 0, %p1; mul.wide.u32 %rd6, %r1, 16; add.s64 %rd7, %rd1, %rd6;
    cp.async.cg.shared.global [%r4+0], [%rd7+0], 0x10, %r5;
    cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    shl.b32 %r6, %r1, 2; ld.shared.b32 %r3, [%r6];
    """
    found = run(body, WORDS)
    assert torch.equal(found[:16], WORDS[:16]) and not found[16:].any()


def test_a_product_of_a_warp() -> None:
    """Fragments after the figures of the ISA: thread t of the warp has row t / 4 and columns from 2 (t % 4) on."""
    a = torch.randn(16, 16, dtype=torch.float16)
    b = torch.randn(16, 8, dtype=torch.float16)
    words = []
    for t in range(32):
        g, c = t // 4, t % 4 * 2
        pairs = [a[g, c:], a[g + 8, c:], a[g, c + 8 :], a[g + 8, c + 8 :], b[c:, g], b[c + 8 :, g]]
        words.append(torch.stack([p[:2] for p in pairs]).flatten().view(torch.int32))
    given = torch.stack(words)  # [32, 6]
    product = a.float() @ b.float()
    for i in range(4):
        loads = "".join(f"ld.global.b32 %r{10 + j}, [%rd7+{4 * j}];\n" for j in range(6))
        body = f"""
        mul.wide.u32 %rd6, %r1, 24; add.s64 %rd7, %rd1, %rd6;
        {loads}
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}},
        {{%r14, %r15}}, {{0f00000000, 0f00000000, 0f00000000, 0f00000000}};
        mov.b32 %r3, %r{20 + i};
        """
        found = run(body, given).view(torch.float32)
        due = torch.stack([product[t // 4 + 8 * (i // 2), t % 4 * 2 + i % 2] for t in range(32)])
        torch.testing.assert_close(found, due, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_a_swizzle_moves_16_bytes_within_its_rows(width: int) -> None:
    addresses = np.arange(0, 8 * width, 16)
    moved = swizzled(addresses, width)
    assert sorted(moved) == list(addresses) and (moved // width == addresses // width).all()
    columns = (moved % width // 16).reshape(8, -1)
    assert len({tuple(row) for row in columns}) == width // 16


@pytest.mark.parametrize(
    "body",
    [
        "tanh.approx.f32 %r3, %r1;",
        "add.sat.s32 %r3, %r1, %r1;",
        "cvt.rn.relu.bf16x2.f32 %r3, %r1, %r1;",
        "bar.arrive 1, 64;",
        "barrier.cluster.wait.aligned;",
        "mbarrier.arrive.shared::cta.b64 _, [%r1];",
    ],
)
def test_what_is_unknown_is_said(body: str) -> None:
    with pytest.raises(NotImplementedError, match=body.split(maxsplit=1)[0].rstrip(";")):
        run(body, WORDS)

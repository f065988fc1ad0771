"""Races that the machine finds, and what it takes not to have them."""

from __future__ import annotations

import pytest
import torch

from tests.ptx.copies import Map
from tests.ptx.faults import FaultError
from tests.ptx.machine import Machine
from tests.ptx.memory import Global
from tests.ptx.parse import parse

HEAD = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
.reqntid 128
{
.reg .pred %p<9>; .reg .b32 %r<40>; .reg .b64 %rd<12>;
ld.param.b64 %rd1, [kernel_param_0];
ld.param.b64 %rd2, [kernel_param_1];
mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; and.b32 %r3, %r1, 31; shr.u32 %r4, %r1, 5;
mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
shl.b32 %r5, %r1, 2;   // own word
xor.b32 %r6, %r5, 128; // that of a thread of another warp
xor.b32 %r7, %r5, 4;   // that of another thread of the warp
shl.b32 %r8, %r1, 4; mul.wide.u32 %rd6, %r1, 16; add.s64 %rd7, %rd1, %rd6; // 16 bytes
xor.b32 %r9, %r8, 512;
setp.eq.b32 %p1, %r1, 0; setp.lt.u32 %p2, %r3, 16; setp.lt.u32 %p3, %r1, 64;
"""
KEY = 1 << 20  # that of a tensor descriptor


def run(body: str, *, programs: int = 1, copies_fenced: int = True) -> torch.Tensor:
    """Carry out a body for 128 threads; %rd1 and %rd2 are tensors of 2048 words, of which the second is given back."""
    program = parse(HEAD + body + "\nret;\n}\n")
    given = torch.arange(2048, dtype=torch.int32)
    found = torch.zeros(2048, dtype=torch.int32)
    memory = Global([given, found])
    params = {f"kernel_param_{i}": memory.address(t).to_bytes(8, "little") for i, t in enumerate((given, found))}
    map_ = Map(memory.address(given), 4, (16, 32), 128, (16, 32), 0)
    grid, boxes = (programs, 1, 1), {KEY: map_}
    Machine(program, grid, range(programs), params, memory, 8192, boxes, copies_fenced=bool(copies_fenced)).run()
    memory.give_back()
    return found


def refused(body: str, said: str, **options: int) -> None:
    """The body is refused, by a line that names what lacks."""
    with pytest.raises(FaultError, match=said) as caught:
        run(body, **options)
    assert any("line " in note for note in caught.value.__notes__)


def with_and_without(body: str, mark: str, said: str, **options: int) -> None:
    """As it stands the body passes; without the instructions between marks it is refused."""
    run(body.replace(mark, ""), **options)
    start, end = body.index(mark), body.rindex(mark)
    assert start < end
    refused(body[:start] + body[end + len(mark) :], said, **options)


# One warp may be an iteration ahead of the others.
LOOP = """
mov.b32 %r10, 0;
$loop: st.shared.b32 [%r5], %r10; bar.sync 0; ld.shared.b32 %r11, [%r6]; # bar.sync 0; #
add.s32 %r10, %r10, 1; setp.lt.u32 %p4, %r10, 3; @%p4 bra $loop;
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("st.shared.b32 [%r5], %r1; # bar.sync 0; # ld.shared.b32 %r10, [%r6];", "warp . reads .* no barrier between"),
        ("ld.shared.b32 %r10, [%r6]; # bar.sync 0; # st.shared.b32 [%r5], %r1;", "has read: no barrier between"),
        ("st.shared.b32 [%r5], %r1; # bar.sync 0; # st.shared.b32 [%r6], %r1;", "overwrites .* no barrier between"),
        ("st.shared.b32 [%r5], %r1; # barrier.sync 0; # ld.shared.b8 %r10, [%r6+1];", "no barrier between"),
        # a barrier of two of the warps
        ("st.shared.b32 [%r5], %r1; @!%p3 bra $out; # bar.sync 1, 64; # ld.shared.b32 %r10, [%r6]; $out:", "between"),
        (LOOP, "overwrites .* that warp . has read"),
    ],
)  # fmt: skip
def test_barriers_among_warps(body: str, said: str) -> None:
    with_and_without(body, "#", said)


def test_a_barrier_of_some_warps_does_not_order_the_others() -> None:
    body = """
    st.shared.b32 [%r5], %r1; @!%p3 bra $out; bar.sync 1, 64; $out:
    ld.shared.b32 %r10, [%r{}];
    """
    run(body.format(7))
    refused(body.format(6), "no barrier between")


def test_threads_of_a_warp_are_in_order_until_they_part() -> None:
    run("st.shared.b32 [%r5], %r1; ld.shared.b32 %r10, [%r7]; st.shared.b32 [%r7], %r1;")
    parted = "@%p2 bra $out; st.shared.b32 [%r5], %r1; $out: # bar.warp.sync -1; # ld.shared.b32 %r10, [%r11];"
    run("mov.b32 %r11, %r5;" + parted[: parted.index("#")] + parted[parted.rindex("#") + 1 :])
    with_and_without("xor.b32 %r11, %r5, 64;" + parted, "#", "no bar.warp.sync between")


def test_two_threads_store_at_once() -> None:
    run("mov.b32 %r10, 7; st.shared.b32 [0], %r10;".replace("[0]", "[%r11]"))
    refused("st.shared.b32 [%r11], %r1;", "two threads store different words")


COPY = "cp.async.cg.shared.global [%r8], [%rd7], 16; cp.async.commit_group; "


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (COPY + "# cp.async.wait_group 0; # ld.shared.b32 %r10, [%r8];", "no wait for that copy"),
        (COPY + "# cp.async.wait_all; # st.shared.b32 [%r8], %r1;", "no wait for that copy"),
        (COPY + "cp.async.wait_group 0; # bar.sync 0; # ld.shared.b32 %r10, [%r9];", "no barrier between"),
        (COPY + "bar.sync 0; # cp.async.wait_group 0; bar.sync 0; # ld.shared.b32 %r10, [%r9];", "no wait for"),
        ("ld.shared.b32 %r10, [%r9]; # bar.sync 0; # " + COPY, "has read: no barrier between"),
        # the later of two groups
        (
            COPY + COPY.replace("%r8", "%r8+2048") + "cp.async.wait_group 1; ld.shared.b32 %r10, [%r8];"
            "# cp.async.wait_group 0; # ld.shared.b32 %r10, [%r8+2048];",
            "no wait for that copy",
        ),
    ],
)  # fmt: skip
def test_copies_of_threads(body: str, said: str) -> None:
    with_and_without(body, "#", said)


def test_words_side_by_side_in_two_groups() -> None:
    """Every second word of 16 bytes is copied by the later group."""
    word = "cp.async.ca.shared.global [%r5], [%rd4], 4;"
    body = f"""
    and.b32 %r10, %r1, 1; setp.eq.u32 %p4, %r10, 0;
    @%p4 {word} cp.async.commit_group; @!%p4 {word} cp.async.commit_group;
    # cp.async.wait_group 0; # cp.async.wait_group 1; bar.sync 0; ld.shared.b32 %r11, [%r5];
    """
    with_and_without(body, "#", "no wait for that copy")
    with_and_without(
        body.replace("bar.sync 0;", "@%p4 st.shared.b32 [%r5], %r1; bar.sync 0;"), "#", "no wait for that copy"
    )


def test_what_is_copied_is_there_after_the_wait() -> None:
    body = COPY + "cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r10, [%r5]; st.global.b32 [%rd5], %r10;"
    assert run(body)[:128].tolist() == list(range(128))


INIT = "mov.b32 %r20, 4096; mov.b32 %r21, 0; mov.b64 %rd8, 1048576; @%p1 mbarrier.init.shared::cta.b64 [%r20], 1;\n"
BOX = """
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 2048;
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r21], [%rd8, {%r21, %r21}], [%r20];
"""
WAIT = "{ .reg .pred c; $wait: mbarrier.try_wait.parity.shared::cta.b64 c, [%r20], %r21; @!c bra.uni $wait; }\n"
END = "ld.shared.b32 %r10, [%r5]; st.global.b32 [%rd5], %r10; bar.sync 0; @%p1 mbarrier.inval.shared::cta.b64 [%r20];"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (INIT + "bar.sync 0;" + BOX + "#" + WAIT + "#" + END, "a copy by a descriptor wrote .* no wait at its barrier"),
        (INIT + "# bar.sync 0; #" + BOX + WAIT + END, "reads shared address 0x1000 .* no barrier between"),
        (INIT + "bar.sync 0; ld.shared.b32 %r10, [%r5]; # bar.sync 0; #" + BOX + WAIT + END, "overwrites"),
        (INIT + "bar.sync 0; st.shared.b32 [%r5], %r1; # bar.sync 0; #" + BOX + WAIT + END, "overwrites"),
        (INIT + "bar.sync 0;" + BOX + WAIT + "# bar.sync 0; # @%p1 mbarrier.inval.shared::cta.b64 [%r20];", "has read"),
    ],
)  # fmt: skip
def test_copies_by_descriptors(body: str, said: str) -> None:
    with_and_without(body, "#", said)


def test_programs_end_after_their_copies() -> None:
    run(INIT + "bar.sync 0;" + BOX + WAIT)
    with pytest.raises(FaultError, match=r"ends while copies .* are under way"):
        run(INIT + "bar.sync 0;" + BOX)


def test_only_who_waits_has_the_copy() -> None:
    """One warp waits at the barrier in memory; the others learn of the copy by a barrier of all."""
    one = "setp.ge.u32 %p4, %r1, 32; @%p4 bra $later;" + WAIT + "$later:"
    with_and_without(INIT + "bar.sync 0;" + BOX + one + "# bar.sync 0; #" + END, "#", "no wait at its barrier")


def test_a_box_lands_whole() -> None:
    assert run(INIT + "bar.sync 0;" + BOX + WAIT + END)[:128].tolist() == list(range(128))


# A: 64 x 16 f16 from 0 on, B: 8 x 16 from 2048 on, in core matrices of 8 rows of 16 bytes, those of a row side by side.
A, B = 8 << 16 | 16 << 32, 2048 >> 4 | 8 << 16 | 16 << 32
STORE = "mov.b32 %r12, 0; st.shared.v4.b32 [%r8], {%r12, %r12, %r12, %r12}; st.shared.b32 [%r5+2048], %r12;"
TO = "{%r30, %r31, %r32, %r33}"
PRODUCT = (
    "wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
    f"{TO}, %rd9, %rd10, 0, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;"
)
OPERANDS = f"mov.b64 %rd9, {A}; mov.b64 %rd10, {B};"
VISIBLE = "fence.proxy.async.shared::cta; bar.sync 0;"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (STORE + "# fence.proxy.async.shared::cta; # bar.sync 0;" + PRODUCT, "no fence.proxy.async between"),
        (STORE + "bar.sync 0; # fence.proxy.async.shared::cta; #" + PRODUCT, "no fence.proxy.async between"),
        (STORE + "fence.proxy.async.shared::cta; # bar.sync 0; #" + PRODUCT, "multiplies .* no barrier between"),
        (STORE + VISIBLE + PRODUCT + "# wgmma.wait_group.sync.aligned 0; # bar.sync 0;" + STORE, "no wgmma.wait_group"),
        (STORE + VISIBLE + PRODUCT + "wgmma.wait_group.sync.aligned 0; # bar.sync 0; #" + STORE, "no barrier after"),
        # the later of two products
        (
            STORE + VISIBLE + PRODUCT + PRODUCT.replace("%rd10", "%rd11") + "wgmma.wait_group.sync.aligned 1;"
            "# wgmma.wait_group.sync.aligned 0; # bar.sync 0; st.shared.b32 [%r5+4096], %r1;",
            "no wgmma.wait_group",
        ),
    ],
)  # fmt: skip
def test_products_of_four_warps(body: str, said: str) -> None:
    body = OPERANDS + f"mov.b64 %rd11, {B + (2048 >> 4)}; st.shared.b32 [%r5+4096], %r1;" + body
    with_and_without(body, "#", said)


COPIED = (
    "mov.b32 %r12, 0; st.shared.b32 [%r5+2048], %r12;\ncp.async.cg.shared.global [%r8], [%rd7], 16; "
    "cp.async.commit_group; cp.async.wait_group 0;"
)


def test_products_of_what_was_copied() -> None:
    said = "no fence.proxy.async between"
    with_and_without(OPERANDS + COPIED + "# fence.proxy.async.shared::cta; # bar.sync 0;" + PRODUCT, "#", said)


def test_copies_may_be_let_off_the_fence() -> None:
    """What warps store is not, nor the barrier."""
    copied = "fence.proxy.async.shared::cta;" + COPIED.replace("st.shared.b32 [%r5+2048], %r12;", "")
    run(OPERANDS + copied + "bar.sync 0;" + PRODUCT, copies_fenced=False)
    refused(OPERANDS + copied + "bar.sync 0;" + PRODUCT, "no fence.proxy.async between")
    refused(OPERANDS + copied + PRODUCT, "multiplies .* no barrier between", copies_fenced=False)
    refused(OPERANDS + COPIED + "bar.sync 0;" + PRODUCT, "no fence.proxy.async between", copies_fenced=False)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("# wgmma.wait_group.sync.aligned 0; # st.global.b32 [%rd5], %r30;", "%r30 is used, the result of a product"),
        ("mov.b32 %r13, %r30; # wgmma.wait_group.sync.aligned 0; # add.s32 %r14, %r13, 1;", "%r13 is used"),
        ("# wgmma.wait_group.sync.aligned 0; # add.s32 %r30, %r30, 1;", "%r30 is used, the result of a product"),
        ("# wgmma.wait_group.sync.aligned 0; # mov.b32 %r16, 0;", "%r16 is overwritten, which a product in flight"),
        ("# wgmma.wait_group.sync.aligned 0; # ld.shared.v2.b32 {%r15, %r16}, [%r8];", "%r16 is overwritten"),
    ],
)
def test_registers_of_products(body: str, said: str) -> None:
    zeros = "".join(f"mov.b32 %r{i}, 0;" for i in range(16, 20))
    product = PRODUCT.replace("%rd9", "{%r16, %r17, %r18, %r19}").replace("0, 0; wgmma", "0; wgmma")
    with_and_without(OPERANDS + zeros + STORE + VISIBLE + product + body, "#", said)


def test_products_add_up_in_flight() -> None:
    """In the second word of a row of A and the columns of B: 1 * 1 + 1 * 1, twice."""
    ones = STORE.replace("%r12, 0", "%r12, 0x3C003C00")
    body = OPERANDS + "".join(f"mov.b32 %r{i}, 0;" for i in range(30, 34)) + ones + VISIBLE
    body += PRODUCT.replace(" 0, 1, 1", " 1, 1, 1") * 2 + "mov.b32 %r13, %r30; wgmma.wait_group.sync.aligned 0;"
    found = run(body + "st.global.b32 [%rd5], %r13;")
    assert found[:128].view(torch.float32).tolist() == [32.0] * 128


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("st.global.b32 [%rd5], %r2;", "two threads store different words"),
        ("setp.eq.u32 %p4, %r2, 1; @!%p4 st.global.b32 [%rd5], %r1; @%p4 ld.global.b32 %r10, [%rd5];", "reads global"),
        ("ld.global.b32 %r10, [%rd4]; setp.eq.u32 %p4, %r2, 1; @%p4 st.global.b32 [%rd4], %r2;", "overwrites global"),
        ("setp.eq.u32 %p4, %r2, 1; @%p4 st.global.b32 [%rd5], %r2; st.global.b32 [%rd5], %r1;", "overwrites global"),
        ("atom.global.gpu.acq_rel.add.u32 %r10, [%rd2], %r1; ld.global.b32 %r11, [%rd2];", "reads global"),
        ("ld.global.b32 %r11, [%rd2]; atom.global.gpu.acq_rel.add.u32 %r10, [%rd2], %r1;", "overwrites global"),
    ],
)
def test_programs_are_not_ordered(body: str, said: str) -> None:
    refused(body, said, programs=2)


def test_programs_may_share_what_none_of_them_changes() -> None:
    run("ld.global.b32 %r10, [%rd4]; st.global.b32 [%rd5], %r10;", programs=2)
    run("ld.volatile.global.b32 %r11, [%rd2]; atom.global.gpu.acq_rel.add.u32 %r10, [%rd2], %r1;", programs=2)


def test_warps_of_a_program_in_global_memory() -> None:
    """Each thread reads what one of another warp has stored."""
    there = "xor.b32 %r10, %r1, 32; mul.wide.u32 %rd8, %r10, 4; add.s64 %rd9, %rd2, %rd8;"
    with_and_without(
        there + "st.global.b32 [%rd5], %r1; # bar.sync 0; # ld.global.b32 %r11, [%rd9];", "#", "reads global"
    )
    with_and_without(
        there + "ld.global.b32 %r11, [%rd9]; # bar.sync 0; # st.global.b32 [%rd5], %r1;", "#", "overwrites"
    )


def test_the_last_program_to_end_may_read_what_the_others_stored() -> None:
    """Each stores and counts itself; the last reads all. Without the barriers not all of its warps know."""
    body = """
    mul.wide.u32 %rd8, %r2, 512; add.s64 %rd9, %rd5, %rd8; add.s64 %rd9, %rd9, 512; st.global.b32 [%rd9], %r2;
    # bar.sync 0; #
    @%p1 atom.global.gpu.acq_rel.add.u32 %r10, [%rd2], 1; @%p1 st.shared.b32 [%r5], %r10;
    bar.sync 0; mov.b32 %r12, 0; ld.shared.b32 %r11, [%r12];
    setp.ne.s32 %p4, %r11, 2; @%p4 bra $out; ld.global.b32 %r13, [%rd5+512]; ld.global.b32 %r14, [%rd5+1024]; $out:
    """
    with_and_without(body, "#", "reads global", programs=3)


EARLY = "griddepcontrol.wait; griddepcontrol.launch_dependents;"
READ, WRITE = "ld.global.b32 %r10, [%rd4];", "st.global.b32 [%rd5], %r10;"


def test_what_earlier_kernels_leave_is_waited_for() -> None:
    run(EARLY + READ + WRITE)
    run(READ + WRITE)
    for body in (READ + EARLY + WRITE, "@%p3 griddepcontrol.wait;" + READ + WRITE):
        with pytest.raises(FaultError, match="before griddepcontrol.wait"):
            run(body)

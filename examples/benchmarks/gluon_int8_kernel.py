# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernel of `gluon_int8.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # as Triton 3.6 calls it


@gluon.jit
def _place(tile, m, n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """First row and column of a tile; GROUP tile rows go along the columns together."""
    rows, columns = gl.cdiv(m, BLOCK_M), gl.cdiv(n, BLOCK_N)
    first = tile // (GROUP * columns) * GROUP
    height = gl.minimum(rows - first, GROUP)
    within = tile % (GROUP * columns)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@gluon.jit
def _ask(x, w, x_tiles, w_tiles, ready, slot, row, column, at, wanted, SIZE: gl.constexpr):
    """Let the memory unit copy a step's tiles, SIZE bytes, to a slot and tell its barrier."""
    bar = ready.index(slot)
    mbarrier.expect(bar, SIZE, pred=wanted)
    _copy(x, [row, at], bar, x_tiles.index(slot), pred=wanted)
    _copy(w, [column, at], bar, w_tiles.index(slot), pred=wanted)


@gluon.jit
def _store(acc, y_ptr, x_scale_ptr, w_scale_ptr, row, column, m, n, num_warps: gl.constexpr):
    """Sums int32 from (row, column) on to y; in slices of 64 columns, so that addresses fit the registers."""
    WIDTH: gl.constexpr = acc.shape[1]
    if WIDTH > 64:
        left, right = acc.reshape((acc.shape[0], 2, WIDTH // 2)).permute((0, 2, 1)).split()
        _store(left, y_ptr, x_scale_ptr, w_scale_ptr, row, column, m, n, num_warps)
        _store(right, y_ptr, x_scale_ptr, w_scale_ptr, row, column + WIDTH // 2, m, n, num_warps)
    else:
        LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
        rows = row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, LINES))
        columns = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LINES))
        x_scale = gl.load(x_scale_ptr + gl.minimum(rows, m - 1))
        w_scale = gl.load(w_scale_ptr + gl.minimum(columns, n - 1))
        y = gl.convert_layout(acc, LINES).to(gl.float32) * x_scale[:, None] * w_scale[None, :]
        at = y_ptr + rows.to(gl.int64)[:, None] * n + columns[None, :]
        gl.store(at, y.to(y_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


@gluon.jit
def int8_product(x, w, y_ptr, x_scale_ptr, w_scale_ptr, m, n, k, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                 BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
                 num_warps: gl.constexpr):  # fmt: skip
    """Grid (programs,), at most as many as tiles. x [m, k], w [n, k]: descriptors of blocks of int8.

    Steps of all tiles of a program are one sequence. In step i the tensor cores may still read slot i - 1 until the
    wait says that only step i is left; only then step i + STAGES - 1 is asked for, which goes there.
    """
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    SIZE: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, 128, 32]
    )
    tile, programs, steps = gl.program_id(0), gl.num_programs(0), gl.cdiv(k, BLOCK_K)
    total = gl.cdiv(gl.cdiv(m, BLOCK_M) * gl.cdiv(n, BLOCK_N) - tile, programs) * steps
    row, column = _place(tile, m, n, BLOCK_M, BLOCK_N, GROUP)
    next_tile, next_step, next_slot, next_row, next_column = tile, 0, 0, row, column
    for i in gl.static_range(STAGES - 1):
        _ask(x, w, x_tiles, w_tiles, ready, next_slot, next_row, next_column, next_step * BLOCK_K, i < total, SIZE)
        next_slot += 1
        next_step += 1
        if next_step == steps:
            next_step = 0
            next_tile += programs
            next_row, next_column = _place(next_tile, m, n, BLOCK_M, BLOCK_N, GROUP)
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.int32, layout=SUMS)
    step, slot, phase = 0, 0, 0
    for i in range(total):
        mbarrier.wait(ready.index(slot), phase)
        acc = warpgroup_mma(
            x_tiles.index(slot), w_tiles.index(slot).permute((1, 0)), acc, use_acc=step != 0, is_async=True
        )
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        wanted = i + STAGES - 1 < total
        _ask(x, w, x_tiles, w_tiles, ready, next_slot, next_row, next_column, next_step * BLOCK_K, wanted, SIZE)
        next_slot = gl.where(next_slot == STAGES - 1, 0, next_slot + 1)
        next_step += 1
        if next_step == steps:
            next_step = 0
            next_tile += programs
            next_row, next_column = _place(next_tile, m, n, BLOCK_M, BLOCK_N, GROUP)
        phase = gl.where(slot == STAGES - 1, phase ^ 1, phase)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        step += 1
        if step == steps:
            sums = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            _store(sums, y_ptr, x_scale_ptr, w_scale_ptr, row, column, m, n, num_warps)
            step = 0
            tile += programs
            row, column = _place(tile, m, n, BLOCK_M, BLOCK_N, GROUP)

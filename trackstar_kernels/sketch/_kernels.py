"""Triton kernels of projection_matrix; `_triton.py` launches them."""

import triton
import triton.language as tl


@triton.jit
def _words(seed, stream, call, row):
    """Output words of Philox for counters (call, row, stream), four to a call along the last axis."""
    zeros = tl.zeros(call.shape, tl.uint32)
    low, high = zeros + stream.to(tl.uint32), zeros + (stream.to(tl.uint64) >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, call.to(tl.uint32), row.to(tl.uint32), low, high)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(call.shape[0], call.shape[1] * 4)


@triton.jit(do_not_specialize=["seed", "stream"])
def _fields_kernel(
    out_ptr,  # (rows, cols)
    table_ptr,  # (2 ** BITS,), dtype of out
    rows,
    cols,
    seed,
    stream,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CALLS: tl.constexpr,
):
    """out[row, col] = table[field]; a call of Philox gives 128 / BITS fields of a row. Grid: (rows, calls) tiles."""
    FIELDS: tl.constexpr = 32 // BITS
    COLS: tl.constexpr = BLOCK_CALLS * 4 * FIELDS
    tiles = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    call = tile * BLOCK_CALLS + tl.arange(0, BLOCK_CALLS)[None, :]
    row_of_call, call = tl.broadcast(row, call)
    words = _words(seed, stream, call, row_of_call)
    shifts = (tl.arange(0, FIELDS) * BITS).to(tl.uint32)
    fields = (words[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    values = tl.load(table_ptr + fields.reshape(BLOCK_ROWS, COLS).to(tl.int32))
    col = tile * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + row * cols + col, values, mask=(row < rows) & (col < cols))


@triton.jit(do_not_specialize=["rows", "seed", "stream"])
def _countsketch_kernel(
    out_ptr,  # (rows, cols)
    rows,
    cols,
    seed,
    stream,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CALLS: tl.constexpr,
):
    """One ±1 in every column; a call of Philox gives four columns. Grid: (rows, calls) tiles."""
    COLS: tl.constexpr = BLOCK_CALLS * 4
    tiles = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    call = tile * BLOCK_CALLS + tl.arange(0, BLOCK_CALLS)[None, :]
    words = _words(seed, stream, call, tl.zeros(call.shape, tl.uint32))
    place = (((words >> 1).to(tl.uint64) * rows.to(tl.uint64)) >> 31).to(tl.int64)
    sign = 1.0 - 2.0 * (words & 1).to(tl.float32)
    col = tile * COLS + tl.arange(0, COLS)[None, :]
    values = tl.where(place == row, sign, 0.0)
    tl.store(out_ptr + row * cols + col, values, mask=(row < rows) & (col < cols))

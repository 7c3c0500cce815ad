"""Triton kernels of project_gradients; `_triton.py` launches them, README.md says why they look as they do."""

import triton
import triton.language as tl


@triton.jit
def _sketch_kernel(
    x_ptr,  # (tokens, in_features)
    delta_ptr,  # (tokens, out_features)
    right_ptr,  # (right_rows, in_features)
    left_ptr,  # (left_rows, out_features)
    x_sketch_ptr,  # (tokens, right_rows) float32
    delta_sketch_ptr,  # (tokens, left_rows) float32
    tokens,
    in_features,
    out_features,
    right_rows,
    left_rows,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply x by right and delta by left: the second grid axis runs over the sketch tiles of both."""
    right_tiles = tl.cdiv(right_rows, BLOCK_S)
    tile = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_T
    if tile < right_tiles:
        _sketch_tile(
            x_ptr,
            right_ptr,
            x_sketch_ptr,
            first,
            tile * BLOCK_S,
            tokens,
            in_features,
            right_rows,
            BLOCK_T,
            BLOCK_K,
            BLOCK_S,
            PRECISION,
        )
    else:
        _sketch_tile(
            delta_ptr,
            left_ptr,
            delta_sketch_ptr,
            first,
            (tile - right_tiles) * BLOCK_S,
            tokens,
            out_features,
            left_rows,
            BLOCK_T,
            BLOCK_K,
            BLOCK_S,
            PRECISION,
        )


@triton.jit
def _sketch_tile(
    y_ptr,
    matrix_ptr,
    sketch_ptr,
    first_token,
    first_row,
    tokens,
    features,
    rows,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile of sketch = y · matrixᵀ."""
    t = tl.arange(0, BLOCK_T)
    s = first_row + tl.arange(0, BLOCK_S)
    k = tl.arange(0, BLOCK_K)
    here = t[:, None] < tokens - first_token
    y_ptr += first_token.to(tl.int64) * features
    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for k0 in range(0, features, BLOCK_K):
        inside = k < features - k0
        y = tl.load(y_ptr + k0 + (t[:, None] * features + k[None, :]), mask=here & inside[None, :], other=0.0)
        matrix = tl.load(
            matrix_ptr + k0 + (s[None, :] * features + k[:, None]),
            mask=(s[None, :] < rows) & inside[:, None],
            other=0.0,
        )
        total = tl.dot(y.to(tl.float32), matrix.to(tl.float32), total, input_precision=PRECISION)
    sketch_ptr += first_token.to(tl.int64) * rows
    tl.store(sketch_ptr + (t[:, None] * rows + s[None, :]), total, mask=here & (s[None, :] < rows))


@triton.jit
def _corrected_kernel(
    x_ptr,  # (tokens, in_features)
    delta_ptr,  # (tokens, out_features)
    scale_ptr,  # (out_features, in_features)
    right_ptr,  # (rank, p, in_features)
    offsets_ptr,  # (B + 1,) int64
    folded_ptr,  # (B, chunks, rank, out_features, p) float32
    in_features,
    out_features,
    p,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum (ΔᵀX ∘ scale) · right[rank]ᵀ over ``tiles`` tiles of in_features, for one example and BLOCK_O outputs.

    Grid: example, (tile of out_features, chunk of in_features), (rank, tile of p).
    """
    example = tl.program_id(0)
    chunks = tl.cdiv(in_features, tiles * BLOCK_I)
    chunk = tl.program_id(1) % chunks
    first_o = tl.program_id(1) // chunks * BLOCK_O
    p_tiles = tl.cdiv(p, BLOCK_P)
    ranks = tl.num_programs(2) // p_tiles
    rank = tl.program_id(2) // p_tiles
    o = tl.arange(0, BLOCK_O)
    cols = tl.program_id(2) % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    t = tl.arange(0, BLOCK_T)

    begin = tl.load(offsets_ptr + example)
    length = (tl.load(offsets_ptr + example + 1) - begin).to(tl.int32)
    outputs = out_features - first_o
    x_ptr += begin * in_features
    delta_ptr += begin * out_features + first_o
    scale_ptr += first_o.to(tl.int64) * in_features
    right_ptr += rank * p * in_features

    folded = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    first_i = chunk * tiles * BLOCK_I
    for i0 in range(first_i, min(first_i + tiles * BLOCK_I, in_features), BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        gradient = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        delta_tile, x_tile = delta_ptr, x_ptr
        for t0 in range(0, length, BLOCK_T):
            here = t < length - t0
            delta = tl.load(
                delta_tile + (t[None, :] * out_features + o[:, None]),
                mask=here[None, :] & (o[:, None] < outputs),
                other=0.0,
            )
            x = tl.load(
                x_tile + (t[:, None] * in_features + i[None, :]),
                mask=here[:, None] & (i[None, :] < in_features),
                other=0.0,
            )
            gradient = tl.dot(delta, x, gradient, input_precision=PRECISION)
            delta_tile += BLOCK_T * out_features
            x_tile += BLOCK_T * in_features
        folded = _fold(
            folded,
            gradient,
            scale_ptr,
            right_ptr,
            i0,
            cols,
            outputs,
            in_features,
            p,
            BLOCK_O,
            BLOCK_I,
            SLICE,
            PRECISION,
        )

    row = ((example.to(tl.int64) * chunks + chunk) * ranks + rank) * out_features + first_o + o
    tl.store(
        folded_ptr + row[:, None] * p + cols[None, :],
        folded,
        mask=(o[:, None] < outputs) & (cols[None, :] < p),
    )


@triton.jit
def _fold(
    folded,
    gradient,
    scale_ptr,
    right_ptr,
    first_i,
    cols,
    outputs,
    in_features,
    p,
    BLOCK_O: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``folded`` plus (gradient ∘ scale) · rightᵀ, SLICE columns at a time: whole tiles would spill registers."""
    if WIDTH > SLICE:
        halves = gradient.reshape(BLOCK_O, 2, WIDTH // 2).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            folded = _fold(
                folded,
                halves[half],
                scale_ptr,
                right_ptr,
                first_i + half * (WIDTH // 2),
                cols,
                outputs,
                in_features,
                p,
                BLOCK_O,
                WIDTH // 2,
                SLICE,
                PRECISION,
            )
    else:
        o = tl.arange(0, BLOCK_O)
        i = tl.arange(0, WIDTH)
        inside = i < in_features - first_i
        scale = tl.load(
            scale_ptr + first_i + (o[:, None] * in_features + i[None, :]),
            mask=(o[:, None] < outputs) & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + first_i + (cols[None, :] * in_features + i[:, None]),
            mask=(cols[None, :] < p) & inside[:, None],
            other=0.0,
        )
        corrected = gradient * scale.to(tl.float32)
        folded = tl.dot(corrected, right.to(tl.float32), folded, input_precision=PRECISION)
    return folded


@triton.jit
def _contract_kernel(
    a_ptr,  # (period, q) float32
    b_ptr,  # (rows, p) float32
    offsets_ptr,  # (B + 1,) int64: each example's rows
    partials_ptr,  # (B, slots, q, p) float32
    period,
    q,
    p,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partials[example, slot] = Σ a[row mod period]ᵀ b[row] over the CHUNK rows of the example that the slot counts.

    Grid: example, slot, (tile of q, tile of p). Slots beyond an example's rows are left as they were.
    """
    example = tl.program_id(0)
    slot = tl.program_id(1)
    begin = tl.load(offsets_ptr + example)
    length = tl.load(offsets_ptr + example + 1) - begin
    if slot * CHUNK >= length:
        return
    p_tiles = tl.cdiv(p, BLOCK_P)
    rows = tl.program_id(2) // p_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    cols = tl.program_id(2) % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
    for r0 in range(0, min(CHUNK, length - slot * CHUNK), BLOCK_R):
        r = slot * CHUNK + r0 + tl.arange(0, BLOCK_R)
        row = begin + r
        here = r < length
        a = tl.load(
            a_ptr + (row % period)[None, :] * q + rows[:, None],
            mask=here[None, :] & (rows[:, None] < q),
            other=0.0,
        )
        b = tl.load(
            b_ptr + row[:, None] * p + cols[None, :], mask=here[:, None] & (cols[None, :] < p), other=0.0
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    partials_ptr += (example.to(tl.int64) * tl.num_programs(1) + slot) * q * p
    tl.store(
        partials_ptr + rows[:, None] * p + cols[None, :],
        total,
        mask=(rows[:, None] < q) & (cols[None, :] < p),
    )


@triton.jit
def _reduce_kernel(
    partials_ptr,  # (B, slots, entries) float32
    offsets_ptr,  # (B + 1,) int64
    out_ptr,  # (B, entries) float32
    slots,
    entries,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add up the slots that an example's rows filled, always in the same order. Grid: example, tile of entries."""
    example = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    length = tl.load(offsets_ptr + example + 1) - tl.load(offsets_ptr + example)
    filled = tl.cdiv(length, CHUNK).to(tl.int32)
    partials_ptr += example.to(tl.int64) * slots * entries
    total = tl.zeros((BLOCK_E,), tl.float32)
    for s0 in range(0, filled, SLOTS):
        s = s0 + tl.arange(0, SLOTS)
        partials = tl.load(
            partials_ptr + s[:, None] * entries + e[None, :],
            mask=(s[:, None] < filled) & (e[None, :] < entries),
            other=0.0,
        )
        total += tl.sum(partials, axis=0)
    tl.store(out_ptr + example.to(tl.int64) * entries + e, total, mask=e < entries)

"""The Triton kernels (_kernels.py): their configurations and launches.

What decides the order of a sum, tiles and precision, is fixed by architecture, dtype and sketch size. The
configurations that an autotuner chooses from differ in the depth of the software pipeline alone, so all of them
give the same bits.
"""

import torch
import triton

from trackstar_kernels._architecture import ARCHITECTURES, architecture
from trackstar_kernels.gradient._kernels import (
    _contract_kernel,
    _corrected_kernel,
    _reduce_kernel,
    _sketch_kernel,
)

# Rows of a contraction that one program sums.
CHUNK = 1024

# (architecture, bytes of an input, BLOCK_P): BLOCK_T, BLOCK_O, BLOCK_I, SLICE, warps, stages to choose from.
CORRECTED_TILES = {
    ("sm_80", 2, 16): (64, 128, 64, 16, 8, (2, 3, 4)),
    ("sm_80", 2, 64): (64, 64, 64, 16, 8, (2, 3, 4)),
    ("sm_80", 4, 16): (32, 64, 64, 16, 8, (2, 3, 4)),
    ("sm_80", 4, 64): (16, 64, 64, 32, 8, (2, 3, 4)),
    ("sm_90", 2, 16): (64, 128, 128, 32, 8, (2, 3, 4)),
    ("sm_90", 2, 64): (64, 128, 64, 32, 8, (2, 3)),
    ("sm_90", 4, 16): (32, 128, 64, 32, 8, (2, 3, 4)),
    ("sm_90", 4, 64): (32, 64, 64, 32, 8, (2, 3)),
    ("sm_100", 2, 16): (64, 128, 128, 32, 8, (2, 3, 4)),
    ("sm_100", 2, 64): (64, 128, 128, 32, 8, (2, 3, 4)),
    ("sm_100", 4, 16): (32, 128, 128, 32, 8, (2, 3, 4)),
    ("sm_100", 4, 64): (32, 128, 64, 32, 8, (2, 3)),
    ("sm_120", 2, 16): (64, 128, 64, 16, 8, (2, 3)),
    ("sm_120", 2, 64): (64, 64, 64, 16, 8, (2, 3, 4)),
    ("sm_120", 4, 16): (16, 64, 64, 16, 8, (2, 3, 4)),
    ("sm_120", 4, 64): (32, 64, 32, 32, 8, (2, 3)),
    ("gfx942", 2, 16): (64, 128, 128, 32, 8, (2,)),
    ("gfx942", 2, 64): (64, 128, 128, 32, 8, (2,)),
    ("gfx942", 4, 16): (32, 128, 128, 32, 8, (2,)),
    ("gfx942", 4, 64): (32, 128, 128, 32, 8, (2,)),
}


def _tuned(
    kernel: triton.JITFunction, arch: str, stages: tuple[int, ...], warps: int, key: list[str], **blocks: int
) -> triton.runtime.Autotuner:
    """The kernel, tuned over ``stages`` once for each value of the arguments named by ``key``."""
    # Narrower products would lose the float32 of what they multiply: NVIDIA's tensor cores reach it in three tf32
    # products, AMD's have it.
    options = blocks | {"PRECISION": "ieee" if arch == "gfx942" else "tf32x3"}
    configs = [triton.Config(options, num_warps=warps, num_stages=count) for count in stages]
    return triton.autotune(configs, key=key)(kernel)


def _stages(arch: str) -> tuple[int, ...]:
    return (2,) if arch == "gfx942" else (3, 4)


def _warps(arch: str) -> int:
    """Without tensor cores that read shared memory, operands fill the registers: more warps share them."""
    return 8 if arch in ("sm_80", "sm_120") else 4


CORRECTED = {
    (arch, itemsize, block_p): _tuned(
        _corrected_kernel, arch, stages, warps, ["in_features", "out_features"],
        BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_P=block_p, SLICE=width,
    )
    for (arch, itemsize, block_p), (block_t, block_o, block_i, width, warps, stages) in CORRECTED_TILES.items()
}  # fmt: skip
SKETCH = {
    (arch, block_s): _tuned(
        _sketch_kernel, arch, _stages(arch), _warps(arch), ["in_features", "out_features"],
        BLOCK_T=64, BLOCK_K=32, BLOCK_S=block_s,
    )
    for arch in ARCHITECTURES
    for block_s in (16, 64)
}  # fmt: skip
CONTRACT = {
    (arch, block): _tuned(
        _contract_kernel, arch, _stages(arch), 4, ["q", "p"],
        CHUNK=CHUNK, BLOCK_R=32, BLOCK_Q=block, BLOCK_P=block,
    )
    for arch in ARCHITECTURES
    for block in (16, 64)
}  # fmt: skip
REDUCE = {
    (arch,): triton.autotune(
        [triton.Config({"CHUNK": CHUNK, "SLOTS": 16, "BLOCK_E": 256}, num_warps=4)], key=[]
    )(_reduce_kernel)
    for arch in ARCHITECTURES
}


def project_gradients(
    activations: torch.Tensor,
    output_grads: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`trackstar_kernels.project_gradients`."""
    if activations.dtype == torch.float64:
        raise TypeError(
            "backend 'triton' computes in float32; for float64 activations use backend='reference'"
        )
    if offsets is None:
        batch, length = activations.shape[:2]
        offsets = torch.arange(batch + 1) * length
        activations, output_grads = activations.flatten(0, 1), output_grads.flatten(0, 1)
    activations, output_grads, offsets = (t.contiguous() for t in (activations, output_grads, offsets))
    if 0 in (activations.numel(), output_grads.numel(), left.numel(), right.numel()):
        return activations.new_zeros(len(offsets) - 1, left.shape[1], right.shape[1], dtype=torch.float32)
    with torch.cuda.device_of(activations):
        if scale is None:
            return _sketched(activations, output_grads, left, right, offsets)
        return _corrected(activations, output_grads, left, right, scale.contiguous(), offsets)


def _sketched(
    activations: torch.Tensor,
    output_grads: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """Both sides sketched token by token; then each example's sum over its tokens and ranks."""
    tokens, in_features = activations.shape
    rank, q, out_features = left.shape
    p = right.shape[1]
    x_sketch = activations.new_empty(tokens * rank, p, dtype=torch.float32)
    delta_sketch = activations.new_empty(tokens * rank, q, dtype=torch.float32)
    block = _block(rank * max(p, q))

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        tiles = triton.cdiv(rank * p, block) + triton.cdiv(rank * q, block)
        return triton.cdiv(tokens, meta["BLOCK_T"]), tiles

    SKETCH[architecture(activations.device), block][grid](
        activations, output_grads, right.contiguous(), left.contiguous(), x_sketch, delta_sketch,
        tokens, in_features, out_features, rank * p, rank * q,
    )  # fmt: skip
    return _contract(delta_sketch, x_sketch, offsets * rank)


def _corrected(
    activations: torch.Tensor,
    output_grads: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """The corrected gradient folded with the right sketch tile by tile; then its rows with the left sketch."""
    batch = len(offsets) - 1
    rank, q, out_features = left.shape
    p, in_features = right.shape[1:]
    block_p = _block(p)
    kernel = CORRECTED[architecture(activations.device), activations.itemsize, block_p]
    blocks = kernel.configs[0].kwargs
    tiles, chunks = _columns(
        triton.cdiv(out_features, blocks["BLOCK_O"]), triton.cdiv(in_features, blocks["BLOCK_I"])
    )
    rows = chunks * rank * out_features
    folded = activations.new_empty(batch * rows, p, dtype=torch.float32)
    grid = (
        batch,
        triton.cdiv(out_features, blocks["BLOCK_O"]) * chunks,
        rank * triton.cdiv(p, block_p),
    )
    kernel[grid](
        activations, output_grads, scale, right.contiguous(), offsets.to(activations.device), folded,
        in_features, out_features, p, tiles,
    )  # fmt: skip
    left = left.transpose(1, 2).reshape(rank * out_features, q).to(torch.float32).contiguous()
    return _contract(left, folded, torch.arange(batch + 1) * rows)


def _columns(o_tiles: int, i_tiles: int) -> tuple[int, int]:
    """How many tiles of in_features a program takes, and how many programs share them all.

    Examples of a small layer are spread over more programs, up to 32; those of a large one leave no more rows
    to contract than the layer has outputs.
    """
    chunks = max(1, min(i_tiles, 32 // o_tiles))
    tiles = triton.cdiv(i_tiles, chunks)
    return tiles, triton.cdiv(i_tiles, tiles)


def _contract(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """out[example] = Σ a[row mod len(a)]ᵀ b[row] over the example's rows of b, from its offset to the next."""
    batch, q, p = len(offsets) - 1, a.shape[1], b.shape[1]
    slots = triton.cdiv(int(offsets.diff().max()), CHUNK)
    block = _block(max(p, q))
    arch = architecture(b.device)
    offsets = offsets.to(b.device)
    partials = b.new_empty(batch, slots, q, p)
    CONTRACT[arch, block][batch, slots, triton.cdiv(q, block) * triton.cdiv(p, block)](
        a, b, offsets, partials, len(a), q, p
    )
    out = b.new_empty(batch, q, p)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return batch, triton.cdiv(q * p, meta["BLOCK_E"])

    REDUCE[(arch,)][grid](partials, offsets, out, slots, q * p)
    return out


def _block(size: int) -> int:
    """Sketches of up to 16 rows take tiles of 16, the least that tensor cores multiply; larger ones tiles of 64."""
    return 16 if size <= 16 else 64

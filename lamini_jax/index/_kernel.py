"""Scores and the best of every block of keys in one pass: the part of the exact lookup that XLA does not fuse.

XLA writes all B x N scores to memory and reads them again for their maxima. On accelerators with bfloat16 keys that
takes most of the time; here a tile of keys is multiplied by a tile of queries, and only the maxima leave the chip. (The
paper's authors wrote this step in Triton; Pallas compiles it for TPUs, and by way of Triton for GPUs.)
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Keys and queries of one tile, for a TPU's on-chip memory and for a GPU's, which is smaller.
TILE_N, _TILE_B = 1024, 128
_GPU_TILE_N, _GPU_TILES_B = 128, (16, 64, 128)
GPU_WIDTHS = 16, 32, 64, 128, 256  # of keys; Triton has powers of two alone, and wider ones were not tried


def block_maxima(keys_LJC, query_BC, gpu: bool = False, interpret: bool = False):
    """maxima_BL in float32, of L blocks of J keys; TILE_N must divide N = L * J. `interpret` runs it on any device."""
    num_blocks, block, key_dim = keys_LJC.shape
    keys_NC, num_keys, batch = keys_LJC.reshape(-1, key_dim), num_blocks * block, query_BC.shape[0]
    tile_n, tile_b = (_GPU_TILE_N, _gpu_tile(batch)) if gpu else (TILE_N, _TILE_B)
    query_BC = jnp.pad(query_BC, ((0, -batch % tile_b), (0, 0)))

    def kernel(keys_ref, query_ref, maxima_ref):
        scores_NB = jax.lax.dot_general(
            keys_ref[...], query_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        maxima_ref[...] = scores_NB.reshape(tile_n // block, block, tile_b).max(axis=1)

    # Query tiles are the inner loop, so that a tile of keys is read from memory once.
    maxima_LB = pl.pallas_call(
        kernel,
        grid=(num_keys // tile_n, query_BC.shape[0] // tile_b),
        in_specs=[
            pl.BlockSpec((tile_n, key_dim), lambda n, b: (n, 0)),
            pl.BlockSpec((tile_b, key_dim), lambda n, b: (b, 0)),
        ],
        out_specs=pl.BlockSpec((tile_n // block, tile_b), lambda n, b: (n, b)),
        out_shape=jax.ShapeDtypeStruct((num_keys // block, query_BC.shape[0]), jnp.float32),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=8 if tile_b == 128 else 4, num_stages=1) if gpu else None,
    )(keys_NC, query_BC)
    return maxima_LB[:, :batch].T


def _gpu_tile(batch: int) -> int:
    """Queries of one tile; of ten tilings about the fastest on an H100 for 1, 64 and 1,024 queries each."""
    return next((tile_b for tile_b in _GPU_TILES_B if batch <= tile_b), _GPU_TILES_B[-1])

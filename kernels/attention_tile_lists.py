"""Which tiles the attention kernels may use: for each kernel, kind of arithmetic and head dim.

"wgmma" is sm_90, "tcgen05" sm_100, "mma" every other GPU with half-precision tensor cores, "fp32"
the scalar units, since fp32 products are IEEE. "mma, 99 KB" has what differs on GPUs with as much
shared memory: sm_86, sm_89 and sm_120. A mask or a bias takes registers of its own, so "+ pairs"
has smaller tiles for head dims where that matters; so do "+ dropout", "+ distances" of a bias by
distance, "+ blocks" of a mask by blocks, "+ masks" of any that is not of packed sequences, with
loops for tiles in part and in full, "+ masks, bias" with a bias beside it, "+ masks, dropout" and
"+ pairs, dropout", dropout beside masks alone and beside any of these, and "+ padded", for head
dims like 72, of which each copy asks whether it is inside. The first tile of a list is the best
guess, taken where nothing may be timed.

mma.sync: a tile has at least as many rows as its result has columns, BLOCK_M ≥ D in the forward and
dQ, BLOCK_N ≥ D in dK/dV. Else Triton lays the warps along the columns, and what is between the
products crosses warps through shared memory. Copies are under way during the products from three
stages on; with two they are waited for as soon as they begin.

TMA: on sm_90 and sm_100, where the layout allows, tiles may come through tensor descriptors. The
loop is an eighth shorter, and but for dK/dV has 20 to 110 registers more to spare, so that larger
tiles fit, or two programs. No list begins with one: what it costs a program to write its
descriptors first, machine code does not tell. In dK/dV on sm_100 they save nothing.

Left out are tiles in which registers spill at head dims to 128 (tests/test_triton_compile.py) and
those that do not fit in the GPU's shared memory: 227 KB on sm_90 and sm_100, 163 KB on sm_80,
99 KB on sm_86, sm_89 and sm_120.
"""

from __future__ import annotations

Tile = tuple[int | str, ...]  # queries, keys, warps, pipeline stages, constants that are set
Tiles = dict[str, dict[int, tuple[Tile, ...]]]  # by kind of arithmetic, then by padded head dim

APART, AHEAD = "MASKED_APART", "AHEAD"  # of dkdv_kernel, of forward_kernel
TMA = "TMA"  # of all three: what they walk over comes through tensor descriptors

FORWARD: Tiles = {
    "wgmma": {
        64: (
            (128, 64, 4, 3),
            (128, 128, 8, 2),
            (64, 64, 4, 3),
            (128, 64, 8, 3, TMA),
            (128, 128, 8, 3, TMA),
        ),
        128: (
            (128, 64, 8, 3),
            (128, 64, 8, 3, AHEAD),
            (64, 64, 4, 2),
            (128, 64, 8, 3, AHEAD, TMA),
            (128, 128, 8, 2, TMA),
        ),
        256: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
        512: ((64, 32, 8, 1), (32, 32, 8, 1)),
    },
    "wgmma + pairs": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (64, 64, 4, 2)),
    },
    "wgmma + masks": {128: ((128, 32, 8, 3), (64, 32, 4, 3))},
    "wgmma + masks, dropout": {128: ((64, 64, 8, 2),)},
    "wgmma + masks, bias": {128: ((128, 32, 8, 3), (64, 32, 8, 3))},
    "wgmma + distances": {
        128: ((128, 64, 8, 3), (64, 64, 8, 2)),
    },
    "wgmma + blocks": {
        128: ((128, 32, 8, 3), (64, 32, 4, 3)),
    },
    "wgmma + padded": {
        64: ((128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 3, TMA)),
        128: ((128, 64, 8, 3), (128, 64, 8, 3, AHEAD, TMA)),
    },
    "wgmma + dropout": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (64, 64, 4, 2)),
    },
    "tcgen05": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3, TMA)),
        128: ((128, 64, 8, 3), (64, 64, 8, 2), (128, 128, 8, 2, TMA)),
        256: ((128, 32, 8, 2), (64, 64, 8, 2)),
        512: ((32, 32, 8, 1),),
    },
    "tcgen05 + pairs": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (64, 64, 8, 2)),
    },
    "tcgen05 + masks": {128: ((64, 32, 8, 2), (64, 64, 8, 2))},
    "tcgen05 + masks, bias": {128: ((128, 32, 8, 2), (64, 32, 8, 2))},
    "tcgen05 + blocks": {
        128: ((64, 32, 8, 2),),
    },
    "mma": {
        64: ((128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        256: ((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        512: ((32, 32, 8, 1), (16, 32, 8, 1)),
    },
    "mma + padded": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 32, 8, 3), (64, 64, 8, 2)),
    },
    "mma, 99 KB": {
        64: ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    },
    "mma + pairs": {
        64: ((128, 64, 8, 2), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (64, 64, 8, 2)),
    },
    "mma + masks": {128: ((128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2))},
    "mma, 99 KB + masks, bias": {64: ((128, 32, 8, 3), (64, 32, 4, 3))},
    "mma + masks, bias": {128: ((128, 32, 8, 3), (64, 64, 8, 2))},
    "mma + distances": {
        128: ((128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2)),
    },
    "mma + blocks": {
        128: ((128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2)),
    },
    "mma + dropout": {
        64: ((128, 64, 8, 3), (128, 32, 8, 3)),
        128: ((128, 32, 8, 3), (128, 32, 8, 2)),
    },
    "fp32": {
        64: ((64, 32, 8, 2), (32, 32, 8, 2)),
        128: ((64, 16, 8, 1), (32, 32, 8, 2)),
        256: ((32, 32, 8, 1), (16, 16, 8, 1)),
        512: ((16, 32, 8, 1), (16, 16, 8, 1), (8, 16, 8, 1)),
    },
}

DKDV: Tiles = {
    "wgmma": {
        64: ((64, 128, 8, 3), (32, 128, 8, 3, APART), (64, 64, 4, 2), (64, 128, 8, 3, TMA)),
        128: ((32, 128, 8, 3), (32, 128, 8, 2), (32, 64, 8, 2), (32, 128, 8, 3, TMA)),
        256: ((32, 64, 8, 2), (32, 32, 8, 1)),
        512: ((16, 16, 8, 1),),
    },
    "wgmma + pairs": {
        64: ((64, 128, 8, 2), (32, 128, 8, 2)),
        128: ((32, 128, 8, 1), (32, 64, 8, 2)),
    },
    "wgmma + masks": {
        64: ((64, 128, 8, 2, APART), (32, 128, 8, 2, APART)),
        128: ((32, 128, 8, 1), (32, 64, 8, 2, APART)),
    },
    "wgmma + masks, bias": {
        64: ((32, 128, 8, 2), (64, 64, 8, 2)),
        128: ((32, 128, 8, 1), (32, 64, 8, 2)),
    },
    "wgmma + masks, dropout": {128: ((16, 128, 8, 2), (16, 64, 8, 3))},
    "wgmma + pairs, dropout": {128: ((16, 64, 8, 3), (16, 64, 8, 2))},
    "wgmma + distances": {
        64: ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 3)),
    },
    "wgmma + blocks": {
        64: ((32, 128, 8, 3), (64, 64, 8, 2)),
    },
    "wgmma + dropout": {
        64: ((32, 128, 8, 3), (32, 128, 8, 2)),
        128: ((32, 64, 8, 3), (16, 128, 8, 2)),
    },
    "tcgen05": {
        64: ((64, 128, 8, 3), (32, 64, 4, 2)),
        128: ((64, 128, 8, 1), (64, 64, 8, 1), (32, 64, 8, 2)),
        256: ((32, 64, 8, 1), (32, 32, 8, 1)),
        512: ((16, 16, 8, 1),),
    },
    "tcgen05 + pairs": {
        64: ((64, 128, 8, 2), (32, 64, 4, 2)),
        128: ((64, 128, 8, 1), (64, 64, 8, 1)),
    },
    "tcgen05 + masks": {
        64: ((32, 128, 8, 2), (64, 64, 8, 2)),
        128: ((64, 64, 8, 1),),
    },
    "tcgen05 + masks, bias": {128: ((64, 64, 8, 1),)},
    "tcgen05 + pairs, dropout": {128: ((32, 64, 8, 1), (64, 32, 8, 1))},
    "tcgen05 + distances": {
        64: ((32, 128, 8, 1), (32, 64, 8, 2)),
    },
    "tcgen05 + blocks": {
        128: ((64, 64, 8, 1),),
    },
    "tcgen05 + dropout": {
        64: ((32, 64, 4, 2),),
        128: ((64, 64, 8, 1),),
    },
    "mma": {
        64: ((32, 128, 8, 3, APART), (32, 64, 8, 3, APART)),
        128: ((16, 128, 8, 3, APART), (64, 64, 8, 2), (32, 64, 8, 3, APART)),
        256: ((32, 64, 8, 2), (32, 32, 8, 1)),
        512: ((16, 16, 8, 1),),
    },
    "mma + pairs": {
        64: ((16, 128, 8, 2), (16, 64, 8, 2)),
        128: ((32, 64, 8, 2), (16, 64, 8, 2)),
    },
    "mma + masks": {
        64: ((16, 128, 8, 2, APART), (16, 64, 8, 2, APART)),
        128: ((32, 64, 8, 2, APART), (16, 64, 8, 2, APART)),
    },
    "mma + masks, bias": {128: ((16, 64, 8, 3), (16, 64, 8, 2))},
    "mma + pairs, dropout": {128: ((16, 64, 8, 3), (16, 64, 8, 2))},
    "mma, 99 KB + masks": {128: ((16, 64, 8, 3, APART), (16, 64, 8, 2, APART))},
    "mma, 99 KB + pairs": {
        128: ((16, 64, 8, 3), (16, 64, 8, 2)),
    },
    "mma + dropout": {
        64: ((16, 128, 8, 3), (16, 128, 8, 2)),
        128: ((32, 64, 8, 2), (16, 64, 8, 2)),
    },
    "fp32": {
        64: ((32, 32, 8, 2), (16, 32, 8, 1)),
        128: ((16, 32, 8, 1),),
        256: ((16, 16, 8, 1),),
        512: ((16, 16, 8, 1), (16, 8, 8, 1)),
    },
}

DQ: Tiles = {
    "wgmma": {
        64: ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3, TMA)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (128, 128, 8, 2, TMA)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2)),
        512: ((32, 32, 8, 1), (32, 16, 8, 1)),
    },
    "wgmma + pairs": {
        64: ((128, 64, 8, 2), (64, 64, 4, 2)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2)),
    },
    "wgmma + masks": {128: ((128, 32, 8, 3), (64, 32, 4, 2))},
    "wgmma + masks, bias": {
        64: ((128, 32, 8, 3), (64, 32, 4, 2)),
        128: ((64, 32, 8, 3), (64, 32, 8, 2)),
    },
    "wgmma + pairs, dropout": {128: ((128, 32, 8, 3), (64, 32, 4, 2))},
    "wgmma + distances": {
        128: ((128, 64, 8, 2), (128, 32, 8, 3)),
    },
    "wgmma + padded": {
        128: ((128, 64, 8, 2), (128, 64, 8, 3, TMA)),
    },
    "wgmma + dropout": {
        64: ((128, 64, 8, 3), (64, 64, 4, 2)),
        128: ((128, 64, 8, 2), (128, 32, 8, 3)),
    },
    "tcgen05": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3, TMA)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3, TMA)),
        256: ((64, 32, 8, 2), (64, 32, 8, 1)),
        512: ((32, 32, 8, 1), (32, 16, 8, 1)),
    },
    "tcgen05 + masks": {
        64: ((128, 64, 8, 2), (64, 64, 4, 3)),
        128: ((64, 32, 8, 2), (64, 32, 8, 3)),
    },
    "tcgen05 + masks, bias": {
        64: ((128, 32, 8, 3), (64, 32, 4, 2)),
        128: ((64, 32, 8, 2), (64, 32, 4, 2)),
    },
    "tcgen05 + blocks": {
        128: ((128, 64, 8, 3), (128, 64, 8, 2)),
    },
    "tcgen05 + padded": {
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
    },
    "mma": {
        64: ((128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 32, 8, 3), (128, 32, 8, 2), (64, 32, 4, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
        512: ((32, 32, 8, 1), (16, 16, 8, 1)),
    },
    "mma + pairs": {
        64: ((64, 32, 4, 2),),
        128: ((64, 32, 8, 2), (64, 32, 8, 3)),
    },
    "mma, 99 KB + masks, bias": {64: ((64, 32, 8, 2), (64, 32, 8, 3))},
    "mma, 99 KB + pairs, dropout": {64: ((64, 32, 8, 2), (64, 32, 8, 3))},
    "mma + pairs, dropout": {128: ((64, 32, 8, 3), (64, 32, 8, 2))},
    "mma + dropout": {
        64: ((128, 32, 8, 3), (64, 64, 8, 3)),
        128: ((128, 32, 8, 3), (64, 32, 8, 3)),
    },
    "fp32": {
        64: ((32, 32, 8, 2), (32, 32, 8, 1)),
        128: ((32, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
        512: ((16, 16, 8, 1), (8, 16, 8, 1)),
    },
}

# Of forward mode: two sums as wide as Dv, and twice as many operands.
JVP: Tiles = {
    "wgmma": {
        64: ((128, 64, 8, 2), (64, 32, 4, 3)),
        128: ((128, 32, 8, 2), (64, 32, 4, 2)),
        256: ((64, 32, 8, 1),),
        512: ((16, 16, 8, 1),),
    },
    "wgmma + pairs": {
        64: ((128, 32, 8, 3), (64, 32, 4, 3)),
    },
    "tcgen05": {
        64: ((128, 32, 8, 2), (64, 32, 4, 2)),
        128: ((128, 32, 8, 2), (64, 32, 8, 2)),
        256: ((64, 32, 8, 1),),
        512: ((16, 16, 8, 1),),
    },
    "mma": {
        64: ((128, 32, 8, 3), (64, 32, 4, 3)),
        128: ((128, 16, 8, 2), (64, 32, 8, 2)),
        256: ((32, 32, 8, 1),),
        512: ((16, 16, 8, 1),),
    },
    "mma + pairs": {
        64: ((128, 32, 8, 3),),
    },
    "fp32": {
        64: ((32, 32, 8, 1),),
        128: ((32, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
        512: ((16, 16, 8, 1), (8, 16, 8, 1)),
    },
}

BIAS_GRAD: Tiles = {
    "wgmma": {
        64: ((64, 64, 8, 2),),
        128: ((64, 64, 8, 2),),
        256: ((64, 32, 8, 1),),
        512: ((16, 16, 8, 1),),
    },
    "mma": {
        64: ((32, 64, 8, 2),),
        128: ((32, 32, 8, 1),),
        256: ((32, 32, 8, 1),),
        512: ((16, 16, 8, 1),),
    },
    "mma + distances": {
        128: ((32, 32, 8, 2),),
    },
    "mma + pairs, dropout": {128: ((16, 32, 8, 2),)},
    "tcgen05 + distances": {
        128: ((64, 64, 8, 1),),
    },
    "fp32": DQ["fp32"],
}
BIAS_GRAD["tcgen05"] = BIAS_GRAD["wgmma"]

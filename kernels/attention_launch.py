"""What the launchers of attention's forward and backward share: arguments, tuning, L2."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import triton
from torch import Tensor

from .attention_mask import Sides, Tile, shown_tiles
from .attention_scores import Dropped, Packed, Rules
from .attention_tile_lists import TMA
from .common import (
    Device,
    View,
    aligned,
    block_width,
    broadcast_view,
    bucket,
    dot_precision,
    with_data,
)
from .dropout import dropout_of
from .plans import Launches
from .tuning import Key, settings

if TYPE_CHECKING:
    from fusedattn.ops.attention_config import (
        AttentionBackwardCall,
        AttentionCall,
        AttentionConfig,
    )


_PACK = 16  # pairs of a mask that are loaded at once


def _ids(x: Tensor | None) -> View | None:
    """(B or 1, S) as (B, 1, 1, S)."""
    if x is None:
        return None
    batch, step = x.stride()
    return View(with_data(x), 0 if x.shape[0] == 1 else batch, 0, 0, step)


def _map_shape(call: AttentionCall | AttentionBackwardCall) -> tuple[int, int, int, int]:
    """Of what the masks of a call show: each dimension that of the scores, or 1."""
    q, k, mask, blocks = call.q, call.k, call.mask, call.mask_blocks
    dense = (1, 1, 1, 1) if mask is None else tuple(mask.shape)
    by_rule = [1, 1, 1, 1]
    if blocks is not None:
        by_rule[:2] = blocks.shape[:2]
    if call.documents_q is not None:
        by_rule[0] = max(by_rule[0], call.documents_q.shape[0], call.documents_k.shape[0])  # type: ignore[union-attr]
    if call.prefix_lengths is not None:
        by_rule[0] = q.shape[0]
    if any(x is not None for x in (blocks, call.documents_q, call.prefix_lengths)):
        by_rule[2:] = q.shape[2], k.shape[2]
    batch, heads, rows, columns = (max(x, y) for x, y in zip(dense, by_rule, strict=True))
    return batch, heads, rows, columns


def rules_of(launches: Launches, call: AttentionCall | AttentionBackwardCall) -> Rules:
    """The rules of a call, as the kernels take them."""
    ends = call.kv_lengths, call.cu_seqlens_k
    packs = call.k.shape[2] % _PACK == 0 and all(x is None for x in ends)
    return Rules(
        broadcast_view(call.mask),
        launches.vector(call.prefix_lengths),
        _ids(call.documents_q),
        _ids(call.documents_k),
        broadcast_view(call.mask_blocks),
        call.config.block_size or None,
        broadcast_view(call.bias),
        broadcast_view(call.distance_bias),
        call.config.softcap or None,
        broadcast_view(call.alibi_slopes),
        _PACK if packs else None,
    )


def shown_of(
    call: AttentionCall | AttentionBackwardCall,
    rules: Rules,
    kv_lengths: Tensor | None,
    *,
    of_keys: bool = False,
) -> Callable[[Launches, Tile], View] | None:
    """`shown_tiles` of a call; None where all tiles are walked over that causal, window and
    lengths show. kv_lengths: those of the call, contiguous."""
    if not is_masked(call) or call.cu_seqlens_q is not None:
        return None
    lengths = call.q.shape[2], call.k.shape[2]
    bounds = bounds_of(call.config, *lengths)
    sides = Sides(*_map_shape(call), lengths, bounds, kv_lengths)
    return shown_tiles(rules, sides, of_keys=of_keys)


def is_masked(call: AttentionCall | AttentionBackwardCall) -> bool:
    """Whether there is a mask beside causal, window and lengths."""
    masks = call.mask, call.prefix_lengths, call.documents_q, call.mask_blocks
    return any(x is not None for x in masks)


def dropped_of(call: AttentionCall | AttentionBackwardCall) -> Dropped | None:
    """The dropout of a call, as the kernels take it."""
    drop = dropout_of(call.config.dropout_p)
    return None if drop is None else Dropped(with_data(call.seed), *drop)  # type: ignore[arg-type]


def sequences_of(call: AttentionCall | AttentionBackwardCall) -> int:
    """How many there are."""
    offsets = call.cu_seqlens_q
    return call.q.shape[0] if offsets is None else offsets.shape[0] - 1


def packed_of(launches: Launches, call: AttentionCall | AttentionBackwardCall) -> Packed | None:
    """Where packed sequences begin, as the kernels take it."""
    if call.cu_seqlens_q is None:
        return None
    offsets = (launches.vector(x) for x in (call.cu_seqlens_q, call.cu_seqlens_k))
    return Packed(*offsets, 0 if call.config.causal == 1 else 1)


def tiles(call: AttentionCall | AttentionBackwardCall, x: Tensor, block: int) -> int:
    """`tiles_of` for a head of x."""
    if call.cu_seqlens_q is None:
        return triton.cdiv(x.shape[2], block)
    return x.shape[2] // block + sequences_of(call) + 1


def longest_of(call: AttentionCall | AttentionBackwardCall) -> tuple[int, int]:
    """The lengths of queries and keys; of packed sequences a guess where nobody knows."""
    lengths, known = (call.q.shape[2], call.k.shape[2]), call.config[7:9]
    if call.cu_seqlens_q is None:
        return lengths
    mean = [-(-n // sequences_of(call)) for n in lengths]
    seq_q, seq_k = (most or guess for most, guess in zip(known, mean, strict=True))
    return seq_q, seq_k


def bounds_of(
    config: AttentionConfig, seq_q: int, seq_k: int, packed: bool = False
) -> tuple[int | None, int | None]:
    """(lower, upper): query i sees keys i + lower … i + upper; None for all to that side.

    Of packed sequences from the diagonal of each.
    """
    diagonal = 0 if config.causal == 1 or packed else seq_k - seq_q
    left, right = config.window_left, 0 if config.causal else config.window_right
    most = seq_q + seq_k  # no wider than the scores, so that sums stay in 32 bits
    lower = None if left < 0 else diagonal - min(left, most)
    return lower, None if right < 0 else diagonal + min(right, most)


def common_arguments(
    call: AttentionCall | AttentionBackwardCall, *further: Tensor | None
) -> dict[str, Any]:
    """The kernel arguments, other than tensors and tiles, that forward and backward share.

    further: tensors besides q, k and v of which the kernels load or store tiles.
    """
    q, k, v, config = call.q, call.k, call.v, call.config
    head_dim, head_dim_v = q.shape[3], v.shape[3]
    seq_q, seq_k = q.shape[2], k.shape[2]
    packed = call.cu_seqlens_q is not None
    lower, upper = bounds_of(config, seq_q, seq_k, packed)
    added = call.bias, call.alibi_slopes, call.distance_bias
    natural = any(x is not None for x in added) or config.softcap > 0
    return {
        "scale": config.scale,
        "heads": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "seq_q": seq_q,
        "seq_k": seq_k,
        "lower": lower,
        "upper": upper,
        "sequences": sequences_of(call) if packed else None,
        "D": head_dim,
        "DV": head_dim_v,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(head_dim_v),
        "ALIGNED": aligned(q, k, v, *(x for x in further if x is not None)),
        "NATURAL": natural or not config.scale > 1e-30,
        "MASKED": is_masked(call),
        "dropout": dropped_of(call),
        "PRECISION": dot_precision(q),
    }


def launch_settings(call: AttentionCall | AttentionBackwardCall) -> Hashable:
    """What launches depend on that is no part of the call."""
    return settings(), dot_precision(call.q)


def tuning(
    call: AttentionCall | AttentionBackwardCall,
    arguments: dict[str, Any],
    candidates: tuple[triton.Config, ...],
    products: int,
) -> dict[str, Any]:
    """What `Tuner.pick` asks of a call with so many products of matrices."""
    q = call.q
    kind = (
        q.device, q.dtype, arguments["D"], arguments["DV"], arguments["lower"] is None,
        arguments["upper"] is None, call.alibi_slopes is None,
        arguments["PRECISION"], call.mask is None, call.bias is None,
        call.distance_bias is None, call.prefix_lengths is None, call.documents_q is None,
        call.mask_blocks is None, call.config.softcap > 0,
        arguments["group"], arguments["dropout"] is None, call.cu_seqlens_q is None,
        any(TMA in each.kwargs for each in candidates),  # not for every layout
    )  # fmt: skip
    heads, (seq_q, seq_k) = sequences_of(call) * q.shape[1], longest_of(call)
    width = (arguments["D"] + arguments["DV"]) // 2
    return {
        "candidates": candidates,
        "key": Key(kind, (bucket(seq_q, 8192), bucket(seq_k, 8192), bucket(heads, 256))),
        "work": 2 * products * heads * seq_q * seq_k * width,
        "deterministic": call.config.deterministic,
    }


def pair_bytes(call: AttentionCall | AttentionBackwardCall) -> int:
    """Bytes that each pair of query and key takes in shared memory: of mask, bias and dropout."""
    rules = call.mask_blocks, call.documents_q, call.prefix_lengths
    read = sum(x.element_size() for x in (call.mask, call.bias) if x is not None)
    read += any(x is not None for x in rules) + (0 if call.distance_bias is None else 4)
    return read + (call.config.dropout_p > 0.0)


def special_tiles(call: AttentionCall | AttentionBackwardCall) -> tuple[str, ...]:
    """What a call has tiles of its own for, where a kernel does: attention_tile_lists.py."""
    head_dims = call.q.shape[3], call.v.shape[3]
    listed, drops = is_masked(call) and call.cu_seqlens_q is None, call.config.dropout_p > 0.0
    distances = call.distance_bias is not None
    kinds = {
        "masks, dropout": listed and drops and call.bias is None and not distances,
        "pairs, dropout": drops and pair_bytes(call) > 1,
        "blocks": call.mask_blocks is not None,
        "distances": distances,
        "dropout": drops,
        "masks" if call.bias is None else "masks, bias": listed,
        "pairs": pair_bytes(call) > 0,
    }
    found = tuple(name for name, has in kinds.items() if has)
    padded = any(block_width(n) != n for n in head_dims)
    return found or ("padded",) * padded


def heads_in_l2(device: Device, x: Tensor, y: Tensor, share: int) -> int:
    """How many heads to work on at once so that what they share, one head of x and y, stays in L2.

    share: how many programs' heads read the same head of x and y.
    """
    size = x.shape[2] * (x.shape[3] + y.shape[3]) * x.element_size()
    return max(1, device.l2 // (2 * size)) * share

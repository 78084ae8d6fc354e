"""The options of attention as type checkers read them in overloads; nothing imports it to run."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack as Unpack

from ..biases import DistanceBias
from ..masks import Mask


class SharedOptions(TypedDict, total=False):
    causal: bool | str
    window: tuple[int | None, int | None] | None
    scale: float | Tensor | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    seed: int | Tensor | None
    deterministic: bool | None
    backend: str


class AttentionOptions(SharedOptions, total=False):
    mask: Tensor | Mask | None
    bias: Tensor | DistanceBias | None
    kv_lengths: Tensor | None


class VarlenOptions(SharedOptions, total=False):
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    mask: Mask | None
    bias: DistanceBias | None


class DecodeOptions(TypedDict, total=False):
    k: Tensor | None
    v: Tensor | None
    block_table: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    mask: Tensor | None
    causal: bool
    window: tuple[int | None, int | None] | None
    scale: float | Tensor | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    backend: str


class NormOptions(TypedDict, total=False):
    dropout_p: float
    seed: int | Tensor | None
    residual_dtype: torch.dtype | None
    backend: str


class RMSNormOptions(NormOptions, total=False):
    weight_offset: float

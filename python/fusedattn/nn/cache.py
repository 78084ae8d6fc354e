"""Caches of keys and values for generation: of one piece for each sequence, or in shared pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops._checks import FLOATS, check_integer
from ..ops.attention_decode import attention_decode

__all__ = ["KVCache", "PagedKVCache"]


def _sizes(name: str, **sizes: Any) -> None:
    for size, given in sizes.items():
        if check_integer(name, size, given, "an int") < 1:
            raise ValueError(f"{name}: got {size}={given}, expected at least 1")


class KVCache(nn.Module):
    """The keys and values of a batch of sequences, each of its own length.

    >>> import torch, fusedattn
    >>> cache = fusedattn.nn.KVCache(batch=4, heads=8, head_dim=64)
    >>> q, k, v = torch.randn(4, 32, 10, 64), *torch.randn(2, 4, 8, 10, 64)
    >>> cache.attend(q, k, v).shape, cache.lengths.tolist()
    (torch.Size([4, 32, 10, 64]), [10, 10, 10, 10])

    Args:
        batch: B, how many sequences there are.
        heads: Hkv, of keys and values.
        head_dim, head_dim_v: D, and Dv if it is another.
        room: for so many keys of a sequence at first; it grows by doubling.
        device, dtype: of the cache; float16, bfloat16, float32 or float64.

    Its buffers k (B, Hkv, room, D), v (B, Hkv, room, Dv) and lengths (B,), int32, are not part of a
    state_dict.

    Raises:
        TypeError, ValueError: a size that is no positive int, or a dtype that is no float.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        room: int = 256,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim_v = head_dim if head_dim_v is None else head_dim_v
        _sizes("KVCache", batch=batch, heads=heads, head_dim=head_dim, head_dim_v=dim_v, room=room)
        for name, dim in (("k", head_dim), ("v", dim_v)):
            rows = _new((batch, room, heads, dim), "KVCache", device, dtype).transpose(1, 2)
            self.register_buffer(name, rows, persistent=False)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.register_buffer("lengths", lengths, persistent=False)
        # No sequence has more keys, so that nobody waits for a GPU to know it; None: ask it.
        self._most: int | None = 0

    @property
    def room(self) -> int:
        """For how many keys of a sequence there is memory."""
        return self.k.shape[2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Append keys and values, and `attention_decode` of the queries on all there are.

        Under torch.compile the cache does not grow, for its memory is part of the graph: `reserve`
        comes before, and what is too much is refused.

        Args:
            q: (B, Hq, Sq, D). k, v: (B, Hkv, Snew, D) and (B, Hkv, Snew, Dv).
            options: those of `fusedattn.attention_decode`.

        Returns:
            out (B, Hq, Sq, Dv), or with `return_lse` (out, lse).
        """
        new = k.shape[2] if isinstance(k, Tensor) and k.dim() == 4 else 0
        if torch.compiler.is_compiling():
            most = None  # each number would be a graph of its own
        else:
            held = max(self.lengths.tolist(), default=0) if self._most is None else self._most
            most = held + new
            self.reserve(most)
        found = attention_decode(q, self.k, self.v, self.lengths, k=k, v=v, **options)
        self.lengths += new
        self._most = most
        return found

    def reserve(self, room: int) -> None:
        """Memory for so many keys of each sequence, or more; what is there stays."""
        if room <= self.room:
            return
        room = max(room, 2 * self.room)
        for name in ("k", "v"):
            old = getattr(self, name)
            batch, heads, rows, dim = old.shape
            new = old.new_empty(batch, room, heads, dim).transpose(1, 2)
            new[:, :, :rows] = old
            setattr(self, name, new)

    def reset(self) -> None:
        """Forget all keys; the memory stays."""
        self.lengths.zero_()
        self._most = 0

    def crop(self, lengths: int | Tensor) -> None:
        """Forget what is behind the first `lengths` keys, an int or (B,): tokens that were drafted
        and refused."""
        given = torch.as_tensor(lengths, dtype=torch.int32, device=self.lengths.device)
        if bool((given < 0).any()):
            raise ValueError(f"KVCache.crop: got lengths {lengths}, expected none below 0")
        self.lengths = torch.minimum(self.lengths, given)
        if isinstance(lengths, int) and self._most is not None:
            self._most = min(self._most, lengths)

    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes what index[b] was, as beam search wants; index (B',), B' any."""
        for name in ("k", "v", "lengths"):
            setattr(self, name, _selected(getattr(self, name), index))


def _selected(x: Tensor, index: Tensor) -> Tensor:
    if x.dim() == 1:
        return x[index]
    return x.transpose(1, 2)[index].transpose(1, 2)


def _new(shape: tuple[int, ...], name: str, device: Any, dtype: torch.dtype | None) -> Tensor:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {dtype}, expected one of {FLOATS}")
    return torch.empty(shape, device=device, dtype=dtype)


class PagedKVCache(nn.Module):
    """Keys and values of sequences that come and go, in pages of one pool (Kwon et al. 2023).

    A sequence is a number that `add` or `fork` gives. Forks share pages, and get one of their own
    where they write to it.

    >>> import torch, fusedattn
    >>> cache = fusedattn.nn.PagedKVCache(pages=64, heads=8, head_dim=64)
    >>> prompt = cache.add()
    >>> q, k, v = torch.randn(1, 32, 20, 64), *torch.randn(2, 1, 8, 20, 64)
    >>> _ = cache.attend([prompt], q, k, v)
    >>> other = cache.fork(prompt)
    >>> q, k, v = torch.randn(2, 32, 1, 64), *torch.randn(2, 2, 8, 1, 64)
    >>> cache.attend([prompt, other], q, k, v).shape, cache.length(other)
    (torch.Size([2, 32, 1, 64]), 21)
    >>> cache.free(prompt)

    Args:
        pages: how many there are at first; `reserve` adds more.
        heads: Hkv, of keys and values.
        head_dim, head_dim_v: D, and Dv if it is another.
        page_size: keys of a page.
        device, dtype: of the cache; float16, bfloat16, float32 or float64.

    Its buffers k (pages, Hkv, page_size, D) and v (pages, Hkv, page_size, Dv) are not part of a
    state_dict.

    Raises:
        TypeError, ValueError: a size that is no positive int, or a dtype that is no float.
    """

    k: Tensor
    v: Tensor

    def __init__(
        self,
        pages: int,
        heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        page_size: int = 16,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim_v = head_dim if head_dim_v is None else head_dim_v
        _sizes(
            "PagedKVCache", pages=pages, heads=heads, head_dim=head_dim, head_dim_v=dim_v,
            page_size=page_size,
        )  # fmt: skip
        for name, dim in (("k", head_dim), ("v", dim_v)):
            rows = _new((pages, page_size, heads, dim), "PagedKVCache", device, dtype)
            self.register_buffer(name, rows.transpose(1, 2), persistent=False)
        self._uses = [0] * pages  # of each page
        self._free = list(range(pages))[::-1]
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    @property
    def page_size(self) -> int:
        """Keys of a page."""
        return self.k.shape[2]

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._free)

    def add(self) -> int:
        """A new sequence without keys."""
        self._tables[self._next], self._lengths[self._next] = [], 0
        self._next += 1
        return self._next - 1

    def fork(self, sequence: int) -> int:
        """A new sequence with the keys of another: their pages are shared."""
        self._known(sequence)
        new = self.add()
        self._tables[new], self._lengths[new] = [*self._tables[sequence]], self._lengths[sequence]
        for page in self._tables[new]:
            self._uses[page] += 1
        return new

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other shares are free."""
        self._known(sequence)
        self._release(self._tables.pop(sequence))
        del self._lengths[sequence]

    def length(self, sequence: int) -> int:
        """How many keys a sequence has."""
        self._known(sequence)
        return self._lengths[sequence]

    def crop(self, sequence: int, length: int) -> None:
        """Forget what is behind the first `length` keys of a sequence."""
        self._known(sequence)
        if length < 0:
            raise ValueError(f"PagedKVCache.crop: got length={length}, expected at least 0")
        self._lengths[sequence] = min(length, self._lengths[sequence])
        kept = -(-self._lengths[sequence] // self.page_size)
        table = self._tables[sequence]
        self._release(table[kept:])
        del table[kept:]

    def reserve(self, pages: int) -> None:
        """Memory for so many pages in all, or more; what is there stays."""
        more = pages - len(self._uses)
        if more <= 0:
            return
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_empty(pages, old.shape[2], old.shape[1], old.shape[3]).transpose(1, 2)
            new[: old.shape[0]] = old
            setattr(self, name, new)
        self._free = [*range(len(self._uses), pages)][::-1] + self._free
        self._uses += [0] * more

    def attend(self, sequences: list[int], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Append keys and values, and `attention_decode` of the queries on all there are.

        Args:
            sequences: B of them, each at most once.
            q: (B, Hq, Sq, D). k, v: (B, Hkv, Snew, D) and (B, Hkv, Snew, Dv).
            options: those of `fusedattn.attention_decode`.

        Returns:
            out (B, Hq, Sq, Dv), or with `return_lse` (out, lse).

        Raises:
            ValueError: a sequence is not there, or twice; too few pages are free. Nothing was
                written.
        """
        for each in sequences:
            self._known(each)
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"PagedKVCache: got sequences {sequences}, expected each at most once")
        new = k.shape[2] if isinstance(k, Tensor) and k.dim() == 4 else 0
        self._make_room(sequences, new)
        most = max((len(self._tables[each]) for each in sequences), default=0)
        rows = [[*self._tables[x], *[0] * (most - len(self._tables[x]))] for x in sequences]
        table = torch.tensor(rows, dtype=torch.int32).reshape(len(sequences), most)
        lengths = torch.tensor([self._lengths[x] for x in sequences], dtype=torch.int32)
        found = attention_decode(
            q, self.k, self.v, lengths.to(self.k.device), k=k, v=v,
            block_table=table.to(self.k.device), **options,
        )  # fmt: skip
        for each in sequences:
            self._lengths[each] += new
        return found

    def _known(self, sequence: int) -> None:
        if sequence not in self._tables:
            raise ValueError(f"PagedKVCache: got sequence {sequence}, expected one that was added")

    def _release(self, pages: list[int]) -> None:
        for page in pages:
            self._uses[page] -= 1
            if self._uses[page] == 0:
                self._free.append(page)

    def _make_room(self, sequences: list[int], new: int) -> None:
        """Pages for so many new keys of each, and one of its own for the first of them."""
        if new == 0:
            return
        size, wanted = self.page_size, 0
        shared = dict.fromkeys(page for x in sequences for page in self._written(x))
        for page in shared:  # the last of those who write to it may keep it
            writers = sum(page in self._written(x) for x in sequences)
            wanted += writers - (self._uses[page] == writers)
        for each in sequences:
            wanted += max(-(-(self._lengths[each] + new) // size) - len(self._tables[each]), 0)
        if wanted > len(self._free):
            raise ValueError(
                f"PagedKVCache: got {len(self._free)} free pages, expected {wanted} for {new} new "
                f"keys of {len(sequences)} sequences; free some, or reserve more"
            )
        for each in sequences:
            table = self._tables[each]
            for page in self._written(each):
                if self._uses[page] > 1:
                    own = self._take()
                    for cache in (self.k, self.v):
                        cache[own] = cache[page]
                    self._uses[page] -= 1
                    table[self._lengths[each] // size] = own
            while len(table) * size < self._lengths[each] + new:
                table.append(self._take())

    def _written(self, sequence: int) -> list[int]:
        """The page that has a sequence's last key and room behind it."""
        at, rest = divmod(self._lengths[sequence], self.page_size)
        return self._tables[sequence][at : at + 1] if rest else []

    def _take(self) -> int:
        page = self._free.pop()
        self._uses[page] = 1
        return page

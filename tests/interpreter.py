"""Triton's interpreter, without what takes it most of the time and changes nothing.

At each call of a jitted function, not only at a launch, it looks through all of `triton.language`
for what to replace by its own, and each operation makes a table of dtypes.
"""

from __future__ import annotations

import functools
from typing import Any

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:  # no Triton for this machine
    interpreter = None


def make_faster() -> None:
    """For all launches of this process. A version that works otherwise is left as it is."""
    if not all(hasattr(interpreter, x) for x in ("_patch_lang", "_LangPatchScope")):
        return
    patch, of_scalar = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)

    def patch_once(fn: Any) -> Any:
        modules = (x for x in (tl, tl.core) if any(x is y for y in fn.__globals__.values()))
        if any(tl.core.is_builtin(x.load) for x in modules):
            return patch(fn)
        return interpreter._LangPatchScope()

    def np_dtype(dtype: Any) -> Any:
        pointer = isinstance(dtype.scalar, tl.pointer_type)  # which has no hash
        return of_scalar(tl.uint64 if pointer else dtype.scalar)

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = np_dtype

"""Compiles for a Hopper GPU what the heads' launchers would launch there; needs Triton, but no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_ove.heads import triton_backend

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Compiled:
    """One kernel as the device would get it."""

    name: str
    shared_bytes: int
    uses_wgmma: bool


class _Kernels:
    """Stands in for the module of kernels."""

    def __init__(self, compiled: list[Compiled]) -> None:
        self._compiled = compiled

    def __getattr__(self, name: str) -> _Launcher:
        return _Launcher(name, self._compiled)


class _Launcher:
    def __init__(self, name: str, compiled: list[Compiled]) -> None:
        self._name, self._compiled = name, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> _Launcher:
        assert all(extent > 0 for extent in grid)
        return self

    def __call__(self, *args: Any, **keywords: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        from megatron_ove.heads import triton_kernels

        kernel = getattr(triton_kernels, self._name)
        options = {key: keywords.pop(key) for key in _OPTIONS if key in keywords}
        constants = dict(keywords)
        signature, attributes = {}, {}
        for index, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            if value is None or (isinstance(value, int) and value == 1):
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = _TYPES[value.dtype]
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        assert len(args) + len(keywords) == len(kernel.arg_names), self._name
        source = triton.compiler.ASTSource(
            fn=kernel,
            signature={name: signature.get(name, "constexpr") for name in kernel.arg_names},
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs=attributes,
        )
        result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        uses_wgmma = "wgmma.mma_async" in result.asm["ptx"]
        self._compiled.append(Compiled(self._name, result.metadata.shared, uses_wgmma))


@contextmanager
def compiled_launches(directory: str) -> Iterator[list[Compiled]]:
    """Compiles launches instead of running them; `directory` takes Triton's cache."""
    compiled: list[Compiled] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", directory)
        patch.setattr(triton_backend, "_kernels", lambda: _Kernels(compiled))
        yield compiled

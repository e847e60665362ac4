"""Lets megatron-core 0.16.1 run on CPU with gloo: the same schedules, layers, optimizer and checkpoints as on GPUs.

Installed by the topology; nothing else in the package knows. Process-wide and undone by `uninstall()`. Four parts are
for the CPU alone: torch.cuda calls that answer for the CPU; a TorchFunctionMode that sends device="cuda" to the CPU; a
model-parallel RNG tracker over torch's CPU generator; and torch's AdamW and norms, which megatron-core gives up for
CUDA-only ones as soon as Transformer Engine or Apex can be imported. Two repair the distributed optimizer's checkpoint
code and are needed on GPUs as well: buckets that are padded, always; torch's AdamW, where Transformer Engine and Apex
are missing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import megatron.core
import torch
from torch.overrides import TorchFunctionMode

from megatron_ove.errors import ConfigError

CHECKED_MCORE_VERSION = "0.16.1"
_CPU = torch.device("cpu")


class _Installed:
    """What `uninstall` has to undo; empty when nothing is installed."""

    mode: TorchFunctionMode | None = None
    saved: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Installs the backend; does nothing when it is already there.

    Raises:
        ConfigError: a CUDA device is visible, or megatron-core is not the version this was checked with.
    """
    if _Installed.mode is not None:
        return
    if torch.cuda.is_available():
        raise ConfigError(
            "the CPU backend cannot be installed while a CUDA device is visible, because it redirects torch.cuda for "
            "the whole process; set parallel.device: cuda, or hide the devices with CUDA_VISIBLE_DEVICES=''"
        )
    _check_version()
    from megatron.core import jit
    from megatron.core.tensor_parallel import random as mcore_random

    jit.disable_jit_fuser()  # else functions imported from here on are torch.compile'd and need a C++ compiler
    _patch(torch.cuda, "current_device", lambda: _CPU)
    _patch(torch.cuda, "synchronize", lambda *args, **kwargs: None)
    _patch(torch.cuda, "empty_cache", lambda: None)
    _patch(mcore_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _patch(mcore_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    _patch(mcore_random, "_CUDA_RNG_STATE_TRACKER", _cpu_rng_tracker())
    _patch(mcore_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
    _use_torch_optimizer()
    _repair_checkpoints_of_padded_buckets()
    _repair_checkpoints_of_torch_adamw()
    mode = _CudaIsCpu()
    mode.__enter__()
    _Installed.mode = mode


def repair_gpu_checkpoints() -> None:
    """On a GPU: only the repairs to the distributed optimizer's checkpoints; does nothing when they are there.

    Raises:
        ConfigError: megatron-core is not the version this was checked with.
    """
    from megatron.core import optimizer

    if _Installed.saved:
        return
    _check_version()
    _repair_checkpoints_of_padded_buckets()
    if optimizer.USING_PYTORCH_OPTIMIZER:  # neither Transformer Engine nor Apex
        _repair_checkpoints_of_torch_adamw()


def uninstall() -> None:
    """Undoes `install` and `repair_gpu_checkpoints`; does nothing when neither was called."""
    if _Installed.mode is not None:
        _Installed.mode.__exit__(None, None, None)
        _Installed.mode = None
    while _Installed.saved:
        owner, name, value = _Installed.saved.pop()
        setattr(owner, name, value)


def _check_version() -> None:
    if megatron.core.__version__ != CHECKED_MCORE_VERSION:
        raise ConfigError(
            f"this program was checked with megatron-core {CHECKED_MCORE_VERSION} and this is "
            f"{megatron.core.__version__}, whose internals may differ; install megatron-core=={CHECKED_MCORE_VERSION}"
        )


def _patch(owner: Any, name: str, value: Any) -> None:
    _Installed.saved.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


class _CudaIsCpu(TorchFunctionMode):
    """Answers requests for a CUDA device with the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron-core tells device and dtype by this string; nobody else is to see the lie.
            name = func(*args)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.") else name
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _cpu_rng_tracker() -> Any:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    class CpuRngStatesTracker(CudaRNGStatesTracker):
        """Forks torch's CPU generator where the original forks the CUDA generator."""

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"rng state {name!r} or seed {seed} is already tracked")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outer_state, outer_name = torch.get_rng_state(), self._current_state_name
            if outer_name != "default-rng":
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_[outer_name] if outer_name != "default-rng" else outer_state)
                self._current_state_name = outer_name

    return CpuRngStatesTracker()


def _use_torch_optimizer() -> None:
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision

    _patch(optimizer, "USING_PYTORCH_OPTIMIZER", True)
    _patch(distrib_optimizer, "HAVE_APEX_OR_TE", False)
    _patch(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    for module in (clip_grads, mixed_precision):
        _patch(module, "multi_tensor_applier", utils.local_multi_tensor_applier)
        _patch(module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)


def _repair_checkpoints_of_padded_buckets() -> None:
    """A defect of DistributedOptimizer with any inner optimizer, in saving and loading `fully_reshardable` state.

    Upstream joins the gathered buckets without the padding at their ends, and then cuts the parameters out at their
    places in the buffer, which count it: behind a padded bucket every parameter is stored with its neighbour's moments
    and master weights. Here the padding stays in between. It is cut away with the parameters, so the file holds tensors
    of the parameters' shapes and does not depend on the padding or the number of data ranks.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    describe = DistributedOptimizer.sharded_param_state_fully_reshardable

    def describe_with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        buckets = [(bucket, bucket.grad_data.numel()) for buffer in self.buffers for bucket in buffer.buckets]
        sizes = [*buckets, *((buffer, buffer.numel) for buffer in self.buffers)]
        unpadded = [owner.numel_unpadded for owner, _ in sizes]
        try:
            for owner, size in sizes:
                owner.numel_unpadded = size
            return describe(self, *args, **kwargs)
        finally:
            for (owner, _), size in zip(sizes, unpadded, strict=True):
                owner.numel_unpadded = size

    _patch(DistributedOptimizer, "sharded_param_state_fully_reshardable", describe_with_padding)


def _repair_checkpoints_of_torch_adamw() -> None:
    """Three defects of DistributedOptimizer with torch's AdamW, in saving and loading `fully_reshardable` state."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict_before_first_step(self: Any) -> Any:
        """Upstream asserts that exactly one step count exists, so AdamW's lazily made state must be there."""
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    self.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        return state_dict(self)

    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        """Upstream looks up "step" among the loaded tensors, where it is not (KeyError)."""
        group, index = self.model_param_group_index_map[model_param]
        step = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]].get("step")
        set_states(self, model_param, tensors if step is None else {"step": step, **tensors})

    def load_with_own_steps(self: Any, loaded: Any) -> None:
        """Upstream gives all parameters one step tensor, which then advances once per parameter, silently."""
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    _patch(DistributedOptimizer, "state_dict", state_dict_before_first_step)
    _patch(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states_with_step)
    _patch(DistributedOptimizer, "load_state_dict", load_with_own_steps)

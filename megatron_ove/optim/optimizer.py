"""`DenseOptimizer`: megatron-core's optimizer in two halves, so that a bad step can be refused in between.

megatron-core's own `step()` computes the norm and updates in one go, and in fp32 and bf16 it checks nothing: one NaN
destroys all weights. Here `gradient_norm()` comes first and changes nothing that lasts; `step()` clips and updates.
The norm is the same on every rank and for every layout: replicated gradients count once, sharded ones add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_ove.config.optim import OptimConfig
from megatron_ove.optim.param_groups import config_overrides, set_group_hyperparameters


class DenseOptimizer:
    """AdamW over all weights of the model: fp32 master weights under bf16, state sharded over data ranks if configured.

    To the training step it is an `Update`: encoder and modules of objectives together, clipped by their joint norm.
    """

    def __init__(
        self,
        optimizer: MegatronOptimizer,
        chunks: Sequence[DistributedDataParallel],
        config: OptimConfig,
        names: Mapping[Tensor, str],
    ) -> None:
        """
        Args:
            optimizer: as built by `build_dense_optimizer`.
            chunks: the wrapped model chunks of this rank.
            config: hyperparameters.
            names: parameter -> its name in the whole model.
        """
        self._optimizer = optimizer
        self._chunks = list(chunks)
        self._config = config
        self._names = names
        self._norm = 0.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    @property
    def trains(self) -> bool:
        """Whether any weight of this rank is trained; on all ranks alike."""
        return any(group["params"] for group in self._optimizer.param_groups)

    def zero_grad(self) -> None:
        """Clears the gradient buffers before a step."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """Returns the L2 norm of the whole gradient under the name ""; collective. Call after gradients are reduced.

        May be infinite or NaN; then `step` must not be called.
        """
        self._optimizer.prepare_grads()
        self._norm = float(self._optimizer.get_grad_norm())
        return {"": self._norm}

    def describe(self, name: str) -> str:
        return "the encoder"

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Clips to `clip_grad_norm` by the norm that `gradient_norms` found and updates the weights.

        Args:
            lr: rate of this step.
        """
        set_group_hyperparameters(self._optimizer.param_groups, self._config, lr=lr)
        if self._config.clip_grad_norm > 0:
            params = [param for group in self._optimizer.param_groups for param in group["params"]]
            if params:
                clip_grad_by_total_norm_fp32(params, self._config.clip_grad_norm, self._norm)
        self._optimizer.step_with_ready_grads()

    def discard(self) -> None:
        """Nothing to do: gradients are cleared before the next step."""

    def finish_param_gather(self) -> None:
        """Completes the weights on every data rank where their gathering waits for the next forward pass; collective.

        To be called before weights are read outside a forward pass.
        """
        for chunk in self._chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def reload_model_params(self) -> None:
        """Takes the model's present weights as the new master weights (after loading a checkpoint without them)."""
        self._optimizer.reload_model_params()

    def sharded_state_dict(self, model_state: ShardedStateDict, *, is_loading: bool) -> ShardedStateDict:
        """Returns moments, master weights and step count as shards that any layout can load; collective."""
        return self._optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=sharding_metadata())

    @torch.no_grad()
    def differing_master_weights(self, state: StateDict) -> str | None:
        """Returns the name of a parameter whose master weights are not its weights, None when there is none.

        An update gives the model its master weights cast to its dtype, so in a checkpoint both are equal to the bit.
        Only the distributed optimizer's state is looked at. Not collective.

        Args:
            state: what a checkpoint filled in, before `load_state_dict`; the model must have its weights.
        """
        if "param_state" not in state:
            return None
        chunks: list[Any] = self._chunks
        buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
        # megatron-core numbers them like this when it describes its state, and when it takes it over.
        parameters = [parameter for buffer in buffers for parameter in buffer.param_index_map]
        for index, parameter in enumerate(parameters):
            master = state["param_state"][index]["param"].to(device=parameter.device, dtype=parameter.dtype)
            if not torch.allclose(master, parameter, rtol=0, atol=0, equal_nan=True):
                return self._names[parameter]
        return None

    def load_state_dict(self, state: StateDict) -> None:
        """Takes over what `sharded_state_dict` described and a checkpoint filled in."""
        self._optimizer.load_state_dict(state)


def build_dense_optimizer(
    chunks: Sequence[DistributedDataParallel],
    config: OptimConfig,
    *,
    names: Mapping[Tensor, str],
    num_layers: int,
    before_layers: Sequence[str] = (),
    dtype: torch.dtype,
    use_distributed_optimizer: bool,
    process_groups: ProcessGroupCollection,
) -> DenseOptimizer:
    """Builds AdamW for the wrapped model chunks of this rank; collective over all ranks.

    Args:
        chunks: model chunks inside megatron-core's DistributedDataParallel.
        config: hyperparameters.
        names: parameter -> its name in the whole model; see `optim/parts.py`.
        num_layers: of the whole encoder, for `layer_decay`.
        before_layers: parts of the encoder that come before its layers, likewise.
        dtype: of the model's weights, float32 or bfloat16.
        use_distributed_optimizer: whether state is sharded over the data ranks.
        process_groups: megatron-core's groups.
    """
    mcore_config = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(
        mcore_config,
        list(chunks),
        config_overrides=config_overrides(names, config, num_layers, before_layers),
        use_gloo_process_groups=False,
        pg_collection=process_groups,
    )
    return DenseOptimizer(optimizer, chunks, config, names)


def sharding_metadata() -> dict[str, Any]:
    """Returns how megatron-core is to store states, which any tensor, pipeline and data parallel size can load.

    A new dictionary each time, because megatron-core writes a process group into the one it is given.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }

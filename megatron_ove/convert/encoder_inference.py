"""The encoder of a checkpoint as a model of this package, ready for inference."""

from __future__ import annotations

from pathlib import Path

from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.convert.checkpoint_files import encoder_state_from_checkpoint
from megatron_ove.model.encoder import VisionEncoder, build_encoder
from megatron_ove.model.parameter_names import canonical_name
from megatron_ove.parallel.topology import ParallelTopology, initialize_topology


def load_encoder_for_inference(
    checkpoint_dir: str | Path, *, topology: ParallelTopology | None = None, verify: bool = True
) -> tuple[VisionEncoder, EncoderConfig]:
    """Builds the encoder of a checkpoint on this process, in the stored dtype and in evaluation mode.

    Args:
        checkpoint_dir: a checkpoint folder.
        topology: of one process; None starts one, which the caller ends with `destroy_topology`.
        verify: whether every file's checksum is compared first.

    Returns:
        The encoder, without gradients, and its configuration as it was trained.

    Raises:
        CheckpointError: the folder is not a whole checkpoint, or its tensors are not those of its configuration.
    """
    state, config = encoder_state_from_checkpoint(checkpoint_dir, verify=verify)
    topology = topology or initialize_topology(ParallelConfig(), seed=0)
    # How it was trained says nothing about this machine.
    plain = {"layer_spec": "auto", "attention_backend": "auto", "compile": False, "recompute": "none", "fp8": "off"}
    here = config.model_copy(update=plain)
    dtype = next(iter(state.values())).dtype
    encoder = build_encoder(here, topology, dtype=dtype, seed=0)
    # Transformer Engine layers name their norms otherwise.
    names = [name for name in encoder.state_dict() if not name.endswith("_extra_state")]
    encoder.load_state_dict({name: state[canonical_name(name)] for name in names})
    return encoder.eval().requires_grad_(False), config

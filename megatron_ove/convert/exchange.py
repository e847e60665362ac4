"""Between checkpoints and published folders, for each kind of encoder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Protocol

from safetensors.torch import save
from torch import Tensor

from megatron_ove.config.encoder import EncoderSection
from megatron_ove.convert.checkpoint_files import encoder_config_of, read_checkpoint_facts, read_weights
from megatron_ove.convert.class_centers import objectives_with_centers
from megatron_ove.convert.hf_config import MODEL_TYPE, from_hf_config
from megatron_ove.convert.hf_export import class_centers_file, class_centers_path, export_checkpoint
from megatron_ove.convert.hf_folder import read_hf_folder
from megatron_ove.convert.mapping import to_mcore
from megatron_ove.errors import CheckpointError
from megatron_ove.kinds import kinds_of
from megatron_ove.new_folder import new_folder

logger = logging.getLogger(__name__)


class EncoderExchange(Protocol):
    """The published form of a kind of encoder."""

    def export(
        self, checkpoint_dir: str | Path, output_dir: str | Path, *, with_class_centers: bool, averaged: bool = False
    ) -> Path:
        """Writes the encoder of a checkpoint as a new folder, and returns it; see `hf_export.export_checkpoint`."""
        ...

    def read(self, folder: str | Path) -> tuple[dict[str, Tensor], EncoderSection]:
        """Returns the weights of a published folder, by the names of a one-process encoder, and its configuration.

        Raises:
            CheckpointError: it is another model, or a file is missing or damaged.
        """
        ...


class OneVisionExchange:
    """The OneVision-Encoder as a HuggingFace folder."""

    model_type = MODEL_TYPE

    def export(
        self, checkpoint_dir: str | Path, output_dir: str | Path, *, with_class_centers: bool, averaged: bool = False
    ) -> Path:
        return export_checkpoint(checkpoint_dir, output_dir, with_class_centers=with_class_centers, averaged=averaged)

    def read(self, folder: str | Path) -> tuple[dict[str, Tensor], EncoderSection]:
        weights, values = read_hf_folder(folder)
        config = from_hf_config(values, origin=f"{folder}/config.json")
        return to_mcore(weights, config), config


class PlainExchange:
    """Weights as they are stored, for kinds that nobody publishes: model.safetensors, encoder.json and a README.md."""

    def export(
        self, checkpoint_dir: str | Path, output_dir: str | Path, *, with_class_centers: bool, averaged: bool = False
    ) -> Path:
        facts = read_checkpoint_facts(checkpoint_dir)
        section = encoder_config_of(facts, checkpoint_dir).model_dump(mode="json")
        tensors = {
            key.removeprefix("model."): tensor
            for key, tensor in read_weights(checkpoint_dir, averaged=averaged).items()
        }
        objectives = facts["config"].get("objectives", {})
        learned = "".join(
            f"- {name}: {kinds_of(facts['config']).objectives[one['kind']].describe(one)}\n"
            for name, one in objectives.items()
        )
        card = (
            f"# {facts['config'].get('name', 'encoder')}\n\nAn encoder of kind {section['kind']} after "
            f"{facts['step']:,} steps, with weights under the names that megatron_ove stores. Its configuration is in "
            f"encoder.json. What it learned:\n\n{learned}"
        )
        heads = objectives_with_centers(checkpoint_dir) if with_class_centers else []
        with new_folder(output_dir, error=CheckpointError) as partial:
            for name in heads:
                file = partial / class_centers_path(name)
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(class_centers_file(checkpoint_dir, name))
            (partial / "model.safetensors").write_bytes(save({key: x.contiguous() for key, x in tensors.items()}))
            (partial / "encoder.json").write_text(json.dumps(section, indent=2) + "\n", encoding="utf-8")
            (partial / "README.md").write_text(card, encoding="utf-8")
        logger.info("exported %d tensors to %s", len(tensors), output_dir)
        return Path(output_dir)

    def read(self, folder: str | Path) -> tuple[dict[str, Tensor], EncoderSection]:
        raise CheckpointError(
            f"{folder} cannot be read: encoders of this kind have no published form; start from a checkpoint instead"
        )


def exchange_of(checkpoint_dir: str | Path) -> EncoderExchange:
    """Returns how the encoder of a checkpoint is published.

    Raises:
        CheckpointError: it is not a checkpoint, or its encoder is not known here.
    """
    facts = read_checkpoint_facts(checkpoint_dir, verify=False)
    section = encoder_config_of(facts, checkpoint_dir)
    exchange = kinds_of(facts["config"]).encoders[section.kind].exchange
    return PlainExchange() if exchange is None else exchange()

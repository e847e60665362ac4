"""Exports what an objective of kind text_generation has learned as a model that reads."""

from __future__ import annotations

from pathlib import Path

from megatron_ove.convert.checkpoint_files import read_checkpoint_facts
from megatron_ove.convert.reader_export import export_reader, text_generation_section
from megatron_ove.errors import CheckpointError, ConfigError, DataError
from megatron_ove.objectives.text_generation.text_layout import TextTemplates, tokenizer_at

_TASKS = {"text": "ocr", "captions": "caption", "turns": "ocr"}


def write_reader(checkpoint_dir: str | Path, output_dir: str | Path, objective: str, *, averaged: bool = False) -> Path:
    """Writes encoder, bridge, decoder and tokenizer of a checkpoint as one HuggingFace folder, and returns it.

    Raises:
        CheckpointError: there is no such objective, or the tokenizer that it was trained with is not there.
    """
    facts = read_checkpoint_facts(checkpoint_dir, verify=False)
    section = text_generation_section(facts, objective, checkpoint_dir)
    try:
        tokenizer = tokenizer_at(section.tokenizer_path, section.normalisation)
        templates = TextTemplates(section, tokenizer)
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"the tokenizer of objectives.{objective} cannot be used: {error}") from error
    if section.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise CheckpointError(
            f"{tokenizer.path} is another tokenizer than objectives.{objective} was trained with (fingerprint "
            f"{tokenizer.fingerprint}, not {section.tokenizer_fingerprint}); put the right one there"
        )
    views = [section.view_of(source) for source in section.sources]
    view = "text" if "text" in views else views[0]
    template = {
        "before_images": templates.before_images,
        "after_images": templates.after_images,
        "before_question": templates.before_question,
        "before_answer": templates.before_answer,
        "question": templates.instruction_of(_TASKS[view]),
    }
    return export_reader(
        checkpoint_dir,
        output_dir,
        objective=objective,
        view=view,
        template=template,
        end_token=templates.end_token,
        tokenizer=tokenizer.path.read_bytes(),
        averaged=averaged,
    )

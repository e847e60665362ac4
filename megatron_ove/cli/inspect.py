"""`megatron-ove inspect PATH`: says what a checkpoint, a run folder or a shard set holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "inspect",
        help="describe a checkpoint, a run folder or a shard set",
        description="Describes a checkpoint folder, the newest checkpoint of a run folder, or a shard set.",
    )
    parser.add_argument("path", help="checkpoint (holds manifest.json), run folder, or shard set (holds dataset.json)")
    parser.add_argument("--verify", action="store_true", help="also read every file and check its content")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table; returns 0, or 2 where --verify found damage."""
    from megatron_ove.checkpoint.manifest import MANIFEST_NAME, list_checkpoints
    from megatron_ove.errors import DataError

    path = Path(arguments.path)
    if not path.exists():
        raise DataError(f"{path} does not exist, so there is nothing to describe; check the path")
    if (path / "dataset.json").exists():
        return _print(f"shard set {path}", *_describe_shard_set(path, verify=arguments.verify))
    if not (path / MANIFEST_NAME).exists():
        for folder in (path, path / "checkpoints"):
            checkpoints = list_checkpoints(folder)
            if checkpoints:
                path = checkpoints[0][1]
                break
        else:
            raise DataError(
                f"{path} holds neither {MANIFEST_NAME} (a checkpoint), nor step_... folders (a run), nor dataset.json "
                "(a shard set), so there is nothing to describe; check the path"
            )
    return _print(f"checkpoint {path}", *_describe_checkpoint(path, verify=arguments.verify))


def _describe_checkpoint(path: Path, *, verify: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns what to print and what is wrong."""
    from megatron_ove.checkpoint.manager import read_common_state
    from megatron_ove.checkpoint.manifest import checksum_problem, read_manifest, structural_problem

    problem = structural_problem(path)
    if problem is not None:
        return {}, [problem]
    manifest = read_manifest(path)
    if verify:
        found = [checksum_problem(path, name, entry) for name, entry in manifest["files"].items()]
        problems = [text for text in found if text]
        if problems:
            return {}, problems
    common = read_common_state(path)
    config = common["config"]
    encoder, parallel = config["encoder"], config["parallel"]
    rows: dict[str, Any] = {
        "run": config["name"],
        "step": f"{common['step']} of {config['train']['num_steps']}",
        "samples seen": f"{common['train_state']['samples_seen']:,}",
        "size": _size(sum(entry["size"] for entry in manifest["files"].values()), len(manifest["files"])),
        "written by": f"{manifest.get('world_size', '?')} processes: tensor {parallel['tensor_model_parallel_size']}, "
        f"pipeline {parallel['pipeline_model_parallel_size']}",
        "precision": config["train"]["precision"],
        "encoder": f"{encoder['num_layers']} layers, hidden {encoder['hidden_size']}, "
        f"{encoder['num_attention_heads']} heads, mlp {encoder['ffn_hidden_size']}, patch {encoder['patch_size']}",
    }
    return rows | _count_parameters(path, config), []


def _count_parameters(path: Path, config: dict[str, Any]) -> dict[str, str]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    sizes = {name: item.size for name, item in metadata.items() if isinstance(item, TensorStorageMetadata)}
    encoder = sum(size.numel() for name, size in sizes.items() if name.startswith("model."))
    rows = {"encoder parameters": f"{encoder:,}"}
    for name, objective in config["objectives"].items():
        table = sizes.get(f"objectives.{name}.weight")
        shape = f"{table[0]:,} classes x {table[1]} = {table.numel():,}" if table else "absent"
        rows[f"class centers of {name}"] = f"{shape} (source {objective['source']})"
    return rows


def _describe_shard_set(path: Path, *, verify: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns what to print and what is wrong."""
    from megatron_ove.data.shard_index import ShardSet, validate_shard_set

    problems = validate_shard_set(path, deep=verify)
    if problems:
        return {}, problems
    shards = ShardSet.open(path)
    info = shards.info
    files = [file for file in path.rglob("*") if file.is_file()]
    patches, labels = shards.num_patches, (shards.labels >= 0).sum(axis=1)
    return {
        "kind": info.kind,
        "samples": f"{info.num_samples:,}",
        "classes": f"{info.num_classes:,}",
        "labels per sample": f"{labels.min()} to {labels.max()} of {info.label_width}",
        "patches per sample": f"{patches.min()} to {patches.max()}, mean {patches.mean():.1f}",
        "members": ", ".join(info.members) if len(info.members) < 8 else f"{len(info.members)} files per sample",
        "size": _size(sum(file.stat().st_size for file in files), len(files)),
    }, []


def _size(num_bytes: int, num_files: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB in {num_files} files"


def _print(title: str, rows: dict[str, Any], problems: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if problems:
        for problem in problems:
            console.print(Text(f"{title}: {problem}"), soft_wrap=True)
        return 2
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    console.print(table)
    return 0

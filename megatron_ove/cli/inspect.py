"""`megatron-ove inspect PATH`: says what a checkpoint, run folder or shard set holds, or how a run will be packed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ove.vocabulary import VOCABULARY_FILE, vocabulary_path

_SIZES = {"num_attention_heads": "heads", "ffn_hidden_size": "mlp"}
"""Fields of encoders that are worth a word, where they have them."""

_SAMPLES = 24

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_ove.planning.packing_report import PackingFigures
    from megatron_ove.report.set_statistics import Distribution, SetStatistics
    from megatron_ove.shards.shard_set import ShardSet


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "inspect",
        help="describe a checkpoint, a run folder, a shard set, or how a configuration packs its samples",
        description="Describes a checkpoint folder, the newest checkpoint of a run folder, or a shard set. Of a "
        "configuration: how full its microbatches will be, and with which token budgets.",
    )
    parser.add_argument(
        "path", help="checkpoint (holds manifest.json), run folder, shard set (holds dataset.json), or YAML file"
    )
    parser.add_argument("--verify", action="store_true", help="also read every file and check its content")
    parser.add_argument(
        "--page",
        metavar="FILE.html",
        help="of a shard set: also write a page with samples, their labels, texts and boxes, and statistics; it needs "
        "no other file",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help=f"of the page: samples, drawn evenly over the set (default: {_SAMPLES}, or none where --key names some)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the page: draws other samples (default: 0)")
    parser.add_argument("--key", nargs="+", metavar="KEY", help="of the page: show the samples of these keys, first")
    parser.add_argument(
        *("--replicas", "-r"),
        **{"type": int, "nargs": "+", "default": [1, 2, 4, 8], "metavar": "N"},
        help="of a configuration: data-parallel sizes (default: 1 2 4 8)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=20,
        metavar="N",
        help="of a configuration: first steps that are planned (default: 20)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table; returns 0, or 2 where --verify found damage."""
    from megatron_ove.checkpoint.manifest import MANIFEST_NAME, checkpoints_at
    from megatron_ove.errors import DataError

    path = Path(arguments.path)
    if not path.exists():
        raise DataError(f"{path} does not exist, so there is nothing to describe; check the path")
    _check_page_options(arguments)
    if (path / "dataset.json").exists() or (path / "parts").is_dir():  # parts that wait to be joined have a sentence
        return _describe_shard_set(arguments)
    if arguments.page is not None:
        raise DataError(f"--page shows samples, and {path} is no shard set (it holds no dataset.json); leave it out")
    if path.suffix in (".yaml", ".yml"):
        return _describe_packing(arguments)
    if not (path / MANIFEST_NAME).exists():
        checkpoints = [folder for folder in checkpoints_at(path) if folder != path]
        if not checkpoints:
            raise DataError(
                f"{path} holds neither {MANIFEST_NAME} (a checkpoint), nor step_... folders (a run), nor dataset.json "
                "(a shard set), so there is nothing to describe; check the path"
            )
        path = checkpoints[0]
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
        problems = problems or _moment_problems(path)
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
        "encoder": f"{encoder['kind']}, {encoder['num_layers']} layers, hidden {encoder['hidden_size']}, "
        + "".join(f"{text} {encoder[field]}, " for field, text in _SIZES.items() if field in encoder)
        + f"patch {encoder['patch_size']}",
    }
    if common.get("initialized_from"):
        rows["started with"] = f"weights of {common['initialized_from']}"
    return rows | _count_parameters(path, config), []


def _moment_problems(path: Path) -> list[str]:
    """Compares the encoder's master weights with its weights, a tensor at a time."""
    import torch

    from megatron_ove.checkpoint.compatibility import shifted_moments_clause
    from megatron_ove.convert.checkpoint_files import layer_in_stack, read_tensors

    prefix = "optimizer.state.param."
    masters = [name.removeprefix(prefix) for name in _stored_sizes(path) if name.startswith(prefix)]
    # Where some layers are frozen the master weights of the others are apart, and the weights one stack as always.
    places = sorted((*layer_in_stack(key), key) for key in masters)
    for stack, of_stack in groupby(places, key=lambda place: place[0]):
        stored = read_tensors(path, stack)[stack]
        for _, layer, key in of_stack:
            master, weights = read_tensors(path, prefix + key)[prefix + key], stored if layer is None else stored[layer]
            if not torch.allclose(master.to(weights.dtype), weights, rtol=0, atol=0, equal_nan=True):
                advice = f"a run cannot continue with it; start a new one with init_from: {path}"
                return [f"{shifted_moments_clause(key.removeprefix('model.'))}; the weights are right, but {advice}"]
    return []


def _count_parameters(path: Path, config: dict[str, Any]) -> dict[str, str]:
    from megatron_ove.config.objectives import source_names
    from megatron_ove.convert.class_centers import load_words

    sizes = _stored_sizes(path)
    encoder = sum(size.numel() for name, size in sizes.items() if name.startswith("model."))
    rows = {"encoder parameters": f"{encoder:,}"}
    for name, objective in config["objectives"].items():
        words = load_words(path, name)
        if words is not None:
            rows[f"words of {name}"] = f"{len(words):,} ({vocabulary_path(name)})"
        table, sources = sizes.get(f"objectives.{name}.weight"), ", ".join(source_names(objective))
        if table:
            rows[f"class centers of {name}"] = (
                f"{table[0]:,} classes x {table[1]} = {table.numel():,} (source {sources})"
            )
        modules = sum(size.numel() for key, size in sizes.items() if key.startswith(f"modules.{name}."))
        if modules or not table:
            rows[f"parameters of {name}"] = f"{modules:,} ({objective['kind']}, source {sources})"
    return rows


def _stored_sizes(path: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from megatron_ove.checkpoint.trust import read_metadata

    metadata = read_metadata(path).state_dict_metadata
    return {name: item.size for name, item in metadata.items() if isinstance(item, TensorStorageMetadata)}


def _check_page_options(arguments: argparse.Namespace) -> None:
    """Raises DataError for options of the page that cannot be, or that nothing would read."""
    from megatron_ove.errors import DataError
    from megatron_ove.report.set_page import MAX_SAMPLES

    of_page = {"--samples": arguments.samples, "--seed": arguments.seed, "--key": arguments.key}
    given = [name for name, value in of_page.items() if value is not None]
    if arguments.page is None:
        if given:
            raise DataError(f"{given[0]} says what a page shows, and no page is asked for; add --page FILE.html")
        return
    if Path(arguments.page).suffix.lower() not in (".html", ".htm"):
        raise DataError(f"--page {arguments.page} does not end in .html, as a page does; give another name")
    count = len(arguments.key or ()) + (arguments.samples or 0)
    if count > MAX_SAMPLES or (arguments.samples or 0) < 0:
        raise DataError(
            f"--samples and --key ask for {count:,} samples, but a page that a browser can show has 0 to "
            f"{MAX_SAMPLES:,}; ask for fewer"
        )
    if (arguments.seed or 0) < 0:
        raise DataError(f"--seed {arguments.seed} is below 0; give a whole number from 0 on")


def _describe_shard_set(arguments: argparse.Namespace) -> int:
    """Prints a table, or what is wrong, and writes the page if one is asked for."""
    from megatron_ove.errors import DataError
    from megatron_ove.report.set_statistics import measure_shard_set
    from megatron_ove.shards.shard_set import ShardSet
    from megatron_ove.shards.validation import validate_shard_set

    path = Path(arguments.path)
    problems = validate_shard_set(path, deep=arguments.verify)
    if problems and arguments.page is None:
        return _print(f"shard set {path}", {}, problems)
    try:
        shards = ShardSet.open(path)
    except DataError:  # then this is what the problems are
        left_out = f"{arguments.page} was not written, because the set cannot be opened"
        return _print(f"shard set {path}", {}, [*problems, left_out])
    try:
        vocabulary = shards.read_vocabulary()
    except DataError:  # it is among the problems
        vocabulary = None
    words, statistics = None if vocabulary is None else vocabulary.words, measure_shard_set(shards)
    if arguments.page is not None:
        _write_page(arguments, shards, statistics, words, problems)
    rows = {} if problems else _rows_of_set(shards, statistics, words)
    return _print(f"shard set {path}", rows, problems)


def _write_page(
    arguments: argparse.Namespace,
    shards: ShardSet,
    statistics: SetStatistics,
    words: Sequence[str] | None,
    problems: Sequence[str],
) -> None:
    from megatron_ove.report.set_page import draw_rows, find_rows, write_set_page

    named = find_rows(shards, arguments.key or ())
    count = arguments.samples if arguments.samples is not None else (0 if named else _SAMPLES)
    drawn = draw_rows(len(shards), count, arguments.seed or 0)
    page = write_set_page(
        shards,
        arguments.page,
        statistics=statistics,
        rows=list(dict.fromkeys([*named, *drawn])),
        words=words,
        problems=problems,
        was_verified=arguments.verify,
    )
    sys.stdout.write(f"{page}\n")


def _rows_of_set(shards: ShardSet, statistics: SetStatistics, words: Sequence[str] | None) -> dict[str, str]:
    from megatron_ove.report.set_page import share_sentences
    from megatron_ove.report.set_samples import label_word

    info = shards.info
    files = [file for file in shards.directory.rglob("*") if file.is_file()]
    rows = {"kind": info.kind, "samples": f"{info.num_samples:,}"}
    if info.has_pages:
        rows["pages"] = f"{info.num_pages:,}"
    if info.num_classes:
        rows["classes"] = f"{info.num_classes:,}"
    if words is not None:
        rows["words"] = f"{len(words):,} ({VOCABULARY_FILE})"
    elif info.kind == "ocr":
        rows["words"] = f"not known: it holds no {VOCABULARY_FILE}"
    if info.label_width:
        rows["label slots"] = f"{info.label_width} a sample"
    where = f", in {statistics.num_parts:,} parts" if statistics.num_parts else ""
    rows["shards"] = f"{statistics.num_shards:,}, {statistics.shard_bytes / 2**20:,.1f} MiB{where}"
    rows["members"] = ", ".join(info.members) if len(info.members) < 8 else f"{len(info.members)} files per sample"
    rows["size"] = _size(sum(file.stat().st_size for file in files), len(files))
    rows |= {one.name: _spread(one) for one in statistics.distributions}
    if statistics.labels and statistics.labels.most_common:
        common = [f"{label_word(label, words)} ({n:,})" for label, n in statistics.labels.most_common[:10]]
        rows["most common classes"] = ", ".join(common)
    rows["shares"] = " ".join(share_sentences(statistics))
    rows["statistics"] = statistics.basis
    return {name: text for name, text in rows.items() if text}


def _spread(one: Distribution) -> str:
    from megatron_ove.report.curves import format_number

    low, middle, mean, high = map(format_number, (one.minimum, one.median, one.mean, one.maximum))
    return low if low == high else f"{low} to {high}, median {middle}, mean {mean}"


def _describe_packing(arguments: argparse.Namespace) -> int:
    """Prints how full the microbatches of a configuration's first steps are, with its token budget and others."""
    from megatron_ove.config.loader import load_config
    from megatron_ove.data.class_counts import fill_in_class_counts
    from megatron_ove.errors import ConfigError

    if min(arguments.steps, *arguments.replicas) < 1:
        raise ConfigError("--steps and --replicas count something; give numbers of at least 1")
    config = fill_in_class_counts(load_config(arguments.path), arguments.path)

    import torch
    from rich.console import Console
    from rich.text import Text

    from megatron_ove.data.build import build_source, open_shard_sets
    from megatron_ove.planning.packing_report import largest_sample, measure_packing, nearby_budgets

    shard_sets, patch = open_shard_sets(config), config.encoder.patch_size
    sources = [
        build_source(
            name,
            source,
            shard_sets[name],
            kinds=config.kinds,
            patch_size=patch,
            device=torch.device("cpu"),
            num_threads=1,
        )
        for name, source in config.data.sources.items()
    ]
    replicas, steps, own = sorted(set(arguments.replicas)), arguments.steps, config.data.tokens_per_microbatch
    largest = largest_sample(config, sources, num_steps=steps)
    budgets = nearby_budgets(own, largest=largest, multiple=config.token_multiple)
    figures = [
        [measure_packing(config, sources, budget=budget, replicas=n, num_steps=steps) for n in replicas]
        for budget in budgets
    ]
    console = Console()
    console.print(Text(f"{config.name}: the first {steps} steps, largest sample {largest:,} patches"))
    console.print(_packing_table(figures[budgets.index(own)]))
    if len(figures[0][0].fullness) > 1:
        console.print(_fullness_table(figures[budgets.index(own)]))
    console.print(_budget_table(figures, own))
    return 0


def _packing_table(figures: Sequence[PackingFigures]) -> Table:
    from rich.table import Table

    table = Table(title=f"tokens_per_microbatch = {figures[0].budget}", title_justify="left")
    for heading in ("replicas", "microbatches each", "patches of one", "padding", "worst step", "attention waits"):
        table.add_column(heading, justify="right")
    for one in figures:
        shares = (one.padding, one.worst_padding, one.attention_imbalance)
        counts = (str(one.replicas), f"{one.microbatches:.1f}", f"{one.length:,.0f}")
        table.add_row(*counts, *(f"{share:.1%}" for share in shares))
    return table


def _fullness_table(figures: Sequence[PackingFigures]) -> Table:
    from rich.table import Table

    table = Table(title="how full microbatches are of each budget", title_justify="left")
    table.add_column("budget")
    for one in figures:
        table.add_column(f"{one.replicas} replica{'s' if one.replicas > 1 else ''}", justify="right")
    for name in figures[0].fullness:
        table.add_row(name, *(f"{one.fullness[name]:.1%}" for one in figures))
    table.caption = "the fullest one decides how many microbatches a step has"
    return table


def _budget_table(figures: Sequence[Sequence[PackingFigures]], own: int) -> Table:
    from rich.table import Table

    table = Table(title="padding with other token budgets", title_justify="left")
    table.add_column("tokens_per_microbatch", justify="right")
    for one in figures[0]:
        table.add_column(f"{one.replicas} replica{'s' if one.replicas > 1 else ''}", justify="right")
    least = [min(one.padding for one in column) for column in zip(*figures, strict=True)]
    for row in figures:
        shown = (
            f"{one.padding:.1%}{' *' if one.padding == best else ''}" for one, best in zip(row, least, strict=True)
        )
        table.add_row(f"{row[0].budget}{' (now)' if row[0].budget == own else ''}", *shown)
    table.caption = "* least of its column"
    return table


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

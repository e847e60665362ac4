"""Does an encoder that learns to write forget what it saw before, and does reconstruction keep it from that?

    python examples/unit_small/run.py --seed 1 --json unit_1.json
    python examples/unit_small/run.py --summary unit_1.json unit_2.json unit_3.json

Trains a small encoder on concepts of composed pictures, then goes on from it three times, with as many strips of words
and the same steps: text alone (the control), text and captions, and UNIT: text, captions and reconstruction of the
frozen encoder's features. Measures what is left of the concepts and what was learned of reading. --summary prints the
mean of several seeds with 95 % intervals. README.md has the results.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
MARKER = "made_by_unit_small"
NUM_PROCESSES = 2
ARMS = ("text_only", "captions", "unit")
NUM_WORDS = 300
LOOKS = ("--looks", "fixed", "aligned", "--pages=0")

Figures = dict[str, dict[str, float]]


class Sizes(argparse.Namespace):
    """Pictures and strips for training, pictures and strips held out, steps of each part."""


FULL = Sizes(pictures=12_000, strips=20_000, held_out=1000, steps=300)
TINY = Sizes(pictures=300, strips=200, held_out=100, steps=6)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of pictures, strips and initial weights")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/unit_small", help="default: runs/unit_small")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--summary", type=Path, nargs="+", metavar="JSON", help="only print the mean of these files")
    arguments = parser.parse_args(argv)
    if arguments.summary:
        print_summary([json.loads(path.read_text(encoding="utf-8"))["figures"] for path in arguments.summary])
        return 0
    if arguments.json is None:
        parser.error("--json is missing: give a file for the figures")
    run_dir, sizes = arguments.run_dir.resolve(), TINY if arguments.tiny else FULL
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / MARKER).exists():
        sys.exit(f"{run_dir} holds files that no earlier run of this recipe made; give another --run-dir")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    (run_dir / MARKER).touch()

    start = time.perf_counter()
    make_sets(run_dir, sizes, arguments.seed)
    train("concepts", run_dir, sizes, arguments.seed)
    for arm in ARMS:
        train(arm, run_dir, sizes, arguments.seed)
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch|transformers)\b")
    figures = measure(run_dir, sizes.steps)
    seconds = time.perf_counter() - start
    result = {"seed": arguments.seed, "seconds": round(seconds), "figures": figures}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_summary([figures])
    print(f"{seconds / 60:.1f} min in all; figures: {arguments.json}")
    return 0


def make_sets(run_dir: Path, sizes: Sizes, seed: int) -> None:
    """Makes pictures with concepts, others with captions, strips, the tokenizer and the token caches; held-out sets are
    the same for every seed."""
    data = run_dir / "data"
    write_pictures(data / "concepts", sizes.pictures, 3 * seed + 1, kind="image")
    write_pictures(data / "pictures", sizes.pictures, 3 * seed + 2, kind="document")
    write_pictures(data / "concepts_held_out", sizes.held_out, 0, kind="image")
    make = "text_render/make_word_pages.py"
    tool(make, data / "strips", f"--words={NUM_WORDS}", f"--count={sizes.strips}", f"--seed={seed}", *LOOKS,
         "--documents", f"--workers={NUM_PROCESSES}")  # fmt: skip
    words = data / "strips/vocabulary.json"
    tool(make, data / "strips_held_out", f"--vocabulary={words}", f"--count={sizes.held_out}", "--seed=0", *LOOKS,
         "--documents", "--typefaces=siblings", f"--workers={NUM_PROCESSES}")  # fmt: skip
    tokenizer = run_dir / "tokenizer"
    tool("documents/train_tokenizer.py", data / "strips", "--output", tokenizer, "--vocab-size=257")
    for name in ("strips", "strips_held_out", "pictures"):
        tool("documents/cache_tokens.py", data / name, "--tokenizer", tokenizer)


def write_pictures(folder: Path, count: int, seed: int, *, kind: str) -> None:
    """Writes composed pictures: with their concept (image) or with their captions (document)."""
    from composed import NUM_CONCEPTS, compose

    from megatron_ove.preprocess.file_runs import show_progress
    from megatron_ove.preprocess.pictures import encode_jpeg
    from megatron_ove.shards.documents import Document
    from megatron_ove.shards.format import DOCUMENT_MEMBER, page_member
    from megatron_ove.shards.writer import ShardWriter

    shape = {"kind": "image", "num_classes": NUM_CONCEPTS, "label_width": 1} if kind == "image" else {"kind": kind}
    with ShardWriter(folder, **shape) as writer, ProcessPoolExecutor(NUM_PROCESSES) as pool:
        composed = pool.map(functools.partial(compose, seed), range(count), chunksize=64)
        for number, made in enumerate(show_progress(composed, title=f"composing {folder.name}", total=count)):
            jpeg = encode_jpeg(made.pixels, full_chroma=True)
            if kind == "image":
                writer.add(f"picture{number:06d}", {"jpg": jpeg}, np.array([made.concept]))
            else:
                document = Document(captions=made.captions).encode()
                writer.add(f"picture{number:06d}", {DOCUMENT_MEMBER: document, page_member(0): jpeg})


def tool(name: str, *arguments: object) -> None:
    """Runs one of the project's tools."""
    run(sys.executable, f"tools/{name}", *map(str, arguments))


def train(name: str, run_dir: Path, sizes: Sizes, seed: int) -> None:
    """Trains the concepts, or one arm from them."""
    data, concepts = run_dir / "data", run_dir / "concepts"
    settings = {"seed": seed, "run_dir": run_dir / name, "train.num_steps": sizes.steps}
    settings |= {"optim.schedule.warmup_steps": min(50, sizes.steps // 3), "checkpoint.interval_steps": sizes.steps}
    if name == "concepts":
        settings["data.sources.pictures.path"] = data / "concepts"
    else:
        settings |= {"init_from": json.dumps([{"path": str(concepts), "parts": ["encoder"]}])}
        settings |= {"objectives.write.tokenizer": run_dir / "tokenizer", "data.sources.strips.path": data / "strips"}
        settings |= {"evaluation.sets.write": data / "strips_held_out"}
        settings |= {"evaluation.interval_steps": max(1, sizes.steps // 2)}
    if name in ("captions", "unit"):
        settings["data.sources.pictures.path"] = data / "pictures"
    if name == "unit":
        settings["objectives.keep.teacher.path"] = concepts
    command = [sys.executable, "-m", "megatron_ove", "train", str(HERE / f"{name}.yaml"), f"--nproc={NUM_PROCESSES}"]
    run(*command, *(part for field, value in settings.items() for part in ("--set", setting(field, value))))


def setting(field: str, value: object) -> str:
    """Returns an override; a path may be called anything, also what YAML reads otherwise."""
    return f"{field}={json.dumps(str(value)) if isinstance(value, Path) else value}"


def run(*command: str) -> None:
    """Runs a program in view of the user; ends with its status if it fails."""
    print("$", " ".join(command), flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    if status:
        sys.exit(status)


def measure(run_dir: Path, steps: int) -> Figures:
    """Returns untrained, concepts and each arm -> how often the nearest other held-out picture and the nearest class
    center are of the picture's concept, and of the arms what they read on held-out strips."""
    from megatron_ove.convert.class_centers import load_class_head

    concepts, last = run_dir / "concepts/checkpoints", f"step_{steps:08d}"
    head = load_class_head(concepts / last, "concepts")
    checkpoints = {"untrained": concepts / "step_00000000", "concepts": concepts / last}
    checkpoints |= {arm: run_dir / arm / "checkpoints" / last for arm in ARMS}
    figures: Figures = {}
    for name, checkpoint in checkpoints.items():
        figures[name] = concepts_known(checkpoint, head, run_dir / "data/concepts_held_out")
        if name in ARMS:
            rows = (run_dir / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            held_out = [row for row in map(json.loads, rows) if "held_out/write/character_error_rate" in row][-1]
            figures[name]["character_error_rate"] = held_out["held_out/write/character_error_rate"]
            figures[name]["kept"] = figures[name]["neighbour"] / figures["concepts"]["neighbour"]
    return figures


def concepts_known(checkpoint: Path, head, shards: Path) -> dict[str, float]:
    """Returns how often a held-out picture's nearest other picture, and nearest class center, are of its concept."""
    import torch

    from megatron_ove.convert.encoder_inference import load_encoder_for_inference
    from megatron_ove.evaluation.embedding import SampleSettings, embed_shard_set
    from megatron_ove.evaluation.retrieval import group_retrieval, label_retrieval
    from megatron_ove.parallel.topology import destroy_topology
    from megatron_ove.shards.shard_set import ShardSet

    encoder, config = load_encoder_for_inference(checkpoint)

    @torch.inference_mode()
    def encode(batch):
        return encoder(batch.main).sample_embeddings(batch.num_samples)

    settings = SampleSettings(patch_size=config.patch_size, image_size=56)
    embedded = embed_shard_set(encode, ShardSet.open(shards), settings)
    destroy_topology()
    groups = [str(int(label)) for label in embedded.labels[:, 0]]
    return {
        "neighbour": group_retrieval(embedded.embeddings, groups, k=10)["recall_at_1"],
        "center": label_retrieval(embedded.embeddings, head, embedded.labels, k=10)["first_right"],
    }


def print_summary(results: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    """Prints means over seeds, with the half width of Student's 95 % interval where there are several."""
    columns = ("neighbour", "center", "kept", "character_error_rate")
    print(f"{'':12}" + "".join(f"{name:>22}" for name in columns))
    for row in results[0]:
        cells = [[result[row][name] for result in results if name in result[row]] for name in columns]
        print(f"{row:12}" + "".join(f"{mean_of(values):>22}" for values in cells))


def mean_of(values: Sequence[float]) -> str:
    """Writes a mean and its interval."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    from scipy.stats import t as student_t

    width = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} +- {width:.3f}"


if __name__ == "__main__":
    sys.exit(main())

"""Teaches a small encoder to read 300 words on two CPU cores, and tests it on typefaces it has never seen.

    python examples/read_words/run.py --seed 1 --json read_words.json
    python examples/read_words/run.py --seed 1 --json control.json --control

Makes the pictures, trains in two parts (strips of one word first, then pages with several among them), and measures the
untrained and the trained encoder on sets that are the same for every seed. With --control every training picture gets
the words of another one: what is learned then is chance. The figures go to the JSON file; a picture of held-back pages
with the words read on them, and the curve, go to the run folder. README.md has the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("config.yaml")
MARKER = "made_by_read_words"
NUM_WORDS, NUM_PROCESSES = 300, 2
OBJECTIVE = "words"

EASY = ("--looks", "fixed=0.5", "aligned", "anywhere", "coloured", "--pages=0")
HARD = ("--looks", "anywhere=0.5", "coloured", "--pages=0.4")
STRIP, PAGE = ("--looks", "coloured", "--pages=0"), ("--looks", "coloured", "--pages=1")
DRAWN, NUM_DRAWN = ("strips_siblings", "pages_siblings"), 18
# Made alike for every seed of a run; a set's own seed is its place in this table.
TESTS = {
    "strips_train": (*STRIP, "--typefaces=train"),
    "strips_siblings": (*STRIP, "--typefaces=siblings"),
    "strips_families": (*STRIP, "--typefaces=families"),
    "pages_train": (*PAGE, "--typefaces=train"),
    "pages_siblings": (*PAGE, "--typefaces=siblings"),
    "pages_families": (*PAGE, "--typefaces=families"),
}


class Sizes(argparse.Namespace):
    """How much is made and trained: `easy` and `hard` pictures, `test` ones a set, steps in all and before pages."""


FULL = Sizes(easy=40_000, hard=60_000, test=500, steps=2000, first_steps=600)
TINY = Sizes(easy=400, hard=300, test=24, steps=6, first_steps=3)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of training pictures and initial weights")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--control", action="store_true", help="train with the words of other pictures")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/read_words", help="default: runs/read_words")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args(argv)
    run_dir = arguments.run_dir.resolve()
    sizes = TINY if arguments.tiny else FULL
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / MARKER).exists():
        sys.exit(f"{run_dir} holds files that no earlier run of this recipe made; give another --run-dir")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    (run_dir / MARKER).touch()

    start = time.perf_counter()
    seconds: dict[str, float] = {}
    make_sets(run_dir / "data", sizes, seed=arguments.seed, control=arguments.control)
    seconds["pictures"] = time.perf_counter() - start
    train(run_dir, sizes, arguments.seed)
    seconds["training"] = time.perf_counter() - start - sum(seconds.values())
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch)\b")
    figures = measure(run_dir, sizes.steps)
    seconds["evaluation"] = time.perf_counter() - start - sum(seconds.values())
    curve = read_curve(run_dir)
    draw_curve(curve, sizes.first_steps, run_dir / "curve.png")
    result = {
        "seed": arguments.seed,
        "control": arguments.control,
        "samples": sizes.steps * 128,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "figures": figures,
        "curve": curve,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_table(figures)
    print(f"{sum(seconds.values()) / 60:.1f} min in all; figures: {arguments.json}, pages read: {run_dir}/*.png")
    return 0


def make_sets(folder: Path, sizes: Sizes, *, seed: int, control: bool) -> None:
    """Makes two training sets from the run's seed, and test sets from fixed ones, all with the same words."""
    dealt = ["--control"] if control else []
    make(folder / "easy", sizes.easy, 1000 + 2 * seed, [f"--words={NUM_WORDS}", *EASY, *dealt])
    words = f"--vocabulary={folder / 'easy/vocabulary.json'}"
    make(folder / "hard", sizes.hard, 1001 + 2 * seed, [words, *HARD, *dealt])
    for place, (name, options) in enumerate(TESTS.items()):
        make(folder / name, sizes.test, place, [words, *options])


def make(target: Path, count: int, seed: int, options: Sequence[str]) -> None:
    """Makes one set on all cores."""
    command = ["tools/text_render/make_word_pages.py", str(target), f"--count={count}", f"--seed={seed}"]
    run(sys.executable, *command, f"--workers={NUM_PROCESSES}", *options)


def train(run_dir: Path, sizes: Sizes, seed: int) -> None:
    """Trains on strips, then goes on with strips and pages: the same run, resumed with other data."""
    data = run_dir / "data"
    settings = [f"seed={seed}", setting("run_dir", run_dir), f"train.num_steps={sizes.steps}"]
    settings += [setting(f"evaluation.sets.{OBJECTIVE}", data / "strips_siblings")]
    settings += [f"optim.schedule.warmup_steps={min(200, sizes.steps // 3)}"]
    command = [sys.executable, "-m", "megatron_ove", "train", str(CONFIG), f"--nproc={NUM_PROCESSES}"]
    for more in (
        [setting("data.sources.pages.path", data / "easy"), f"train.stop_after_steps={sizes.first_steps}"],
        [setting("data.sources.pages.path", data / "hard")],
    ):
        run(*command, *(part for setting in (*settings, *more) for part in ("--set", setting)))


def setting(field: str, path: Path) -> str:
    """Returns an override; a path may be called anything, also what YAML reads otherwise."""
    return f"{field}={json.dumps(str(path))}"


def run(*command: str) -> None:
    """Runs a program in view of the user; ends with its status if it fails."""
    print("$", " ".join(command), flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    if status:
        sys.exit(status)


def measure(run_dir: Path, steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """Returns "untrained" and "trained" -> test set -> figures, and draws pages of two sets."""
    # Imported late: torch and megatron-core are not needed before.
    from megatron_ove.evaluation.embedding import embed_shard_set
    from megatron_ove.evaluation.pages_read import choose_pages, draw_pages, read_pages
    from megatron_ove.evaluation.retrieval import label_retrieval, sample_retrieval
    from megatron_ove.evaluation.words import load_word_reader
    from megatron_ove.parallel.topology import destroy_topology
    from megatron_ove.shards.shard_set import ShardSet

    figures: dict[str, dict[str, dict[str, float]]] = {}
    for stage, step in (("untrained", 0), ("trained", steps)):
        reader = load_word_reader(run_dir / "checkpoints" / f"step_{step:08d}")
        figures[stage] = {}
        for name in TESTS:
            shards = ShardSet.open(run_dir / "data" / name)
            embedded = embed_shard_set(reader.encode, shards, reader.settings)
            words = label_retrieval(embedded.embeddings, reader.head, embedded.labels, k=10)
            pages = sample_retrieval(embedded.embeddings, reader.head, embedded.labels, k=10)
            figures[stage][name] = {**words, **{f"word_to_pages_{key}": value for key, value in pages.items()}}
            if stage == "trained" and name in DRAWN:
                rows = choose_pages(embedded, NUM_DRAWN)
                read = read_pages(embedded, rows, reader.head, reader.vocabulary)
                draw_pages(shards, rows, read, run_dir / f"{name}.png")
        destroy_topology()
    return figures


def read_curve(run_dir: Path) -> dict[str, list[list[float]]]:
    """Returns the loss and the held-out mean average precision as lists of [step, value]."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {"loss": f"loss/{OBJECTIVE}", "held_out": f"held_out/{OBJECTIVE}/mean_average_precision"}
    return {
        name: [[row["step"], round(row[key], 4)] for row in rows if row.get(key) is not None]
        for name, key in names.items()
    }


def draw_curve(curve: dict[str, list[list[float]]], first_steps: int, path: Path) -> None:
    """Draws the loss and the held-out figure over steps, with the step from which pages are among the strips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), dpi=110)
    axes.plot(*zip(*curve["loss"], strict=True), color="#c2571a", label="training loss")
    axes.axvline(first_steps, color="#888888", linewidth=0.8, linestyle="--")
    axes.annotate("pages from here on", (first_steps, axes.get_ylim()[1]), (4, -12), textcoords="offset points", size=8)
    axes.set(xlabel="step of 128 pictures", ylabel="loss", ylim=(0, None))
    held_out = axes.twinx()
    held_out.plot(*zip(*curve["held_out"], strict=True), "o-", color="#14785a", label="words in unseen typefaces, mAP")
    held_out.set(ylim=(0, 1), ylabel="mean average precision")
    figure.legend(loc="upper center", ncol=2, frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.08, right=0.91, top=0.88, bottom=0.15)
    figure.savefig(path)


def print_table(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """Prints page to words, first right and word to pages, each with its chance."""
    shown = {
        "page -> words": "mean_average_precision",
        "first right": "first_right",
        "word -> pages": "word_to_pages_mean_average_precision",
    }
    print(f"{'':18}" + "".join(f"{title:>28}" for title in shown))
    print(f"{'':18}" + "  untrained  trained  chance" * len(shown))
    for name in TESTS:
        before, after = (figures[stage][name] for stage in ("untrained", "trained"))
        cells = []
        for key in shown.values():
            chance = after[
                key.replace("word_to_pages_", "word_to_pages_chance_") if key.startswith("word") else f"chance_{key}"
            ]
            cells.append(f"{before[key]:11.3f}{after[key]:9.3f}{chance:8.3f}")
        print(f"{name:18}" + "".join(cells))


if __name__ == "__main__":
    sys.exit(main())

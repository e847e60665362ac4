"""Teaches a small decoder to write down the words that an encoder sees, and tests it on words it has never seen.

    python examples/read_lines/run.py --seed 1 --json read_lines.json
    python examples/read_lines/run.py --seed 1 --json control.json --control

Starts from the encoder of examples/read_words (--encoder). Strips of some 8,000 words and 23,000 misspelt ones train
it; 500 other words are held out with all their misspellings, and so are typefaces. With --control every training strip
gets the word of another one: what is learned then is which words there are. The figures go to the JSON file, the curve
to the run folder. README.md has the results.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("config.yaml")
MARKER = "made_by_read_lines"
NUM_PROCESSES = 2
OBJECTIVE = "read"
LOOKS = ("--looks", "fixed=0.25", "aligned=0.5", "anywhere=0.75", "coloured=1.5", "--pages=0")
TEST_LOOKS = ("--looks", "coloured", "--pages=0")
# Test set -> (its words, its typefaces); made alike for every seed of a run.
TESTS = {
    "seen_words": ("words", "train"),
    "unseen_words": ("unseen", "train"),
    "unseen_words_siblings": ("unseen", "siblings"),
    "unseen_words_families": ("unseen", "families"),
    "scrambled": ("scrambled", "train"),
}


class Sizes(argparse.Namespace):
    """Words held out, strips for training and of each test set, steps."""


FULL = Sizes(unseen=500, strips=120_000, test=500, steps=3000)
TINY = Sizes(unseen=20, strips=200, test=24, steps=6)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of training strips and initial weights")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--control", action="store_true", help="train with the words of other strips")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/read_lines", help="default: runs/read_lines")
    parser.add_argument("--encoder", type=Path, default=ROOT / "runs/read_words", help="default: runs/read_words")
    parser.add_argument("--steps", type=int, help=f"of 128 strips (default: {FULL.steps})")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args(argv)
    run_dir, sizes = arguments.run_dir.resolve(), TINY if arguments.tiny else FULL
    if arguments.steps is not None:
        sizes = Sizes(**{**vars(sizes), "steps": arguments.steps})
    if not arguments.encoder.exists():
        sys.exit(
            f"{arguments.encoder} does not exist; make it first (examples/read_words/run.py --seed 1 --json "
            "read_words.json), or give another run of the same encoder with --encoder"
        )
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / MARKER).exists():
        sys.exit(f"{run_dir} holds files that no earlier run of this recipe made; give another --run-dir")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    (run_dir / MARKER).touch()

    start = time.perf_counter()
    seconds: dict[str, float] = {}
    make_sets(run_dir, sizes, seed=arguments.seed, control=arguments.control)
    seconds["pictures"] = time.perf_counter() - start
    train(run_dir, sizes, arguments.seed, arguments.encoder.resolve())
    seconds["training"] = time.perf_counter() - start - sum(seconds.values())
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch|transformers)\b")
    figures = measure(run_dir, sizes.steps)
    seconds["evaluation"] = time.perf_counter() - start - sum(seconds.values())
    curve = read_curve(run_dir)
    draw_curve(curve, run_dir / "curve.png")
    result = {
        "seed": arguments.seed,
        "control": arguments.control,
        "samples": sizes.steps * 128,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "figures": figures,
        "curve": curve,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{'':24}{'character errors':>18}{'word errors':>14}{'token accuracy':>16}")
    for name, row in figures.items():
        rates = (row["character_error_rate"], row["word_error_rate"], row["token_accuracy"])
        print(f"{name:24}{rates[0]:18.3f}{rates[1]:14.3f}{rates[2]:16.3f}")
    print(f"{sum(seconds.values()) / 60:.1f} min in all; figures: {arguments.json}, curve: {run_dir / 'curve.png'}")
    return 0


def draw_words(num_unseen: int) -> dict[str, list[str]]:
    """Returns list -> words: `train`, of which `words` are spelt right; `unseen`; and `scrambled`, letters of `words`
    shuffled.

    English words of 3 to 8 letters and how people misspell them: the dictionary of codespell, which this project's
    checks install. Misspelt words keep the decoder from guessing a word by its first letters. No misspelling of an
    unseen word is trained on. The lists are the same for every seed.
    """
    dictionary = importlib.resources.files("codespell_lib") / "data/dictionary.txt"
    meant: dict[str, list[str]] = {}
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        misspelt, _, right = line.partition("->")
        meant[misspelt] = [word for part in right.split(",") if (word := part.strip())]

    random, is_short = np.random.default_rng(0), re.compile("[a-z]{3,8}").fullmatch
    right_words = {word for words in meant.values() for word in words if is_short(word)}
    drawn = random.permutation(sorted(right_words)).tolist()
    unseen, words = drawn[:num_unseen], drawn[num_unseen:]
    misspelt = {word for word in meant if is_short(word) and not set(meant[word]) & set(unseen)} - right_words
    shuffled = dict.fromkeys("".join(random.permutation(list(word))) for word in words)
    scrambled = [word for word in shuffled if word not in right_words | misspelt]
    return {
        "train": [*words, *sorted(misspelt)],
        "words": words,
        "unseen": unseen,
        "scrambled": scrambled[:num_unseen],
    }


def make_sets(run_dir: Path, sizes: Sizes, *, seed: int, control: bool) -> None:
    """Makes the training set from the run's seed, test sets from fixed ones, the tokenizer, and the token caches."""
    from megatron_ove.vocabulary import Vocabulary

    data = run_dir / "data"
    data.mkdir()
    for name, words in draw_words(sizes.unseen).items():
        Vocabulary(tuple(words), (1,) * len(words), {"num_pages": 0}).save(data / f"{name}.json")
    make(data / "train", sizes.strips, 1000 + seed, data / "train.json", "train", LOOKS, control=control)
    for place, (name, (words, typefaces)) in enumerate(TESTS.items()):
        make(data / name, sizes.test, place, data / f"{words}.json", typefaces, TEST_LOOKS)
    tokenizer = run_dir / "tokenizer"
    tool("documents/train_tokenizer.py", data / "train", "--output", tokenizer, "--vocab-size=257")
    for name in ("train", "unseen_words"):
        tool("documents/cache_tokens.py", data / name, "--tokenizer", tokenizer)


def make(
    target: Path, count: int, seed: int, words: Path, typefaces: str, looks: Sequence[str], *, control: bool = False
) -> None:
    """Makes one set of strips on all cores."""
    options = [f"--vocabulary={words}", f"--typefaces={typefaces}", *looks, *(["--control"] if control else [])]
    tool("text_render/make_word_pages.py", target, f"--count={count}", f"--seed={seed}", "--documents", *options,
         f"--workers={NUM_PROCESSES}")  # fmt: skip


def tool(name: str, *arguments: object) -> None:
    """Runs one of the project's tools."""
    run(sys.executable, f"tools/{name}", *map(str, arguments))


def train(run_dir: Path, sizes: Sizes, seed: int, encoder: Path) -> None:
    """Trains encoder, bridge and decoder together."""
    data = run_dir / "data"
    settings = [f"seed={seed}", setting("run_dir", run_dir), f"train.num_steps={sizes.steps}"]
    settings += [
        setting("data.sources.strips.path", data / "train"),
        setting(f"objectives.{OBJECTIVE}.tokenizer", run_dir / "tokenizer"),
    ]
    settings += [setting(f"evaluation.sets.{OBJECTIVE}", data / "unseen_words")]
    settings += [f"optim.schedule.warmup_steps={min(100, sizes.steps // 3)}"]
    settings += [f"init_from={json.dumps([{'path': str(encoder), 'parts': ['encoder']}])}"]
    command = [sys.executable, "-m", "megatron_ove", "train", str(CONFIG), f"--nproc={NUM_PROCESSES}"]
    run(*command, *(part for setting in settings for part in ("--set", setting)))


def setting(field: str, path: Path) -> str:
    """Returns an override; a path may be called anything, also what YAML reads otherwise."""
    return f"{field}={json.dumps(str(path))}"


def run(*command: str) -> None:
    """Runs a program in view of the user; ends with its status if it fails."""
    print("$", " ".join(command), flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    if status:
        sys.exit(status)


def measure(run_dir: Path, steps: int) -> dict[str, dict[str, float]]:
    """Exports the reader and returns test set -> figures of what it writes."""
    from megatron_ove.evaluation.huggingface import load_exported_reader
    from megatron_ove.evaluation.reading import ReadingSettings, read_set, show_examples
    from megatron_ove.evaluation.text_figures import strict_figures
    from megatron_ove.objectives.text_generation.reader import write_reader
    from megatron_ove.shards.shard_set import ShardSet
    from megatron_ove.shards.token_cache import TextTokenizer

    folder = write_reader(run_dir / f"checkpoints/step_{steps:08d}", run_dir / "reader", OBJECTIVE)
    model, tokenizer = load_exported_reader(folder), TextTokenizer(folder)
    settings, figures = ReadingSettings(max_patches=16, max_tokens=16), {}
    for name in TESTS:
        read = read_set(model, tokenizer, ShardSet.open(run_dir / "data" / name), settings)
        figures[name] = {"loss": read.loss, "token_accuracy": read.token_accuracy, **strict_figures(read.texts)}
        print(name, *show_examples(read, 6), sep="\n  ", flush=True)
    return figures


def read_curve(run_dir: Path) -> dict[str, list[list[float]]]:
    """Returns the loss and the held-out character error rate as lists of [step, value]."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {"loss": f"loss/{OBJECTIVE}", "held_out": f"held_out/{OBJECTIVE}/character_error_rate"}
    return {
        name: [[row["step"], round(row[key], 4)] for row in rows if row.get(key) is not None]
        for name, key in names.items()
    }


def draw_curve(curve: dict[str, list[list[float]]], path: Path) -> None:
    """Draws the loss and the held-out figure over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), dpi=110)
    axes.plot(*zip(*curve["loss"], strict=True), color="#c2571a", label="training loss")
    axes.set(xlabel="step of 128 strips", ylabel="loss a letter", ylim=(0, None))
    held_out = axes.twinx()
    held_out.plot(*zip(*curve["held_out"], strict=True), "o-", color="#14785a", label="unseen words, character errors")
    held_out.set(ylim=(0, 1), ylabel="character error rate")
    figure.legend(loc="upper center", ncol=2, frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.08, right=0.91, top=0.88, bottom=0.15)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())

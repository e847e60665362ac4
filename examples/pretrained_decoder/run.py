"""Does a published decoder help an encoder to begin to read?

    python examples/pretrained_decoder/get_decoder.py decoders/smollm2-135m
    python examples/pretrained_decoder/run.py --seed 1 --json pretrained_decoder.json

First the loss of a text under our decoder with the published weights is compared with that of transformers. Then the
encoder of examples/read_words and a bridge learn from lines of English for 100 steps of 16 lines: before the published
decoder, which stays as it is, and before one of the same shape that starts from nothing and trains as well. Held out
are lines of other chapters. README.md has the results.
"""

from __future__ import annotations

import argparse
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

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
MARKER = "made_by_pretrained_decoder"
ARMS = {"frozen": "config.yaml", "from_scratch": "from_scratch.yaml"}
SHAPE = ("--looks", "fixed", "anywhere", "--pages=0", "--strip-size", "336", "28", "--documents")
TOLERANCE = 1e-4
TEXT = (
    "Everyone has the right to education. Education shall be free, at least in the elementary and fundamental stages. "
    "Elementary education shall be compulsory."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of pictures and initial weights")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--decoder", type=Path, default=ROOT / "decoders/smollm2-135m", help="a published decoder")
    parser.add_argument("--encoder", type=Path, default=ROOT / "runs/read_words", help="default: runs/read_words")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/pretrained_decoder")
    parser.add_argument("--steps", type=int, default=100, help="of each arm (default: 100)")
    arguments = parser.parse_args(argv)
    run_dir = arguments.run_dir.resolve()
    for path, maker in (
        (arguments.decoder, "pretrained_decoder/get_decoder.py"),
        (arguments.encoder, "read_words/run.py"),
    ):
        if not path.exists():
            sys.exit(f"{path} does not exist; make it first with examples/{maker}")
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / MARKER).exists():
        sys.exit(f"{run_dir} holds files that no earlier run of this recipe made; give another --run-dir")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    (run_dir / MARKER).touch()

    start = time.perf_counter()
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch|transformers)\b")
    losses = loss_of_text(arguments.decoder)
    print(f"loss of a text: {losses['ours']:.6f} here, {losses['transformers']:.6f} with transformers", flush=True)
    if abs(losses["ours"] - losses["transformers"]) > TOLERANCE:
        sys.exit("these two should be equal")
    make_sets(run_dir / "data", arguments.seed, num_lines=16 * arguments.steps)
    curves = {}
    for arm in ARMS:
        train(arm, run_dir, arguments)
        curves[arm] = read_curve(run_dir / arm)
    result = {
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - start),
        "loss_of_a_text": losses,
        "held_out_loss": curves,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{'held-out loss at step':24}" + "".join(f"{step:>9}" for step, _ in curves["frozen"]))
    for arm, curve in curves.items():
        print(f"{arm:24}" + "".join(f"{loss:9.3f}" for _, loss in curve))
    print(f"{result['seconds'] / 60:.1f} min in all; figures: {arguments.json}")
    return 0


def loss_of_text(folder: Path) -> dict[str, float]:
    """Returns the mean loss of a text's tokens behind the first under our decoder and under transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_ove.config.parallel import ParallelConfig
    from megatron_ove.convert.decoder_config import read_decoder_config
    from megatron_ove.convert.decoder_weights import PublishedDecoder
    from megatron_ove.decoder.text_decoder import TextDecoder
    from megatron_ove.model.initialization import fill_parameters
    from megatron_ove.parallel.topology import destroy_topology, initialize_topology
    from megatron_ove.shards.token_cache import TextTokenizer

    section, tokens = read_decoder_config(folder), torch.tensor(TextTokenizer(folder).encode([TEXT])[0])
    topology = initialize_topology(ParallelConfig(), seed=0)
    decoder, published = TextDecoder(section, topology, torch.float32), PublishedDecoder(folder, section)
    fill_parameters(
        decoder.named_parameters(),
        lambda name, shape: published.whole(name),
        layer_offset=0,
        tensor_rank=0,
        tensor_size=1,
    )
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    nothing = torch.zeros(0, section.hidden_size or 0), torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        rows = decoder(tokens, bounds, *nothing)
        ours = decoder.losses(rows[:-1], tokens[1:])[0].mean()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = model(tokens[None], labels=tokens[None]).loss
    destroy_topology()
    return {"ours": float(ours), "transformers": float(theirs)}


def draw_lines() -> dict[str, list[str]]:
    """Returns lines of 24 to 32 characters for training and held out: English from the chapters of Python's manual that
    come with it; every fifth chapter is held out."""
    from pydoc_data.topics import topics

    lines: dict[str, dict[str, None]] = {"train": {}, "held_out": {}}
    for number, name in enumerate(sorted(topics)):
        words: list[str] = []
        for word in topics[name].split():
            words = [*words, word] if re.fullmatch("[A-Za-z]+[,.;:]?", word) else []
            line = " ".join(words)
            if len(line) >= 24:
                if len(line) <= 32:
                    lines["held_out" if number % 5 == 0 else "train"][line] = None
                words = []
    return {
        "train": list(lines["train"]),
        "held_out": [line for line in lines["held_out"] if line not in lines["train"]],
    }


def make_sets(data: Path, seed: int, num_lines: int) -> None:
    """Makes pictures of lines; the held-out ones are the same for every seed."""
    from megatron_ove.vocabulary import Vocabulary

    data.mkdir()
    counts = {"train": (num_lines, seed + 1), "held_out": (64, 0)}
    for name, lines in draw_lines().items():
        count, own_seed = counts[name]
        Vocabulary(tuple(lines), (1,) * len(lines), {"num_pages": 0}).save(data / f"{name}.json")
        command = ["tools/text_render/make_word_pages.py", data / name, f"--vocabulary={data / name}.json"]
        run(sys.executable, *map(str, command), f"--count={count}", f"--seed={own_seed}", *SHAPE, "--workers=2")


def train(arm: str, run_dir: Path, arguments: argparse.Namespace) -> None:
    """Trains one arm in one process on all cores: a decoder's gradients would be a large message."""
    data, decoder = run_dir / "data", arguments.decoder.resolve()
    for name in ("train", "held_out"):
        run(sys.executable, "tools/documents/cache_tokens.py", str(data / name), "--tokenizer", str(decoder))
    settings = {"seed": arguments.seed, "run_dir": run_dir / arm, "data.sources.lines.path": data / "train"}
    settings |= {"evaluation.sets.read": data / "held_out", "train.num_steps": arguments.steps}
    settings |= {"init_from": json.dumps([{"path": str(arguments.encoder.resolve()), "parts": ["encoder"]}])}
    settings["objectives.read.decoder.path" if arm == "frozen" else "objectives.read.tokenizer"] = decoder
    command = [sys.executable, "-m", "megatron_ove", "train", str(HERE / ARMS[arm])]
    run(*command, *(part for field, value in settings.items() for part in ("--set", setting(field, value))))


def setting(field: str, value: object) -> str:
    """Returns an override; a path may be called anything, also what YAML reads otherwise."""
    return f"{field}={json.dumps(str(value)) if isinstance(value, Path) else value}"


def run(*command: str) -> None:
    """Runs a program in view of the user; ends with its status if it fails."""
    print("$", " ".join(command), flush=True)
    status = subprocess.run(command, cwd=ROOT, env=dict(os.environ), check=False).returncode
    if status:
        sys.exit(status)


def read_curve(run_dir: Path) -> list[list[float]]:
    """Returns [step, held-out loss]."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[row["step"], round(row["held_out/read/loss"], 4)] for row in rows if row.get("held_out/read/loss")]


if __name__ == "__main__":
    sys.exit(main())

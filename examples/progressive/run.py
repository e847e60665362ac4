"""Runnable twin of the progressive recipe: small pictures and single frames first, then everything at full size.

    make demo
    python examples/progressive/run.py --seed 1 --json progressive_1.json

Trains the encoder of the quick start on the demo's shard sets: 240 steps at a quarter of the patches, then 100 at full
size from there; and, as control, 160 steps at full size from nothing, which see as many patches. Both are measured at
full size on what was held out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
MARKER = "made_by_progressive"
NUM_PROCESSES = 2
FOLDERS = {"images": "image_clusters", "pages": "page_words", "clips": "clip_clusters"}
FIGURES = ("mean_average_precision", "first_right")


class Sizes(argparse.Namespace):
    """Steps at low resolution and then at full size, and of the control."""


FULL = Sizes(low=240, high=100, control=160)
TINY = Sizes(low=4, high=3, control=4)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of initial weights and the order of samples")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--data", type=Path, default=ROOT / "runs/quickstart/data", help="shard sets of the demo")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/progressive", help="default: runs/progressive")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args(argv)
    data, run_dir = arguments.data.resolve(), arguments.run_dir.resolve()
    sizes = TINY if arguments.tiny else FULL
    if not data.is_dir():
        sys.exit(f"{data} does not exist; run `make demo` first, or give the folder of its shard sets with --data")
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / MARKER).exists():
        sys.exit(f"{run_dir} holds files that no earlier run of this recipe made; give another --run-dir")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    (run_dir / MARKER).touch()

    seconds, start = {}, time.perf_counter()
    low, nothing = run_dir / "low", "null"
    train("small_low.yaml", data, low, sizes.low, arguments.seed)
    parts = ["encoder", *(f"objectives.{name}" for name in FOLDERS.values())]
    from_low = json.dumps([{"path": str(low), "parts": parts}])
    train("small_high.yaml", data, run_dir / "progressive", sizes.high, arguments.seed, init_from=from_low)
    seconds["progressive"] = time.perf_counter() - start
    train("small_high.yaml", data, run_dir / "control", sizes.control, arguments.seed, init_from=nothing,
          lr=2e-3)  # fmt: skip
    seconds["control"] = time.perf_counter() - start - seconds["progressive"]
    figures = {arm: last_figures(run_dir / arm) for arm in ("progressive", "control")}
    result = {"seed": arguments.seed, "figures": figures, "seconds": {k: round(v, 1) for k, v in seconds.items()}}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{'held out':42}" + "".join(f"{arm:>14}" for arm in figures))
    for name in figures["control"]:
        print(f"{name:42}" + "".join(f"{row[name]:14.3f}" for row in figures.values()))
    print(f"{'seconds':42}" + "".join(f"{seconds[arm]:14.0f}" for arm in figures))
    return 0


def train(
    config: str,
    data: Path,
    run_dir: Path,
    steps: int,
    seed: int,
    *,
    init_from: str | None = None,
    lr: float | None = None,
) -> None:
    """Trains one part; the numbers of classes are those of the sets."""
    settings: dict[str, object] = {"seed": seed, "run_dir": run_dir, "train.num_steps": steps}
    settings |= {"optim.schedule.warmup_steps": min(20, steps // 3), "checkpoint.interval_steps": steps}
    for folder, objective in FOLDERS.items():
        settings[f"data.sources.{folder}.path"] = data / folder / "train"
        settings[f"objectives.{objective}.num_classes"] = "null"
    if config == "small_high.yaml":
        for folder, objective in FOLDERS.items():
            settings[f"evaluation.sets.{objective}"] = data / folder / "held_out"
        settings["evaluation.interval_steps"] = steps
    settings |= {} if init_from is None else {"init_from": init_from}
    settings |= {} if lr is None else {"optim.lr": lr}
    command = [sys.executable, "-m", "megatron_ove", "train", str(HERE / config), f"--nproc={NUM_PROCESSES}"]
    command += [part for field, value in settings.items() for part in ("--set", setting(field, value))]
    print("$", " ".join(command), flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    if status:
        sys.exit(status)


def setting(field: str, value: object) -> str:
    """Returns an override; a path may be called anything, also what YAML reads otherwise."""
    return f"{field}={json.dumps(str(value)) if isinstance(value, Path) else value}"


def last_figures(run_dir: Path) -> dict[str, float]:
    """Returns the last held-out figures of each head."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {key: value for row in rows for key, value in row.items() if key.startswith("held_out/")}
    names = [f"held_out/{objective}/{figure}" for objective in FOLDERS.values() for figure in FIGURES]
    return {name.removeprefix("held_out/"): last[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())

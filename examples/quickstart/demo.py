"""The whole path on a CPU: input -> shards -> training, cut short and resumed -> export -> a page to look at.

    python examples/quickstart/demo.py [--fast] [--images DIR] [--pages DIR] [--videos DIR]

Everything lands in runs/quickstart; the last line printed is the path of the page. What each phase does stands in
README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from inputs import KINDS, prepare_inputs
from phases import ROOT, DemoError, PhaseLog, say
from preprocessing import ClipShape, Preprocessing
from sizes import SIZES, DemoSizes
from training import TrainingRun

from megatron_ove.config.loader import load_config
from megatron_ove.config.train import TrainConfig
from megatron_ove.errors import MegatronOveError

CONFIG = Path(__file__).with_name("config.yaml")
DEFAULT_RUN_DIR = ROOT / "runs/quickstart"  # what config.yaml says, seen from the repository's folder
MARKER = "made_by_the_quick_start"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        run_demo(arguments, SIZES["fast" if arguments.fast else arguments.size])
    except (DemoError, MegatronOveError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of your own images")
    parser.add_argument("--pages", type=Path, help="folder of your own page pictures")
    parser.add_argument("--videos", type=Path, help="folder of your own video files")
    parser.add_argument("--fast", action="store_true", help="less of everything, for continuous integration")
    parser.add_argument("--size", choices=SIZES, default="full", help="how much (default: %(default)s)")
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="default: runs/quickstart")
    return parser


def run_demo(arguments: argparse.Namespace, sizes: DemoSizes) -> None:
    """All phases; raises `DemoError` or the package's own errors."""
    phases = PhaseLog(6)
    run_dir: Path = arguments.run_dir.resolve()
    _clear(run_dir)
    own = {"images": arguments.images, "pages": arguments.pages, "clips": arguments.videos}
    config = load_config(CONFIG)
    with phases.phase("input", "Input: photographs, pages, clips"):
        folders = prepare_inputs(run_dir / "input", own, sizes, run_dir / "rejects.jsonl")
    preprocessing = Preprocessing(run_dir, folders, sizes, _clip_shape(config))
    with phases.phase("preprocessing", "Preprocessing: clusters, OCR words, codec patches -> shards"):
        preprocessing.run()
    overrides = _overrides(run_dir, preprocessing.num_classes(), sizes)
    config = load_config(CONFIG, overrides)
    training = TrainingRun(CONFIG, overrides, run_dir)
    with phases.phase("training", f"Training on 2 processes, cut short near step {sizes.stop_at} of {sizes.steps}"):
        stopped_at = training.train_until(sizes.stop_at)
    with phases.phase("resume", f"Resume from the checkpoint of step {stopped_at}"):
        training.resume()
    warnings.filterwarnings("ignore", module=r"(megatron\.core|torch)\b")
    # Imported late: torch, megatron-core and transformers are not needed before.
    from results import evaluate_run, export_run, write_page, write_summary

    with phases.phase("export", "Export to HuggingFace format, untrained and trained"):
        exports = export_run(run_dir, sizes.steps)
    with phases.phase("evaluation", "What training was good for, on held-out data"):
        results = evaluate_run(run_dir, config, exports)
    reading = preprocessing.card_reading
    summary = write_summary(run_dir, config, results, reading=reading, stopped_at=stopped_at, seconds=phases.seconds)
    page = write_page(run_dir, config, results, preprocessing, summary)
    say(f"\n{summary['total_seconds']:.0f} s in all. Figures: {run_dir / 'summary.json'}\nThe page to look at:\n{page}")


def _clear(run_dir: Path) -> None:
    """Removes what an earlier demo left; refuses to remove anything else."""
    if run_dir.exists() and any(run_dir.iterdir()):
        if not (run_dir / MARKER).exists():
            raise DemoError(
                f"{run_dir} holds files that no earlier demo made; move them away or give another --run-dir"
            )
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / MARKER).touch()


def _clip_shape(config: TrainConfig) -> ClipShape:
    """Clips get the size of the images, and the budget that the clips' source will use."""
    images, clips = config.data.sources["images"], config.data.sources["clips"]
    return ClipShape(images.image_size, clips.max_patches, config.encoder.patch_size)  # type: ignore[union-attr]


def _overrides(run_dir: Path, num_classes: dict[str, int], sizes: DemoSizes) -> list[str]:
    """What is not known before the data is: sizes of the class tables, the length of this form, and another folder."""
    overrides = [f"objectives.{name}.num_classes={count}" for name, count in num_classes.items()]
    overrides += [f"train.num_steps={sizes.steps}", f"train.log_interval_steps={sizes.log_interval}"]
    overrides += [f"optim.schedule.warmup_steps={min(20, sizes.steps // 2)}"]
    if run_dir != DEFAULT_RUN_DIR.resolve():
        # A folder may be called anything, also what YAML reads otherwise.
        overrides.append(f"run_dir={json.dumps(str(run_dir))}")
        overrides += [
            f"data.sources.{kind}.path={json.dumps(str(run_dir / 'data' / kind / 'train'))}" for kind in KINDS
        ]
    return overrides


if __name__ == "__main__":
    sys.exit(main())

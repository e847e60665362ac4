"""Writes a shard set of made-up pictures whose look follows from their class, to try a recipe without data.

    python tools/shards/make_synthetic_shards.py OUT --num-samples 256 --num-classes 2000000 --picture-size 224 224

Labels are spread over the whole range of class ids; a sample's further labels are the ids that follow its own. It shows
that a run works, what it costs and that its loss falls, not what an encoder learns.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ove.data.synthetic import write_synthetic_shard_set


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder to write; must not exist")
    parser.add_argument("--kind", choices=["image", "ocr", "video"], default="image", help="of samples")
    parser.add_argument("--num-samples", type=int, required=True, help="samples to write")
    parser.add_argument("--num-classes", type=int, required=True, help="label ids are 0 to this - 1")
    parser.add_argument("--label-width", type=int, default=10, help="labels of a sample (10; 100 for OCR)")
    parser.add_argument("--picture-size", type=int, nargs=2, default=(224, 224), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--seed", type=int, default=0, help="of noise and sizes")
    args = parser.parse_args()
    for name in ("num_samples", "num_classes", "label_width"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} = {getattr(args, name)} leaves nothing to write; give 1 or more")
    if args.directory.exists():
        parser.error(
            f"{args.directory} exists and would be mixed up with the new shards; remove it or name another folder"
        )
    write_synthetic_shard_set(
        args.directory,
        kind=args.kind,
        num_samples=args.num_samples,
        num_classes=args.num_classes,
        label_width=args.label_width,
        picture_size=tuple(args.picture_size),
        seed=args.seed,
    )
    print(f"{args.directory}: {args.num_samples} {args.kind} samples, {args.num_classes} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

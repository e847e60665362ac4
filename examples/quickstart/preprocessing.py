"""Input files -> shard sets, by the scripts under tools/ exactly as one would run them by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cards import CardReading, write_card_lines
from inputs import KINDS, NEW_TYPEFACES, SPLITS, Folders
from phases import DemoError, run_tool, say
from sizes import DemoSizes

from megatron_ove.preprocess.clustering.descriptor_sets import DescriptorSet
from megatron_ove.shards.shard_set import ShardSet

# Images are told apart by kind, so clusters hold several; clips one by one, so that cuts of a clip find one another.
_SAMPLES_PER_CLUSTER = {"images": 3, "clips": 1}
_NUM_LABELS = {"images": 10, "clips": 4}
_FEW_PAGES = 20


@dataclass(frozen=True)
class ClipShape:
    """Size of the clips' grid: as the sources of config.yaml need it."""

    frame_size: int
    patch_budget: int
    patch_size: int


class Preprocessing:
    """Runs the pipelines below one run folder."""

    def __init__(self, run_dir: Path, inputs: Folders, sizes: DemoSizes, shape: ClipShape) -> None:
        self.inputs, self.labels, self.data = inputs, run_dir / "labels", run_dir / "data"
        self.rejects = run_dir / "rejects.jsonl"
        self.sizes, self.shape = sizes, shape
        self.card_reading = CardReading()

    def run(self) -> None:
        """Labels all three kinds, writes their shard sets and validates them.

        Raises:
            DemoError: nothing usable in one of the folders; the tool's own sentence stands above.
        """
        self.images()
        self.pages()
        self.clips()
        folders = [self.data / kind / split for kind in KINDS for split in self.inputs[kind]]
        run_tool("tools/shards/validate_shards.py", *folders, "--deep")
        for folder in folders:
            if len(ShardSet.open(folder)) == 0:
                raise DemoError(f"{folder} has no sample, because every file was rejected; see {self.rejects}")

    def images(self) -> None:
        """Pictures -> descriptors -> clusters -> shards."""
        for split in SPLITS:
            descriptors = self.labels / f"images_{split}.npz"
            rejects = f"--rejects={self.rejects}"
            run_tool(
                "tools/clustering/1_describe_pictures.py",
                self.inputs["images"][split],
                descriptors,
                rejects,
                "--workers=1",
            )
            labels = self._cluster(descriptors, "images", split, self.sizes.image_clusters)
            target = self.data / "images" / split
            run_tool(
                "tools/clustering/3_write_image_shards.py",
                labels,
                target,
                rejects,
                "--overwrite",
                "--longest-side=256",
                "--workers=1",
            )

    @property
    def has_cards(self) -> bool:
        """Whether the pages are the demo's own cards, whose words are known."""
        return NEW_TYPEFACES in self.inputs["pages"]

    def pages(self) -> None:
        """Pages -> lines -> vocabulary of the training pages -> shards with up to 100 word ids a page."""
        for split, folder in self.inputs["pages"].items():
            lines = self.labels / f"pages_{split}.jsonl"
            if self.has_cards:
                num_read = self.sizes.read_cards if split == "train" else 0
                reading = write_card_lines(folder, lines, num_read=num_read, rejects=self.rejects)
                self.card_reading = reading if num_read else self.card_reading
            else:
                run_tool("tools/ocr/1_recognize_pages.py", folder, lines, f"--rejects={self.rejects}")
        train_lines, vocabulary = self.labels / "pages_train.jsonl", self.labels / "vocabulary.json"
        num_pages = len(train_lines.read_text(encoding="utf-8").splitlines())
        min_pages = 2 if num_pages >= _FEW_PAGES else 1
        if min_pages == 1:
            say(f"      only {num_pages} pages: a word counts even if it is on one page only")
        run_tool(
            "tools/ocr/2_build_vocabulary.py",
            train_lines,
            f"--output={vocabulary}",
            f"--max-words={self.sizes.card_words if self.has_cards else self.sizes.vocabulary}",
            f"--min-pages={min_pages}",
        )
        for split in self.inputs["pages"]:
            run_tool(
                "tools/ocr/3_write_page_shards.py",
                self.labels / f"pages_{split}.jsonl",
                self.data / "pages" / split,
                f"--vocabulary={vocabulary}",
                f"--rejects={self.rejects}",
                "--overwrite",
                "--longest-side=672",
                "--workers=1",
            )

    def clips(self) -> None:
        """Clips -> selected patches -> descriptors -> clusters -> shards."""
        shape, rejects = self.shape, f"--rejects={self.rejects}"
        for split in SPLITS:
            stored = self.labels / f"clips_{split}"
            run_tool(
                "tools/codec/1_select_patches.py",
                self.inputs["clips"][split],
                stored,
                rejects,
                f"--frame-height={shape.frame_size}",
                f"--frame-width={shape.frame_size}",
                f"--patch-size={shape.patch_size}",
                f"--patch-budget={shape.patch_budget}",
            )
            descriptors = self.labels / f"clips_{split}.npz"
            run_tool("tools/codec/2_describe_clips.py", stored, descriptors, rejects, "--workers=1")
            labels = self._cluster(descriptors, "clips", split, self.sizes.clip_clusters)
            run_tool(
                "tools/codec/3_write_clip_shards.py",
                stored,
                labels,
                self.data / "clips" / split,
                rejects,
                "--overwrite",
            )

    def num_classes(self) -> dict[str, int]:
        """Returns the size of each head's table: objective name -> classes."""
        kinds = {"image_clusters": "images", "page_words": "pages", "clip_clusters": "clips"}
        return {name: ShardSet.open(self.data / kind / "train").info.num_classes for name, kind in kinds.items()}

    def words(self) -> list[str]:
        """Returns the word of every class of the pages' head."""
        record = json.loads((self.labels / "vocabulary.json").read_text(encoding="utf-8"))
        return [word for word, _ in record["words"]]

    def _cluster(self, descriptors: Path, kind: str, split: str, wanted: int) -> Path:
        """Trains centers on the training split, uses them on the other; fewer centers when there are few files."""
        labels, centers = self.labels / f"{kind}_{split}_labels.npz", self.labels / f"{kind}_centers.npz"
        vectors = DescriptorSet.load(self.labels / f"{kind}_train.npz").descriptors
        different = len(np.unique(vectors, axis=0))
        if different < 2:
            raise DemoError(f"the {kind} to train on are all the same, so there is nothing to tell apart; give others")
        count = min(wanted, max(2, different // _SAMPLES_PER_CLUSTER[kind]))
        num_labels = min(_NUM_LABELS[kind], max(1, count // 3))
        source = (f"--use-centers={centers}",)
        if split == "train":
            source = (f"--clusters={count}", f"--centers={centers}")
            if count < wanted:
                say(f"      {different} different {kind} are too few for {wanted} clusters: {count} are made")
        run_tool(
            "tools/clustering/2_cluster_descriptors.py", descriptors, labels, *source, f"--num-labels={num_labels}"
        )
        return labels

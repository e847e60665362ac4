"""Labels that cannot teach, classes without a sample, and numbers of classes that are taken from the set."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ove.checkpoint.manifest import checkpoint_name
from megatron_ove.cli.main import main
from megatron_ove.config.loader import config_from_dict, dump_config
from megatron_ove.config.train import TrainConfig
from megatron_ove.config.yaml_file import parse_yaml
from megatron_ove.data.class_counts import fill_in_class_counts
from megatron_ove.data.shard_fit import find_doubts
from megatron_ove.errors import ConfigError, DataError
from megatron_ove.objectives import label_fit
from megatron_ove.objectives.label_fit import common_labels, count_classes, find_mismatches
from megatron_ove.shards.format import DatasetInfo, member_names
from megatron_ove.training.done_marker import mark_done
from megatron_ove.vocabulary import VOCABULARY_FILE, Vocabulary
from tests.unit.test_config import changed

SIX = np.array([np.random.default_rng(i).permutation(6).tolist() + [-1] * 4 for i in range(132)], np.int32)


def info(num_classes: int, **changes: Any) -> DatasetInfo:
    values: dict[str, Any] = {"kind": "image", "num_samples": 3, "num_classes": num_classes, "label_width": 10}
    values |= {"members": member_names("image", 0), "patch_size": 14, "frames": 0, "created_by": "test"}
    return DatasetInfo(**{**values, "grid_height": None, "grid_width": None, **changes})


def shard_set(labels: np.ndarray, num_classes: int) -> Any:
    class Labelled(SimpleNamespace):
        def __len__(self) -> int:
            return len(labels)

    return Labelled(labels=labels, info=info(num_classes), directory=Path("data/images"))


def unlearnable(labels: np.ndarray, num_classes: int) -> list[str]:
    return find_mismatches(with_classes(num_classes), "clusters", {"images": shard_set(labels, num_classes)})


def test_as_few_classes_as_labels_a_sample_are_a_sentence() -> None:
    """The clusters of tools/clustering with --clusters 6 and ten labels: a loss of 0 and no gradient, for ever."""
    (sentence,) = unlearnable(SIX, 6)
    assert sentence == (
        "each of the 132 samples of data/images has all 6 classes among its labels, so there is no negative and "
        "objectives.clusters could learn nothing (its loss would be 0 from the first step on); store fewer labels a "
        "sample or make more classes, e.g. with --num-labels and --clusters of "
        "tools/clustering/2_cluster_descriptors.py"
    )
    assert unlearnable(SIX[:, :5], 6) == []


def test_sources_of_one_head_must_have_the_same_classes(tmp_path: Path) -> None:
    run, one, other = with_classes(6), shard_set(SIX[:, :5], 6), shard_set(SIX[:, :5], 5)
    (sentence,) = find_mismatches(run, "clusters", {"images": one, "scans": other})
    assert sentence == (
        "objectives.clusters reads data.sources.images with 6 classes and data.sources.scans with 5, so equal labels "
        "would mean different things; write both sets with one vocabulary or clustering, or give each an objective of "
        "its own"
    )
    other.info, words = one.info, [f"word{number}" for number in range(6)]
    for shards, last in ((one, "word5"), (other, "sixth")):
        shards.directory = tmp_path / last
        shards.directory.mkdir()
        vocabulary = Vocabulary((*words[:5], last), (1,) * 6, {"num_pages": 3})
        vocabulary.save(shards.directory / VOCABULARY_FILE)
        shards.read_vocabulary = lambda vocabulary=vocabulary: vocabulary
    (sentence,) = find_mismatches(run, "clusters", {"images": one, "scans": other})
    assert sentence.startswith("objectives.clusters reads data.sources.images and data.sources.scans, whose words diff")
    assert find_mismatches(run, "clusters", {"images": one, "scans": one}) == []


@pytest.mark.parametrize(
    ("labels", "start"),
    [
        (
            [[3, -1], [3, 3], [-1, -1]],
            "each of the 3 samples of data/images has the same labels (3), so objectives.c",
        ),
        ([[4, 1], [1, 4]], "each of the 2 samples of data/images has the same labels (1, 4), so objectives.clusters"),
        ([[4, 1]], "data/images has only one sample (1, 4), so objectives.clusters has nothing to tell"),
    ],
)
def test_labels_that_are_the_same_everywhere_are_a_warning(labels: list[list[int]], start: str) -> None:
    """Not refused: a set of one page is a usual trial, and a run on it must be continued as it was started."""
    array = np.array(labels, np.int32)
    assert unlearnable(array, 300) == []
    (sentence,) = find_doubts(with_classes(300), {"images": shard_set(array, 300)}, counts_samples=False)
    assert sentence.startswith(start)


def test_no_label_at_all_is_a_sentence() -> None:
    (sentence,) = unlearnable(np.full((2, 2), -1, np.int32), 100)
    assert sentence.startswith("no sample of data/images has a label, so objectives.clusters could learn nothing; w")


def test_one_sample_that_differs_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_fit, "_CHUNK", 100)
    for place in (0, 1, 4321, 9999):
        labels = np.full((10_000, 2), 5, np.int32)
        assert common_labels(labels) == [5]
        labels[place, 1] = 6
        assert common_labels(labels) is None


def test_a_usual_set_is_hardly_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(label_fit, "_label_sets", lambda rows: read.append(len(rows)) or np.sort(rows, axis=1))
    assert common_labels(np.arange(1_000_000, dtype=np.int32)[:, None]) is None
    assert read == [64]


@pytest.mark.parametrize("most", [1 << 26, 300])
def test_classes_with_a_sample_are_counted_in_bounded_reads(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(label_fit, "_COUNTED_LABELS", most)
    monkeypatch.setattr(label_fit, "_CHUNK", 16)
    labels = np.random.default_rng(0).integers(0, 30, (1000, 3)).astype(np.int32)
    labels[::7] = -1
    seen, looked_at = count_classes(labels, 40)
    assert seen == 30
    assert looked_at == 1000 if most > 3000 else 100 <= looked_at <= 116


def test_more_classes_than_the_set_has_are_a_warning_with_both_numbers() -> None:
    config = config_from_dict(changed("objectives.clusters.num_classes", 400), "test")
    labels = np.arange(300, dtype=np.int32)[:, None]
    (sentence,) = find_doubts(config, {"images": shard_set(labels, 300)}, counts_samples=True)
    assert sentence == (
        "objectives.clusters.num_classes = 400, but data/images has 300 classes, so 100 class centers (25%) would only "
        "ever be negatives; set it to 300, or leave num_classes out to have it taken from the set"
    )
    assert not find_doubts(with_classes(300), {"images": shard_set(labels, 300)}, counts_samples=True)


def with_classes(count: int) -> TrainConfig:
    return config_from_dict(changed("objectives.clusters.num_classes", count), "test")


def test_classes_without_a_sample_are_a_warning_with_their_share_only_where_labels_are_read() -> None:
    sets = {"images": shard_set(np.arange(240, dtype=np.int32)[:, None], 300)}
    assert find_doubts(with_classes(300), sets, counts_samples=False) == []
    (sentence,) = find_doubts(with_classes(300), sets, counts_samples=True)
    assert sentence.startswith("60 of the 300 classes of data/images (20%) have no sample, so their centers in obj")


@pytest.fixture
def without_a_number(tmp_path: Path) -> TrainConfig:
    data = changed("data.sources.images.path", str(tmp_path / "set"))
    del data["objectives"]["clusters"]["num_classes"]
    return config_from_dict(data, "run.yaml")


def test_a_number_that_is_left_out_is_that_of_the_set(without_a_number: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    info(345).write(tmp_path / "set")
    assert without_a_number.objectives["clusters"].num_classes is None
    config = fill_in_class_counts(without_a_number, "run.yaml")
    assert config.objectives["clusters"].table_size == 345
    again = config_from_dict(parse_yaml(dump_config(config), "resolved"), "resolved")
    assert again.objectives["clusters"].num_classes == 345
    assert fill_in_class_counts(again, "resolved") is again


def test_a_finished_run_needs_its_shard_set_no_more(
    without_a_number: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    info(345).write(tmp_path / "set")
    run_dir = tmp_path / "run"
    given = without_a_number.model_copy(update={"run_dir": str(run_dir)})
    (tmp_path / "run.yaml").write_text(dump_config(given))
    text = dump_config(fill_in_class_counts(given, "run.yaml"))
    shutil.rmtree(tmp_path / "set")
    command = ["train", str(tmp_path / "run.yaml")]
    assert main(command) == 2
    (run_dir / "checkpoints" / checkpoint_name(given.train.num_steps)).mkdir(parents=True)
    (run_dir / "config.resolved.yaml").write_text(text)
    assert main(command) == 2
    assert "the shard set" in capsys.readouterr().err
    mark_done(run_dir, step=given.train.num_steps, config_text=text)
    assert main(command) == 0
    assert main([*command, "--set", "seed=77"]) == 2  # another run, which would have to be trained


def test_a_number_that_cannot_be_taken_is_a_sentence(without_a_number: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not filled in"):
        _ = without_a_number.objectives["clusters"].table_size
    with pytest.raises(DataError) as caught:
        fill_in_class_counts(without_a_number, "run.yaml")
    assert str(caught.value) == (
        f"data.sources.images: the shard set {tmp_path}/set does not exist or is no folder; check the source's path; "
        "objectives.clusters.num_classes is taken from this set, so write the number where there is no set"
    )


def test_what_the_number_makes_wrong_is_said_when_it_is_known(without_a_number: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    info(5).write(tmp_path / "set")
    data = without_a_number.model_dump(mode="json")
    data["objectives"]["clusters"]["num_sampled"] = 6
    with pytest.raises(ConfigError, match=r"run.yaml has 1 error:\n.* num_sampled = 6 is more than num_classes = 5"):
        fill_in_class_counts(config_from_dict(data, "run.yaml"), "run.yaml")

"""Words go from a shard set through training into checkpoints and exports, and come out of `read` and `find`."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_ove.checkpoint.manifest import read_manifest
from megatron_ove.cli.main import main
from megatron_ove.convert.class_centers import load_class_head
from megatron_ove.evaluation.embedding import SampleSettings, embed_shard_set
from megatron_ove.evaluation.huggingface import huggingface_encoder, load_exported_model
from megatron_ove.evaluation.retrieval import cosine_scores
from megatron_ove.shards.shard_set import ShardSet
from megatron_ove.vocabulary import Vocabulary
from tests.support.distributed import run_distributed
from tests.support.tiny_run import NUM_CLASSES, check, tiny_config, write_tiny_sources, write_tiny_vocabulary

OBJECTIVE, FILE = "ocr_labels", "vocabularies/ocr_labels.json"
TOP = 5
# The same fp32 sums in another order, on cosines.
TOLERANCE = 1e-5


def train(rank: int, world_size: int, data: dict[str, Any]) -> list[str]:
    """Trains one launch; returns what this rank logged."""
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("megatron_ove").addHandler(handler)
    logging.getLogger("megatron_ove").setLevel(logging.INFO)
    config = check(data)
    Trainer(config, initialize_topology(config.parallel, seed=config.seed)).run()
    return messages


def run_config(sources: dict[str, str], run_dir: Path, stop: int) -> dict[str, Any]:
    data = tiny_config(sources, run_dir)
    data["train"] |= {"num_steps": 4, "stop_after_steps": stop}
    return data


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = write_tiny_sources(tmp_path_factory.mktemp("sources"))
    write_tiny_vocabulary(found["ocr"])
    return found


@pytest.fixture(scope="module")
def run_dir(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 of 4 steps whose pages had their vocabulary beside them."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_distributed(train, 1, run_config(sources, folder, 2))
    return folder


@pytest.fixture(scope="module")
def checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints/step_00000002"


@pytest.fixture
def wordless(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint as earlier versions wrote it."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    shutil.rmtree(copy / "vocabularies")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"][FILE]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.fixture
def page(sources: dict[str, str], tmp_path: Path) -> Path:
    path = tmp_path / "page.jpg"
    path.write_bytes(ShardSet.open(sources["ocr"]).read(3, "jpg"))
    return path


def own_sources(sources: dict[str, str], folder: Path) -> dict[str, str]:
    return {**sources, "ocr": str(shutil.copytree(sources["ocr"], folder / "pages"))}


def test_a_checkpoint_carries_the_words(
    sources: dict[str, str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Vocabulary.load(checkpoint / FILE) == Vocabulary.load(Path(sources["ocr"]) / "vocabulary.json")
    assert FILE in read_manifest(checkpoint)["files"]
    assert main(["inspect", str(checkpoint), "--verify"]) == 0
    assert f"words of ocr_labels │ 13 ({FILE})" in re.sub(" +", " ", capsys.readouterr().out)
    (checkpoint / FILE).rename(checkpoint / "moved")
    assert main(["inspect", str(checkpoint)]) == 2
    assert f"its file {FILE} is missing" in capsys.readouterr().out
    (checkpoint / "moved").rename(checkpoint / FILE)
    assert main(["inspect", sources["ocr"]]) == 0
    assert "words │ 13 (vocabulary.json)" in re.sub(" +", " ", capsys.readouterr().out)


def test_read_prints_the_words_whose_centers_are_nearest(
    sources: dict[str, str], run_dir: Path, checkpoint: Path, page: Path, tmp_path: Path, capsys: Any
) -> None:
    """The export, embedding the page as a sample of its set, gives the same words with the same scores."""
    export = tmp_path / "export"
    assert main(["convert", "export", "--checkpoint", str(checkpoint), "--output", str(export)]) == 0
    assert (export / FILE).read_bytes() == (checkpoint / FILE).read_bytes()
    assert not (export / "class_centers").exists()
    assert f"`{FILE}` holds the 13 words of a head's classes" in (export / "README.md").read_text()
    encode, settings = huggingface_encoder(load_exported_model(export), 14), SampleSettings(max_patches=16)
    embedded = embed_shard_set(encode, ShardSet.open(sources["ocr"]), settings, indices=[3])
    scores = cosine_scores(embedded.embeddings, load_class_head(checkpoint, OBJECTIVE).centers)[0]
    values, classes = scores.topk(TOP)

    capsys.readouterr()
    assert main(["read", str(run_dir), str(page), "--top", str(TOP), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["file"] == str(page)
    assert [word["index"] for word in result["words"]] == classes.tolist()
    assert [word["word"] for word in result["words"]] == [f"word{index}" for index in classes.tolist()]
    assert [word["score"] for word in result["words"]] == pytest.approx(values.tolist(), abs=TOLERANCE)

    assert main(["read", str(checkpoint), str(page), "--top", "2"]) == 0
    first, second = classes.tolist()[:2]
    expected = f"{page}\n  {values[0]:5.2f}  word{first}\n  {values[1]:5.2f}  word{second}\n"
    assert capsys.readouterr().out == expected


def test_an_export_can_carry_the_class_centers(checkpoint: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    assert main(["convert", "export", "--checkpoint", str(checkpoint), "--output", str(export), "--class-centers"]) == 0
    assert "`class_centers/NAME.safetensors` holds the class centers" in (export / "README.md").read_text()
    stored = load_file(export / f"class_centers/{OBJECTIVE}.safetensors")
    assert list(stored) == ["class_centers"]
    assert torch.equal(stored["class_centers"], load_class_head(checkpoint, OBJECTIVE).centers)
    assert len(list((export / "class_centers").iterdir())) == 3
    load_exported_model(export)


def test_evaluate_shows_the_words_of_pages(
    sources: dict[str, str], checkpoint: Path, wordless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, drawn, output = tmp_path / "export", tmp_path / "pages.png", tmp_path / "figures.json"
    assert main(["convert", "export", "--checkpoint", str(checkpoint), "--output", str(export)]) == 0
    capsys.readouterr()
    command = ["evaluate", "--model", str(export), "--shards", sources["ocr"], "--max-patches", "16"]
    command += ["--objective", OBJECTIVE, "--pages", "2", "--picture", str(drawn), "--checkpoint"]
    assert main([*command, str(checkpoint), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Words of pages; in brackets what is read but not there:")
    shards = ShardSet.open(sources["ocr"])
    embedded = embed_shard_set(
        huggingface_encoder(load_exported_model(export), 14), shards, SampleSettings(max_patches=16)
    )
    centers = load_class_head(checkpoint, OBJECTIVE).centers
    for line, row in zip(lines[start + 1 : start + 3], (0, len(shards) - 1), strict=True):
        has = [f"word{label}" for label in dict.fromkeys(shards.labels[row].tolist()) if label >= 0]
        nearest = cosine_scores(embedded.embeddings[[row]], centers)[0].topk(min(len(has), 8)).indices.tolist()
        reads = [f"word{index}" if f"word{index}" in has else f"(word{index})" for index in nearest]
        assert line == f"  {shards.key(row)}  has {', '.join(has)}  reads {', '.join(reads)}"
    figures = json.loads(output.read_text())
    assert {"first_right", "chance_first_right", "chance_mean_average_precision"} <= set(figures["labels"])
    with Image.open(drawn) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert main([*command, str(wordless)]) == 2
    assert f"--picture needs words, and the checkpoint {wordless} carries none" in capsys.readouterr().err
    clips = [sources["video"] if part == sources["ocr"] else part for part in command]
    assert main([*clips, str(checkpoint)]) == 2
    assert f"--picture draws pages, and {sources['video']} holds clips" in capsys.readouterr().err


def test_a_picture_that_cannot_be_used_does_not_stop_the_others(
    checkpoint: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.jpg").write_text("notes")
    Image.new("RGBA", (90, 40), (200, 10, 10, 80)).save(tmp_path / "glass.png")  # what the tools convert is read
    files = [str(tmp_path / "notes.jpg"), str(page), str(tmp_path / "none.jpg"), str(tmp_path / "glass.png")]
    assert main(["read", str(checkpoint), *files, "--top", "1"]) == 2
    output = capsys.readouterr()
    assert [line for line in output.out.splitlines() if not line.startswith(" ")] == [
        f"{files[0]}: not read",
        files[1],
        f"{files[2]}: not read",
        files[3],
    ]
    assert output.out.count("word") == 2
    problems = [line for line in output.err.splitlines() if line.startswith("megatron-ove: ")]
    assert problems[0].startswith(f"megatron-ove: {files[0]} is not a picture: its content begins with b'notes'")
    assert problems[1].startswith(f"megatron-ove: {files[2]} cannot be read (No such file or directory)")
    assert main(["read", str(checkpoint), files[0], "--json"]) == 2
    (result,) = json.loads(capsys.readouterr().out)
    assert result["problem"].startswith(f"{files[0]} is not a picture")


def test_find_ranks_the_pages_of_a_word(
    sources: dict[str, str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["find", str(checkpoint), sources["ocr"], "Word5,", "word2", "--top", "20", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(result["word"], result["index"]) for result in results] == [("word5", 5), ("word2", 2)]
    shards = ShardSet.open(sources["ocr"])
    keys = [shards.key(row) for row in range(len(shards))]
    for result in results:
        pages = result["pages"]
        assert sorted(page["key"] for page in pages) == sorted(keys)
        assert [page["score"] for page in pages] == sorted((page["score"] for page in pages), reverse=True)
        holding = {keys[row] for row in range(len(shards)) if result["index"] in shards.labels[row]}
        assert {page["key"] for page in pages if page["holds"]} == holding
        assert result["num_holding"] == len(holding)
        ranks = [place for place, page in enumerate(pages, start=1) if page["holds"]]
        precision = sum(number / rank for number, rank in enumerate(ranks, start=1)) / len(ranks)
        assert result["average_precision"] == pytest.approx(precision)
        assert pages[0]["shard"] == "shards/000000.tar"

    other = own_sources(sources, tmp_path)["ocr"]
    write_tiny_vocabulary(other, start="term")  # its class 5 is another word
    assert main(["find", str(checkpoint), other, "word5", "--top", "1"]) == 0
    title, line = capsys.readouterr().out.splitlines()
    assert title == "word5 (class 5): among the labels of 0 of 20 samples"
    assert re.fullmatch(r"  [- ]\d\.\d\d  no   ocr\d{6}  shards/000000\.tar", line)
    (Path(other) / "vocabulary.json").unlink()
    assert main(["find", str(checkpoint), other, "word5", "--top", "1"]) == 0
    assert f"{other} has no vocabulary.json, so which pages hold it is not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["read", "{c}", "x.jpg", "--top", "0"], "--top 0 shows nothing; give at least 1"),
        (["read", "{c}/none", "x.jpg"], "{c}/none cannot be used as a checkpoint: there is no such folder"),
        (
            ["read", "{c}", "x.jpg", "--objective", "image_labels"],
            "--objective image_labels learned no words in {c}, whose objectives are image_labels (image), ocr_labels "
            "(ocr), video_labels (video); give ocr_labels",
        ),
        (
            ["read", "{c}", "x.jpg", "--vocabulary", "{s}/vocabulary.json"],
            "--vocabulary {s}/vocabulary.json is not needed, because the checkpoint {c} carries the 13 words of",
        ),
        (
            ["find", "{c}", "{s}", "worms"],
            "the word 'worms' is not among the 13 words that {c} learned, so no class center stands for it; give one "
            "that is, for instance word0, word1, word2, word3, word4",
        ),
        (["find", "{c}", "{s}", "word1 word2"], "the word 'word1 word2' is not among the 13 words"),
    ],
)
def test_a_wrong_argument_is_a_sentence(
    sources: dict[str, str], checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    names = {"c": checkpoint, "s": sources["ocr"]}
    assert main([argument.format(**names) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-ove: ")]
    assert len(lines) == 1 and lines[0].startswith("megatron-ove: " + sentence.format(**names))


def test_a_checkpoint_without_words_needs_them_given(
    sources: dict[str, str], wordless: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["read", str(wordless), str(page)]) == 2
    assert "does not carry the words of ocr_labels, because its shard set had no vocabulary" in capsys.readouterr().err
    given = ["read", str(wordless), str(page), "--vocabulary"]
    assert main([*given, f"{sources['ocr']}/vocabulary.json", "--top", "1"]) == 0
    assert "word" in capsys.readouterr().out
    words = tuple(f"word{number}" for number in range(NUM_CLASSES["ocr"] + 1))
    Vocabulary(words, (1,) * len(words)).save(tmp_path / "longer.json")
    assert main([*given, str(tmp_path / "longer.json")]) == 2
    assert "longer.json has 14 words, more than the 13 classes of ocr_labels" in capsys.readouterr().err


def test_a_run_that_learned_no_words_says_so(
    sources: dict[str, str], tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run_config(sources, tmp_path / "run", 1)
    for section in (data["objectives"], data["data"]["sources"]):
        for name in [name for name in section if name.startswith("ocr")]:
            del section[name]
    run_distributed(train, 1, data)
    assert main(["read", str(tmp_path / "run"), str(page)]) == 2
    assert "learned no words, because it has no objective with a source of kind ocr" in capsys.readouterr().err


def test_words_are_kept_when_the_set_loses_them_and_taken_when_it_gains_them(
    sources: dict[str, str], tmp_path: Path
) -> None:
    own, run_dir = own_sources(sources, tmp_path), tmp_path / "run"
    stored, moved = Path(own["ocr"]) / "vocabulary.json", tmp_path / "moved.json"
    stored.rename(moved)
    (messages,) = run_distributed(train, 1, run_config(own, run_dir, 1))
    assert f"{stored} does not exist, so classes of objectives.ocr_labels have no words." in messages
    assert not (run_dir / "checkpoints/step_00000001/vocabularies").exists()
    shutil.copyfile(moved, stored)
    (messages,) = run_distributed(train, 1, run_config(own, run_dir, 1))
    assert f"The 13 words of objectives.ocr_labels are those of {stored}." in messages
    second = run_dir / "checkpoints/step_00000002"
    assert (second / FILE).read_bytes() == moved.read_bytes()
    words = Vocabulary.load(moved).words
    Vocabulary(words, (7,) * len(words)).save(stored)  # counted on other pages: the same words
    run_distributed(train, 1, run_config(own, run_dir, 1))
    third = run_dir / "checkpoints/step_00000003"
    assert (third / FILE).read_bytes() == stored.read_bytes() != moved.read_bytes()
    stored.unlink()
    (messages,) = run_distributed(train, 1, run_config(own, run_dir, 1))
    assert f"The words of objectives.ocr_labels are those of {third / FILE}, as before." in messages
    assert (run_dir / "checkpoints/step_00000004" / FILE).read_bytes() == (third / FILE).read_bytes()


def test_a_run_does_not_go_on_with_other_words(sources: dict[str, str], run_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    own = own_sources(sources, tmp_path)
    write_tiny_vocabulary(own["ocr"], start="term")
    checkpoint = copy / "checkpoints/step_00000002"
    sentence = (
        f"the checkpoint {checkpoint} learned the words of {checkpoint / FILE}, and {own['ocr']}/vocabulary.json has "
        "others (class 0 is 'word0' there and 'term0' here), so classes of objectives.ocr_labels would change their "
        "meaning; use the shard set that belongs to the checkpoint's vocabulary, or another run_dir to train anew"
    )
    results = run_distributed(fail_to_train, 2, run_config(own, copy, 1))
    assert results == [sentence, sentence]


def fail_to_train(rank: int, world_size: int, data: dict[str, Any]) -> str:
    from megatron_ove.errors import MegatronOveError

    try:
        train(rank, world_size, data)
    except MegatronOveError as error:
        assert error.on_every_rank
        return str(error)
    return ""


def test_a_vocabulary_of_another_set_is_refused_before_training(sources: dict[str, str], tmp_path: Path) -> None:
    own = own_sources(sources, tmp_path)
    Vocabulary(("one", "two"), (1, 1)).save(Path(own["ocr"]) / "vocabulary.json")
    (message,) = run_distributed(fail_to_train, 1, run_config(own, tmp_path / "run", 1))
    assert message.startswith(f"data.sources.ocr: {own['ocr']}/vocabulary.json has 2 words, but {own['ocr']} was ")

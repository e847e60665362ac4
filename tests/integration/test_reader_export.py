"""An exported reader is one model that transformers runs: it has the run's loss and writes what the run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ove.cli.main import main
from tests.distributed.test_text_generation import DECODERS, config_of, sources, walk_filled  # noqa: F401 - a fixture
from tests.distributed.test_toy_kinds import NUM_STEPS, SEQUENCE
from tests.support.distributed import run_distributed

PATCH = 14


@pytest.fixture(scope="module", params=list(DECODERS))
def run(request: pytest.FixtureRequest, sources: dict[str, str], tmp_path_factory: Any) -> dict[str, Any]:  # noqa: F811
    """A run of one kind of decoder under two ranks, its export, and what it wrote to held-out documents itself."""
    folder = tmp_path_factory.mktemp(request.param)
    data = config_of(sources, folder / "run", decoder=request.param, parallel={"timeout_s": 60, **SEQUENCE})
    data["optim"]["lr"] = 3e-3
    data["data"]["sources"]["documents"]["max_patches"] = 6
    data["evaluation"] = {"sets": {"read": sources["held_out"]}}
    texts = run_distributed(train_and_listen, 2, data)[0]
    checkpoint = folder / f"run/checkpoints/step_{NUM_STEPS:08d}"
    command = ["convert", "export", "--checkpoint", str(checkpoint), "--output", str(folder / "reader")]
    assert main([*command, "--reader", "read", "--average"]) == 0  # what held-out samples are measured with
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {"folder": folder / "reader", "texts": texts, "loss": rows[-1]["held_out/read/loss"], "data": data}


def train_and_listen(rank: int, size: int, data: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (wanted, written) of every answer of the last measurement."""
    from megatron_ove.objectives.text_generation import objective as module

    heard: list[Any] = []
    measure = module.measure_texts

    def listen(texts: Any) -> Any:
        heard[:] = texts
        return measure(texts)

    module.measure_texts = listen
    walk_filled(rank, size, {"run": data})
    return [(text.wanted, text.written) for text in heard]


def view_of(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the section with what is written of the documents, if there are other sources beside them."""
    section = run["data"]["objectives"]["read"]
    texts = section.get("texts", "text")
    return {**section, "texts": texts["documents"] if isinstance(texts, dict) else texts}


def load(folder: Path) -> Any:
    """Loads it as a user does, with the code of the folder."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(folder), trust_remote_code=True, dtype=torch.float32).eval()


def held_out_documents(data: dict[str, Any]) -> list[tuple[list[torch.Tensor], Any]]:
    """Returns (normalised pages, document) of the held-out set, as the run's source shows them."""
    from megatron_ove.config.data import DocumentSourceConfig
    from megatron_ove.data.sources.documents import DocumentSource
    from megatron_ove.model.patch_embed import CLIP_MEAN, CLIP_STD
    from megatron_ove.objectives.reconstruction.pictures import to_pictures
    from megatron_ove.shards.shard_set import ShardSet

    shards = ShardSet.open(data["evaluation"]["sets"]["read"])
    section = DocumentSourceConfig(kind="document", path=str(shards.directory), max_patches=6, max_pages=3)
    source = DocumentSource("d", section, shards=shards, patch_size=PATCH, device=torch.device("cpu"), num_threads=1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    found = []
    for row in range(len(shards)):
        rows, seeds = np.array([row]), np.zeros(1, dtype=np.int64)
        segments = source.segments(rows, seeds)
        target = torch.empty(int(segments.lengths.sum()), 3 * PATCH * PATCH, dtype=torch.uint8)
        assert not source.decode_into(rows, seeds, [target])
        pages = []
        for part, grid in zip(target.split(segments.lengths.tolist()), segments.grids.tolist(), strict=True):
            pages.append((to_pictures(part, 1, *grid[1:])[0].float() / 255 - mean) / std)
        found.append((pages, shards.read_document(row)))
    return found


def test_it_writes_what_the_run_writes(run: dict[str, Any]) -> None:
    from megatron_ove.shards.token_cache import TextTokenizer

    model, tokenizer = load(run["folder"]), TextTokenizer(run["folder"])
    section = view_of(run)
    written = []
    for pages, document in held_out_documents(run["data"]):
        if section.get("texts") == "turns":
            for turn, answer in zip(document.turns[:1], document.answers, strict=False):
                question = tokenizer.encode([turn.question])
                ids = model.generate([pages], questions=question, max_new_tokens=5)[0].tolist()
                written.append((answer, tokenizer.decode(ids)))
        elif section.get("texts") == "captions":
            for caption in document.captions:
                written.append((caption, tokenizer.decode(model.generate([pages], max_new_tokens=5)[0].tolist())))
        elif document.text:
            written.append((document.text, tokenizer.decode(model.generate([pages], max_new_tokens=5)[0].tolist())))
    assert written and set(written) <= set(run["texts"])
    if section.get("texts", "text") == "text":
        assert sorted(written) == sorted(run["texts"])


def test_it_has_the_loss_of_the_run(run: dict[str, Any]) -> None:
    from megatron_ove.shards.token_cache import TextTokenizer

    section = view_of(run)
    if section.get("texts", "text") != "text":
        pytest.skip("one text a document is what forward takes")
    model, tokenizer = load(run["folder"]), TextTokenizer(run["folder"])
    end, most = model.config.end_token_id, section["max_text_tokens"]
    around = len(tokenizer.encode(["reading"])[0]) + len(tokenizer.encode(["東京"])[0])
    total = count = 0.0
    for pages, document in held_out_documents(run["data"]):
        if document.text:
            labels = [*tokenizer.encode([document.text])[0], end][: most - around]
            with torch.no_grad():
                total += float(model([pages], [labels]).loss) * len(labels)
            count += len(labels)
    assert total / count == pytest.approx(run["loss"], rel=1e-5)


def test_evaluate_reads_what_stands_on_pages_and_nothing_else(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, figures = run["data"]["evaluation"]["sets"]["read"], tmp_path / "figures.json"
    command = ["evaluate", "--model", str(run["folder"]), "--shards", shards, "--output", str(figures)]
    if view_of(run)["texts"] != "text":
        assert main(command) != 0
        assert "and it is compared with what stands on the pages" in capsys.readouterr().err
        return
    assert main([*command, "--max-tokens", "5"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert set(found) == {"answers", "strict", "published"} and "8 documents" in shown and "1 more without" in shown
    wanted, written = zip(*run["texts"], strict=True)
    exact = sum(a == b for a, b in zip(wanted, written, strict=True)) / len(wanted)
    assert found["strict"]["exact"] == exact and found["strict"]["cut"] == 1.0
    assert found["published"]["edit_distance"] > 0.5
    for option in ("--objective", "--k"):
        assert main([*command, option, "3"]) != 0
        assert f"{option} has no effect on a reader" in capsys.readouterr().err
    assert main([*command, "--max-tokens", "5", "--samples", "3"]) == 0
    assert "3 documents" in capsys.readouterr().out


def test_more_tokens_than_learned_positions_is_a_sentence(run: dict[str, Any]) -> None:
    model = load(run["folder"])
    if model.config.text_config.model_type != "opt":
        model._check_room(1 << 20, 1)  # rotary positions do not end
        return
    pages, _ = held_out_documents(run["data"])[0]
    most = model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"are more than the {most} positions of the decoder"):
        model([pages], [[5] * most])
    with pytest.raises(ValueError, match="show smaller pictures or write less"):
        model.generate([pages], max_new_tokens=most)


def test_texts_of_several_lengths_are_generated_together(run: dict[str, Any]) -> None:
    model = load(run["folder"])
    pages = [pages for pages, _ in held_out_documents(run["data"])][:3]
    together = model.generate(pages, max_new_tokens=4, min_new_tokens=4)
    for row, own in zip(together, pages, strict=True):
        assert torch.equal(model.generate([own], max_new_tokens=4, min_new_tokens=4)[0], row)


def test_what_cannot_be_exported_is_a_sentence(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run["folder"].parent / f"run/checkpoints/step_{NUM_STEPS:08d}"
    command = ["convert", "export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main([*command, "--reader", "classes"]) != 0
    assert "has no objective 'classes' of kind text_generation (it has read)" in capsys.readouterr().err
    assert main([*command, "--reader", "read", "--class-centers"]) != 0
    assert "--class-centers has no effect with --reader" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

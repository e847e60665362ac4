"""Heads on regions in a run: dense float64, the same under every layout, resumed, resharded, beside a head on pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ove.data.class_counts import fill_in_class_counts
from megatron_ove.data.shard_fit import open_shard_sets
from megatron_ove.errors import ConfigError
from megatron_ove.objectives.label_fit import stored_differences
from megatron_ove.vocabulary import Vocabulary
from tests.distributed.test_toy_kinds import (
    NUM_STEPS,
    OVERLAP,
    SEQUENCE,
    VIRTUAL,
    assert_alike,
    figures,
    toy_config,
    walk,
)
from tests.support.distributed import run_distributed
from tests.support.documents import write_boxed_documents, write_tokenizer
from tests.support.tiny_run import check, write_tiny_sources

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2_sp": SEQUENCE, "pp2": {"pipeline_model_parallel_size": 2}, "vpp2": VIRTUAL, "dp2_overlap": OVERLAP},
    4: {"tp2_sp_dp2_overlap": {**SEQUENCE, **OVERLAP}},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    found = {**write_tiny_sources(folder), "tokenizer": str(write_tokenizer(folder / "tokenizer"))}
    for name, rows in {"boxed": range(19), "held_out": range(30, 41)}.items():
        found[name] = str(write_boxed_documents(folder / name, rows))
    return found


def config_of(sources: dict[str, str], run_dir: Path, **sections: Any) -> dict[str, Any]:
    """Returns a run with a head on words, one on tokens and one on whole pages."""
    data = toy_config(sources, run_dir, encoder="onevision", **sections)
    documents = {"kind": "document", "path": sources["boxed"], "max_pages": 2, "max_patches": [4, 9], "weight": 2.0}
    data["data"]["sources"] = {"documents": documents, "pages": data["data"]["sources"]["pages"]}
    head = {**data["objectives"]["classes"], "sample_rate": 0.5, "labels_per_step": 2}
    words = {**head, "source": "documents", "num_classes": None, "level": "region"}
    tokens = {**words, "class_group": "tensor"}
    words["regions"] = {"per_sample": 3}
    tokens["regions"] = {"labels": "tokens", "tokenizer": sources["tokenizer"], "per_sample": 4, "fill": "empty"}
    tokens["regions"]["pooling"] = "mean"
    pages = {**head, "source": "pages", "num_classes": 13}
    data["objectives"] = {"pages": pages, "words": words, "tokens": tokens}
    return fill_in_class_counts(check(data), "tiny").model_dump(mode="json")


@pytest.fixture(scope="module")
def reference(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("reference")
    run_distributed(walk, 1, {"one": config_of(sources, folder / "one")})
    return figures(folder / "one")


def test_each_head_learns(reference: list[dict[str, float]]) -> None:
    for name in ("words", "tokens"):
        assert reference[-1][f"loss/{name}"] < reference[0][f"loss/{name}"]
        assert f"grad_norm/{name}" in reference[0]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_agree_with_one_process(
    world_size: int, sources: dict[str, str], reference: list[dict[str, float]], tmp_path: Path
) -> None:
    configs = {
        name: config_of(sources, tmp_path / name, parallel={"timeout_s": 60, **layout})
        for name, layout in LAYOUTS[world_size].items()
    }
    run_distributed(walk, world_size, configs, timeout_s=280)
    for name in configs:
        assert_alike(figures(tmp_path / name), reference, 2e-5)


def test_a_microbatch_without_any_sample(sources: dict[str, str], tmp_path: Path) -> None:
    few = {"global_batch_size": 3}
    run_distributed(walk, 1, {"one": config_of(sources, tmp_path / "one", train=few)})
    run_distributed(walk, 4, {"four": config_of(sources, tmp_path / "four", train=few, parallel=OVERLAP)})
    assert_alike(figures(tmp_path / "four"), figures(tmp_path / "one"), 2e-5)


def test_a_run_goes_on_to_the_bit_and_in_another_layout(
    sources: dict[str, str], reference: list[dict[str, float]], tmp_path: Path
) -> None:
    half, overlap = {"stop_after_steps": 3}, {"timeout_s": 60, **OVERLAP}
    sequence = {"timeout_s": 60, **SEQUENCE, "use_distributed_optimizer": True}
    runs = {
        "straight": config_of(sources, tmp_path / "straight", parallel=overlap),
        "a": config_of(sources, tmp_path / "same", parallel=overlap, train=half),
        "b": config_of(sources, tmp_path / "same", parallel=overlap),
        "c": config_of(sources, tmp_path / "other", parallel=overlap, train=half),
        "d": config_of(sources, tmp_path / "other", parallel=sequence),
    }
    run_distributed(walk, 2, runs)
    assert figures(tmp_path / "same") == figures(tmp_path / "straight")
    assert_alike(figures(tmp_path / "other"), reference, 2e-5)


def test_held_out_regions_are_measured_alike(sources: dict[str, str], tmp_path: Path) -> None:
    import json

    found = {}
    layouts: dict[str, dict[str, Any]] = {"one": {}, "dp2": {}, "tp2": SEQUENCE}
    for name, layout in layouts.items():
        data = config_of(sources, tmp_path / name, parallel={"timeout_s": 60, **layout})
        data["evaluation"] = {"sets": {"words": sources["held_out"], "tokens": sources["held_out"]}}
        # Replicas have regions with different numbers of tokens, and tell one another all of them.
        data["objectives"]["tokens"] |= {"class_group": "stage"}
        run_distributed(walk, 1 if name == "one" else 2, {name: data})
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [
            {key: row[key] for key in row if key.startswith("held_out/")} for row in rows if "held_out_s" in row
        ]
    assert {"held_out/words/mean_average_precision", "held_out/tokens/first_right"} <= set(found["one"][-1])
    for name in ("dp2", "tp2"):
        assert_alike(found[name], found["one"], 1e-4)


def test_the_loss_and_every_gradient_are_those_of_dense_float64(sources: dict[str, str], tmp_path: Path) -> None:
    """Every region against every class, no margin."""
    data = config_of(sources, tmp_path / "run")
    section = data["objectives"]["words"] | {"sample_rate": 1.0, "margin": 0.0, "negatives": "shared"}
    section |= {"interclass_filter": 1.0, "labels_per_step": 1, "logit_scale": 8.0}
    data["objectives"] = {"words": section}
    data["freeze"] = ["encoder.head"]
    data["data"]["sources"].pop("pages")
    (found,) = run_distributed(compare, 1, data)
    assert found["regions"] > 4
    for name, (ours, dense) in found["values"].items():
        assert (ours.double() - dense).abs().max() <= 2e-5 * dense.abs().max(), name


def compare(rank: int, size: int, data: dict[str, Any]) -> dict[str, Any]:
    """Returns name -> (ours, dense float64): the loss, and its gradients by tokens, pool and class centers."""
    from megatron_ove.outputs import VisionFeatures
    from megatron_ove.parallel.class_order import rows_of_classes
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer
    from tests.support.objective_steps import begin

    config = check(data)
    trainer: Any = Trainer(config, initialize_topology(config.parallel, seed=config.seed))
    step = trainer.loader.load_step(0)
    objectives, batches = trainer.objectives, step.batches
    begin(objectives, 0, batches)
    head = objectives["words"]
    batch = max(batches, key=head.num_items)
    inputs, width = batch.inputs["words"], config.encoder.hidden_size
    pool = head.modules()["region_pool"]
    tokens = torch.randn(batch.main.num_patches, 1, width, generator=torch.Generator().manual_seed(1))
    tokens.requires_grad_()
    pack = batch.main
    features = VisionFeatures(tokens, pack.cu_seqlens, pack.grids, pack.sample)
    terms = head.forward(features, batch)
    parameters = dict(pool.named_parameters())
    ours = torch.autograd.grad(terms.loss_sum, (tokens, *parameters.values()))

    dense = {name: value.detach().double().requires_grad_() for name, value in parameters.items()}
    given = tokens.detach().double().requires_grad_()
    centers = head.centers.weight[: config.objectives["words"].num_classes].double().requires_grad_()
    losses = []
    rows = rows_of_classes(inputs.labels[:, 0], len(centers)).tolist()  # the table has classes in another order
    for region, label in enumerate(rows):
        if label < 0:
            continue
        own = given[inputs.token_rows[inputs.regions == region], 0]
        key, value = F.linear(own, dense["key_value.weight"], dense["key_value.bias"]).chunk(2, -1)
        heads = pool.num_heads
        key, value = (x.unflatten(-1, (heads, -1)) for x in (key, value))
        scores = (key * dense["probe"].unflatten(-1, (heads, -1))).sum(-1) * key.shape[-1] ** -0.5
        pooled = (scores.softmax(0)[..., None] * value).sum(0).flatten()
        pooled = F.linear(pooled, dense["out.weight"], dense["out.bias"])
        cosines = F.normalize(pooled, dim=0) @ F.normalize(centers, dim=1).T
        losses.append(F.cross_entropy(8.0 * cosines, torch.tensor(label)))
    loss = torch.stack(losses).sum()
    theirs = torch.autograd.grad(loss, (given, *dense.values()))
    values = {"loss": (terms.loss_sum.detach(), loss.detach())}
    values |= dict(zip(("tokens", *dense), zip(ours, theirs, strict=True), strict=True))
    trainer.loader.close()
    return {"regions": len(losses), "values": values}


def test_mistakes_are_sentences(sources: dict[str, str], tmp_path: Path) -> None:
    data = config_of(sources, tmp_path / "run")
    data["objectives"]["words"]["source"] = "pages"
    with pytest.raises(
        ConfigError, match="holds samples of kind ocr, which have no boxes; name sources of kind document"
    ):
        open_shard_sets(check(data))
    data = config_of(sources, tmp_path / "run")
    data["objectives"]["words"]["num_classes"] = 3
    with pytest.raises(ConfigError, match="num_classes = 3 is smaller than the 4 classes that its regions can have"):
        open_shard_sets(check(data))
    data = config_of(sources, tmp_path / "run")
    data["objectives"]["pages"]["regions"]["per_sample"] = 4
    with pytest.raises(ConfigError, match="regions has no effect with level: sample"):
        check(data)
    data = config_of(sources, tmp_path / "run")
    data["objectives"]["words"]["regions"]["unit"] = "lines"
    with pytest.raises(ConfigError, match=r"has such a box \(they have words\); use another unit"):
        open_shard_sets(check(data))
    data = config_of(sources, tmp_path / "run")
    Vocabulary(("nothing", "of", "this", "here"), (1,) * 4).save(tmp_path / "vocabulary.json")
    data["objectives"]["words"]["regions"]["vocabulary"] = str(tmp_path / "vocabulary.json")
    with pytest.raises(ConfigError, match="does a box of words hold anything that is a class"):
        open_shard_sets(check(data))
    data = config_of(sources, tmp_path / "run")
    here = config_of(sources, tmp_path / "run")["objectives"]
    for field, value in (("level", "sample"), ("pooling", "mean"), ("labels", "tokens")):
        there = {**here["words"], "regions": dict(here["words"]["regions"])}
        (there if field == "level" else there["regions"])[field] = value
        (clause,) = stored_differences("words", there, here["words"])
        assert f"{field} is {value} there" in clause
    data["objectives"]["words"]["regions"] = {"labels": "tokens"}
    with pytest.raises(ConfigError, match=r"regions\.labels: tokens does not say of which tokenizer"):
        check(data)


def test_a_checkpoint_has_the_words_and_the_pool(sources: dict[str, str], tmp_path: Path) -> None:
    from megatron_ove.convert.checkpoint_files import read_tensors
    from megatron_ove.vocabulary import Vocabulary, vocabulary_path

    run_distributed(walk, 1, {"one": config_of(sources, tmp_path / "one")})
    checkpoint = tmp_path / f"one/checkpoints/step_{NUM_STEPS:08d}"
    assert Vocabulary.load(checkpoint / vocabulary_path("words")).words == ("alpha", "東京", "a", "café")
    assert not (checkpoint / vocabulary_path("tokens")).exists()
    assert any("words.region_pool.probe" in name for name in read_tensors(checkpoint, ""))


def test_the_plan_has_the_weights_and_messages_of_regions(sources: dict[str, str], tmp_path: Path) -> None:
    from megatron_ove.planning.layout import layout_of
    from megatron_ove.planning.needs import chunk_parameters, objective_footprint

    data = config_of(sources, tmp_path / "run")
    config = check(data)
    (named,) = run_distributed(named_weights, 1, data)
    planned = chunk_parameters(config, layout_of(config, 1), stage=0, chunk=0)
    assert [(one.name, one.shape) for one in planned] == named
    assert [objective_footprint(config, name).message_width(config.objectives[name]) for name in config.objectives] == [
        2,
        6,
        8,
    ]


def named_weights(rank: int, size: int, data: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    from megatron_ove.parallel.topology import initialize_topology
    from megatron_ove.training.trainer import Trainer

    config = check(data)
    trainer: Any = Trainer(config, initialize_topology(config.parallel, seed=config.seed))
    trainer.loader.close()
    (chunk,) = trainer.chunks
    names = ((name.removeprefix("module."), tuple(one.shape)) for name, one in chunk.module.named_parameters())
    objective = re.compile(r"objectives\.\w+\.")
    return [(objective.sub("", name.removeprefix("encoder.")), shape) for name, shape in names]

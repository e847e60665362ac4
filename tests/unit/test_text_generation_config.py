"""Sections that write: mistakes get their sentence, sizes of folders are filled in, plans count what is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ove.config.loader import config_from_dict
from megatron_ove.data.class_counts import fill_in_class_counts
from megatron_ove.data.shard_fit import find_doubts, open_shard_sets
from megatron_ove.errors import ConfigError, DataError
from tests.support.distributed import run_distributed
from tests.support.documents import write_documents, write_tokenizer
from tests.support.text_decoders import SECTIONS, write_published_decoder
from tests.support.tiny_run import tiny_config
from tests.support.tool_scripts import run_script

SIZES = {"hidden_size": 48, "num_layers": 2, "num_attention_heads": 6, "ffn_hidden_size": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    write_documents(path / "set", range(14))
    write_tokenizer(path / "tokenizer")
    assert run_script("documents/cache_tokens.py", path / "set", "--tokenizer", path / "tokenizer") == 0
    return path


def plain(folder: Path, **read: Any) -> dict[str, Any]:
    data = tiny_config(dict.fromkeys(("image", "ocr", "video"), ""), folder / "run")
    source = {"kind": "document", "path": str(folder / "set"), "max_patches": 8, "max_pages": 3}
    data["data"] |= {"sources": {"documents": source}, "tokens_per_microbatch": 64, "text_tokens_per_microbatch": 80}
    section = {"kind": "text_generation", "source": "documents", "tokenizer": str(folder / "tokenizer")}
    data["objectives"] = {"read": {**section, "decoder": {"kind": "qwen2", **SIZES}, **read}}
    data["encoder"] |= {"use_head": False, "final_norm": True}
    return data


def load(data: dict[str, Any]) -> Any:
    return fill_in_class_counts(config_from_dict(data, "tiny"), "tiny")


@pytest.mark.parametrize(
    ("read", "sentence"),
    [
        ({"decoder": {"kind": "qwen2"}}, "decoder has neither path nor hidden_size, num_layers, num_attention_heads, "),
        (
            {"decoder": {"kind": "qwen2", **SIZES, "num_key_value_heads": 4}},
            "is no multiple of num_key_value_heads = 4",
        ),
        ({"decoder": {"kind": "opt", **SIZES, "num_key_value_heads": 2}}, "has no effect with kind: opt"),
        ({"decoder": {"kind": "opt", **SIZES, "num_attention_heads": 48}}, "gives no even head dim"),
        ({"tokenizer": None}, "tokenizer is not given, and neither is decoder.path"),
        (
            {"texts": {"pages": "text"}},
            "texts names pages, and source names documents; say of each source what is written",
        ),
        ({"bridge": {"kind": "queries"}}, "bridge.kind: queries does not say how many"),
        ({"bridge": {"num_queries": 3}}, "bridge.num_queries = 3 has no effect with kind: linear"),
    ],
)
def test_a_wrong_section_gets_its_sentence(read: dict[str, Any], sentence: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(plain(folder, **read))
    assert sentence in str(error.value)


def test_what_does_not_fit_the_run_gets_its_sentence(folder: Path) -> None:
    data = plain(folder)
    data["encoder"] |= {"use_head": True, "final_norm": None}
    with pytest.raises(ConfigError, match=r"encoder\.use_head = true, but no objective reads the pooled embedding"):
        load(data)
    assert load({**data, "freeze": ["encoder.head"]})
    data = plain(folder)
    data["parallel"] |= {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    data["data"]["text_tokens_per_microbatch"] = 81
    with pytest.raises(ConfigError, match=r"text_tokens_per_microbatch = 81 is not divisible by .* 2, which sequence"):
        load(data)
    data["data"]["text_tokens_per_microbatch"] = 80
    assert load(data)
    data["parallel"]["tensor_model_parallel_size"] = 4
    data["encoder"] |= {"num_attention_heads": 4, "hidden_size": 128}
    with pytest.raises(
        ConfigError, match=r"does not divide the heads, .* of objectives\.read\.decoder; use one of 1, 2, 3, 6"
    ):
        load(data)


def test_sizes_are_those_of_the_folder_or_of_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    assert load(plain(folder)).objectives["read"].decoder.vocab_size == 300
    published = write_published_decoder(tmp_path / "decoder", SECTIONS["llama"])
    found = load(plain(folder, decoder={"path": str(published)})).objectives["read"].decoder
    assert (found.kind, found.vocab_size, found.tied, found.key_value_heads) == ("llama", 256, False, 2)
    with pytest.raises(
        DataError, match=r"objectives\.read: decoder\.num_layers = 9, but .* holds a decoder with 2; leave"
    ):
        load(plain(folder, decoder={"path": str(published), "num_layers": 9}))
    whole = {**load(plain(folder, decoder={"path": str(published)})).model_dump()["objectives"]["read"]["decoder"]}
    other = {**whole, "rope_theta": 1e5}  # all sizes are there, so that nothing is to be filled in
    with pytest.raises(ConfigError, match=r"objectives\.read: decoder\.rope_theta = 100000\.0, but .* with 10000\.0"):
        open_shard_sets(load(plain(folder, decoder=other, tokenizer_fingerprint=known_fingerprint(folder))))
    with pytest.raises(DataError, match=r"is another tokenizer than tokenizer_fingerprint = 0123 says"):
        load(plain(folder, tokenizer_fingerprint="0123"))
    with pytest.raises(DataError, match=r"objectives\.read: .*nothing/config\.json cannot be read"):
        load(plain(folder, decoder={"path": str(tmp_path / "nothing")}))
    with pytest.raises(DataError, match=r"objectives\.read: .*nothing.* cannot be read \(No such file or directory\)"):
        load(plain(folder, tokenizer=str(tmp_path / "nothing")))


def test_sets_are_looked_at_before_and_after_sizes_are_known(folder: Path) -> None:
    """As `train --check` does."""
    for config in (config_from_dict(plain(folder), "tiny"), load(plain(folder))):
        assert set(open_shard_sets(config)) == {"documents"}
    missing = config_from_dict(plain(folder, decoder={"path": str(folder / "nothing")}), "tiny")
    assert "objectives.read: " in mismatches(missing)


def mismatches(config: Any) -> str:
    with pytest.raises(ConfigError) as error:
        open_shard_sets(config)
    return str(error.value)


def known_fingerprint(folder: Path) -> str:
    from megatron_ove.shards.token_cache import TextTokenizer

    return TextTokenizer(folder / "tokenizer").fingerprint


def test_what_does_not_fit_the_sets_gets_its_sentence(folder: Path, tmp_path: Path) -> None:
    published = write_published_decoder(tmp_path / "decoder", SECTIONS["llama"])
    small = load(plain(folder, decoder={"path": str(published)}))
    assert "has 300 tokens, more than decoder.vocab_size = 256; use the decoder's own tokenizer" in mismatches(small)
    long = load(plain(folder, decoder={"kind": "opt", **SIZES, "max_positions": 64}, max_text_tokens=50))
    assert "can have 74 tokens with their pictures, more than decoder.max_positions = 64" in mismatches(long)
    other = write_tokenizer_of_bytes(tmp_path / "bytes")
    assert "has no token cache of the tokenizer" in mismatches(load(plain(folder, tokenizer=str(other))))


def write_tokenizer_of_bytes(path: Path) -> Path:
    from tests.support.tool_scripts import run_script as run

    write_documents(path / "set", range(3))
    assert run("documents/train_tokenizer.py", path / "set", "--output", path / "tokenizer", "--vocab-size", 257) == 0
    return path / "tokenizer"


def test_what_of_the_texts_is_not_used_is_told(folder: Path) -> None:
    config = load(plain(folder, max_text_tokens=6))
    cut, empty = find_doubts(config, open_shard_sets(config), counts_samples=False)
    assert "of 14 samples of data.sources.documents have more than 6 tokens and are cut" in cut
    assert empty.startswith("2 of 14 samples of data.sources.documents have no text to learn from")


BRIDGES: list[dict[str, Any]] = [{}, {"kind": "pixel_shuffle"}, {"kind": "queries", "num_queries": 3}]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_plan_counts_the_weights_that_are_built(tensor: int, folder: Path) -> None:
    from megatron_ove.planning.layout import layout_of
    from megatron_ove.planning.needs import objective_footprint

    configs = []
    for kind, bridge in zip(("opt", "qwen2", "llama"), BRIDGES, strict=True):
        more = {} if kind == "opt" else {"num_key_value_heads": 2, "tied": kind == "qwen2"}
        data = plain(folder, decoder={"kind": kind, **SIZES, **more}, bridge=bridge)
        data["parallel"]["tensor_model_parallel_size"] = tensor
        configs.append(load(data))
    built = run_distributed(build_shapes, tensor, [config.model_dump(mode="json") for config in configs])[-1]
    for config, shapes in zip(configs, built, strict=True):
        planned = objective_footprint(config, "read").parameters(config, "read", layout_of(config, tensor))
        assert {one.name: one.shape for one in planned} == shapes


def build_shapes(rank: int, size: int, configs: list[dict[str, Any]]) -> list[dict[str, tuple[int, ...]]]:
    import torch

    from megatron_ove.objectives.base import ObjectiveContext
    from megatron_ove.parallel.topology import initialize_topology

    found, topology = [], None
    for data in configs:
        config = config_from_dict(data, "tiny")
        topology = topology or initialize_topology(config.parallel, seed=0)
        context = ObjectiveContext(topology, 64, 14, 0, config.optim.class_centers, torch.float32)
        built = config.kinds.objectives["text_generation"].build("read", config.objectives["read"], context)
        found.append(
            {
                f"{part}.{name}": tuple(parameter.shape)
                for part, module in built.modules().items()
                for name, parameter in module.named_parameters()
            }
        )
    return found

"""The text decoder is transformers' OPT, Qwen2 and Llama: losses, every gradient, greedy texts, under tensor ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ove.config.parallel import ParallelConfig
from megatron_ove.config.text_generation import BridgeConfig
from megatron_ove.convert.decoder_config import decoder_to_hf, read_decoder_config
from megatron_ove.convert.decoder_weights import (
    PublishedDecoder,
    decoder_from_published,
    decoder_to_published,
    published_shapes,
)
from megatron_ove.errors import CheckpointError
from tests.support.distributed import run_distributed
from tests.support.text_decoders import (
    SECTIONS,
    Expected,
    expected_of,
    published_model,
    texts_for,
    write_published_decoder,
)

LAYOUTS = [(1, False), (2, False), (2, True)]


def build(section: Any, size: int, sequence_parallel: bool, state: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Returns this rank's decoder with published weights, and its topology."""
    from megatron_ove.decoder.text_decoder import TextDecoder
    from megatron_ove.model.initialization import fill_parameters
    from megatron_ove.parallel.topology import initialize_topology

    parallel = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=sequence_parallel)
    topology = initialize_topology(parallel, seed=0)
    decoder = TextDecoder(section, topology, torch.float32)
    whole = decoder_from_published(state, section)
    fill_parameters(
        decoder.named_parameters(),
        lambda name, shape: whole[name],
        layer_offset=0,
        tensor_rank=topology.tensor_rank,
        tensor_size=topology.tensor_size,
    )
    return decoder, topology


def whole_gradients(decoder: Any, topology: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in decoder.named_parameters():
        gradient = parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=topology.tensor_group)
        parts = [torch.empty_like(gradient) for _ in range(topology.tensor_size)]
        dist.all_gather(parts, gradient.contiguous(), group=topology.tensor_group)
        if topology.tensor_size > 1 and getattr(parameter, "tensor_model_parallel", False):
            dim, stride = parameter.partition_dim, parameter.partition_stride
            pieces = [part.chunk(stride, dim) for part in parts]
            found[name] = torch.cat([own[k] for k in range(stride) for own in pieces], dim)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            found[name] = parts[0]
    return found


def compare(rank: int, size: int, kind: str, sequence_parallel: bool, expected: Expected) -> tuple[float, float, float]:
    section, texts = SECTIONS[kind], texts_for(SECTIONS[kind])
    decoder, topology = build(section, size, sequence_parallel, expected.state)
    images = texts.image_tokens.clone().requires_grad_()
    hidden = decoder(texts.token_ids, texts.cu_seqlens, images, texts.image_slots)
    losses, is_right = decoder.losses(hidden[texts.predicting], texts.token_ids[texts.predicting + 1])
    losses.sum().backward()
    assert is_right.dtype == torch.bool
    found = decoder_to_published(whole_gradients(decoder, topology), section)
    # The gradient of OPT's key biases is 0 by arithmetic: rounding is measured against the largest gradient.
    floor = 0.01 * max(gradient.abs().max() for gradient in expected.gradients.values())
    assert found.keys() == expected.gradients.keys()
    worst = max(
        float((found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=floor))
        for name, gradient in expected.gradients.items()
    )
    of_images = (images.grad - expected.image_gradient).abs().max() / expected.image_gradient.abs().max()
    return float(((losses - expected.losses) / expected.losses).abs().max()), worst, float(of_images)


@pytest.mark.parametrize("kind", SECTIONS)
def test_losses_and_gradients_are_those_of_transformers(kind: str) -> None:
    expected = expected_of(SECTIONS[kind])
    for size, sequence_parallel in LAYOUTS:
        for loss, gradient, of_images in run_distributed(compare, size, kind, sequence_parallel, expected):
            assert loss < 1e-6 and gradient < 1e-5 and of_images < 1e-5


MOST, END = 9, 7


def write(rank: int, size: int, kind: str, sequence_parallel: bool, state: Any, end: int) -> list[list[int]]:
    from megatron_ove.decoder.writing import write_greedily

    decoder, _ = build(SECTIONS[kind], size, sequence_parallel, state)
    texts = texts_for(SECTIONS[kind])
    lengths = texts.cu_seqlens.diff().tolist()
    common = (lengths, texts.image_tokens, texts.image_slots)
    return write_greedily(decoder, texts.token_ids[: sum(lengths)], *common, end_token=end, most=MOST)


@torch.no_grad()
def written_by_transformers(kind: str, end: int) -> list[list[int]]:
    model, texts = published_model(SECTIONS[kind]), texts_for(SECTIONS[kind])
    embedded = model.get_input_embeddings()(texts.token_ids).index_copy(0, texts.image_slots, texts.image_tokens)
    bounds, found = texts.cu_seqlens.tolist(), []
    for start, stop in itertools.pairwise(bounds):
        options = {"max_new_tokens": MOST, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        own = embedded[None, start:stop]
        row = model.generate(inputs_embeds=own, attention_mask=torch.ones(own.shape[:2]), **options)[0].tolist()
        found.append(row[: row.index(end)] if end in row else row)
    return found


@pytest.mark.parametrize("kind", SECTIONS)
def test_what_is_written_greedily_is_what_transformers_generates(kind: str) -> None:
    state = dict(published_model(SECTIONS[kind]).state_dict())
    free = written_by_transformers(kind, SECTIONS[kind].vocab_size - 1)
    assert len({tuple(row) for row in free}) == 3  # texts of their own, so that a mix-up shows
    end = free[0][3]  # a token that ends one text in the middle
    expected = written_by_transformers(kind, end)
    assert len(expected[0]) == free[0].index(end) < MOST
    for size, sequence_parallel in LAYOUTS:
        for written in run_distributed(write, size, kind, sequence_parallel, state, end):
            assert written == expected


@pytest.mark.parametrize("kind", SECTIONS)
def test_weights_go_both_ways_to_the_bit(kind: str, tmp_path: Path) -> None:
    section = SECTIONS[kind]
    folder = write_published_decoder(tmp_path / "decoder", section)
    found = read_decoder_config(folder)
    assert found.model_copy(update={"path": None, "max_positions": section.max_positions}) == section.model_copy(
        update={"num_key_value_heads": found.num_key_value_heads, "rope_theta": found.rope_theta}
    )
    published = PublishedDecoder(folder, found)
    whole = {name: published.whole(name) for name in published_shapes(found)}
    assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == published_shapes(found)
    state = published_model(section).state_dict()
    back = decoder_to_published(whole, found)
    assert set(state) - set(back) <= {"lm_head.weight"} and set(back) <= set(state)  # a tied copy is not in the file
    assert all(torch.equal(back[name], state[name]) for name in back)
    values = decoder_to_hf(found, dtype="float32", end_token_id=0)
    assert read_decoder_config_of(values, tmp_path) == found.model_copy(update={"path": str(tmp_path / "again")})


def read_decoder_config_of(values: dict[str, Any], tmp_path: Path) -> Any:
    import json

    (tmp_path / "again").mkdir()
    (tmp_path / "again/config.json").write_text(json.dumps(values))
    return read_decoder_config(tmp_path / "again")


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("opt", {"word_embed_proj_dim": 32}, "has word_embed_proj_dim = 32 beside hidden_size = 48"),
        ("opt", {"do_layer_norm_before": False}, "has do_layer_norm_before = False, and this decoder computes True"),
        ("qwen2", {"use_sliding_window": True}, "has use_sliding_window = True, and this decoder computes False"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "has rope_scaling = {'rope_type': 'llama3'}"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            "has rope_scaling = {'rope_type': 'llama3', 'rope_theta': 500000.0, 'factor': 8.0}, and this decoder",
        ),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "has rope_scaling = {'full_attention'"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "has partial_rotary_factor = 0.5, and this decoder computes 1.0"),
        ("llama", {"head_dim": 32}, "has head_dim = 32, and this decoder's is hidden_size / num_attention_heads = 16"),
        ("llama", {"model_type": "gpt2"}, "describes a model of type 'gpt2', and decoders of type opt, qwen2, llama"),
        ("llama", {"hidden_size": None}, "lacks hidden_size, so no decoder can be built"),
        ("llama", {"num_key_value_heads": 3}, "describes a decoder that cannot be built"),
    ],
)
def test_a_decoder_that_would_say_something_else_is_refused(
    kind: str, change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    values = {**decoder_to_hf(SECTIONS[kind], dtype="float32", end_token_id=0), **change}
    with pytest.raises(CheckpointError, match=r"again/config\.json") as error:
        read_decoder_config_of(values, tmp_path)
    assert sentence in str(error.value)


def test_rotary_positions_are_read_as_transformers_5_writes_them(tmp_path: Path) -> None:
    values = decoder_to_hf(SECTIONS["qwen2"], dtype="float32", end_token_id=0)
    del values["rope_theta"], values["rope_scaling"]
    values["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
    assert read_decoder_config_of(values, tmp_path).rope_theta == 1e6


def test_a_file_of_the_bare_model_is_read(tmp_path: Path) -> None:
    """Its names begin without the model's prefix; lm_head stands beside it."""
    from safetensors.torch import load_file, save_file

    folder = write_published_decoder(tmp_path / "decoder", SECTIONS["llama"])
    state = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in state.items()}, folder / "model.safetensors")
    section = read_decoder_config(folder)
    published = PublishedDecoder(folder, section)
    found = decoder_to_published({name: published.whole(name) for name in published_shapes(section)}, section)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_a_folder_whose_weights_are_not_its_configuration_s_is_refused(tmp_path: Path) -> None:
    folder = write_published_decoder(tmp_path / "decoder", SECTIONS["llama"])
    found = read_decoder_config(folder)
    with pytest.raises(CheckpointError, match=r"lacks 9 of the decoder's weights, e.g. model\.layers\.2\."):
        PublishedDecoder(folder, found.model_copy(update={"num_layers": 3}))
    wide = PublishedDecoder(folder, found.model_copy(update={"ffn_hidden_size": 100}))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight of another shape .*\[192, 64\], not \[200, 64\]"):
        wide.whole("transformer.layers.0.mlp.linear_fc1.weight")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"holds no readable model\.safetensors"):
        PublishedDecoder(folder, found)


BRIDGES = [BridgeConfig(), BridgeConfig(kind="pixel_shuffle"), BridgeConfig(kind="queries", num_queries=3)]


@pytest.mark.parametrize("config", BRIDGES, ids=lambda one: one.kind)
def test_a_bridge_sees_each_picture_by_itself(config: BridgeConfig) -> None:
    import numpy as np

    from megatron_ove.decoder.bridge import build_bridge, count_image_tokens, token_rows

    device = torch.device("cpu")
    bridge = build_bridge(config, 16, 8, num_heads=2, device=device, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    grids = np.array([[1, 3, 5], [1, 2, 2], [2, 1, 4]], dtype=np.int32)
    lengths = grids.prod(axis=1).astype(np.int64)
    firsts = np.array([2, 30, 20])
    tokens = torch.randn(40, 16, generator=generator)

    def run(chosen: list[int], values: torch.Tensor) -> torch.Tensor:
        rows = torch.from_numpy(token_rows(config, firsts[chosen], lengths[chosen], grids[chosen]))
        return bridge(values, rows, lengths[chosen].tolist())

    counts = count_image_tokens(config, lengths, grids)
    together = run([0, 1, 2], tokens)
    assert len(together) == counts.sum() and together.shape[1] == 8
    alone = torch.cat([run([i], tokens) for i in range(3)])
    torch.testing.assert_close(together, alone)
    changed = tokens.clone()
    changed[30:34] += torch.randn(4, 16, generator=generator)
    moved = (run([0, 1, 2], changed) - together).abs().amax(1) > 1e-6
    assert moved.tolist() == [False] * int(counts[0]) + [True] * int(counts[1]) + [False] * int(counts[2])
    assert run([], tokens).shape == (0, 8)


def test_pixel_shuffle_joins_neighbours() -> None:
    import numpy as np

    from megatron_ove.decoder.bridge import token_rows

    rows = token_rows(BridgeConfig(kind="pixel_shuffle"), np.array([10]), np.array([6]), np.array([[1, 2, 3]]))
    assert rows.tolist() == [[10, 11, 13, 14], [12, -1, 15, -1]]

"""Saving, finding, verifying and pruning checkpoints on 1 and 2 ranks, and what happens when something is wrong."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ove.checkpoint import manager as manager_module
from megatron_ove.checkpoint.manager import CheckpointManager, read_common_state
from megatron_ove.checkpoint.manifest import list_checkpoints
from megatron_ove.checkpoint.rng_state import restore_rng_state, sharded_rng_state
from megatron_ove.errors import CheckpointError
from megatron_ove.parallel import cpu_backend
from tests.support.distributed import run_distributed

ROWS, WIDTH = 7, 64


def table_state(rank: int, world_size: int, value: float) -> dict:
    """Rows of a table split unevenly over the ranks, plus plain values."""
    start, stop = ROWS * rank // world_size, ROWS * (rank + 1) // world_size
    full = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH) + value
    local = full[start:stop].clone()
    shard = ShardedTensor("table", local, local.dtype, tuple(local.shape), (ROWS, WIDTH), (start, 0), None)
    return {"table": shard, "step": int(value), "config": {"encoder": {"hidden_size": 64}}}


def save_steps(rank: int, world_size: int, folder: str, steps: list[int], keep: int = 3) -> list[str]:
    cpu_backend.install()
    checkpoints = CheckpointManager(folder, keep=keep, verify="full")
    for step in steps:
        checkpoints.save(step, table_state(rank, world_size, step), manifest_extra={"config_sha256": "abc"})
    return sorted(path.name for path in Path(folder).iterdir())


def load_latest(rank: int, world_size: int, folder: str, verify: str = "full") -> tuple[str | None, list[str], bool]:
    """Returns (folder name, warnings, whether the loaded rows are the saved ones)."""
    cpu_backend.install()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("megatron_ove.checkpoint").addHandler(handler)
    checkpoints = CheckpointManager(folder, keep=3, verify=verify)
    path = checkpoints.latest()
    if path is None:
        return None, messages, False
    template = table_state(rank, world_size, -1000)
    step = read_common_state(path)["step"]
    loaded = checkpoints.load(path, template)
    return path.name, messages, torch.equal(loaded["table"], table_state(rank, world_size, step)["table"].data)


def error_text(rank: int, world_size: int, function, *args) -> str | None:
    try:
        function(rank, world_size, *args)
    except CheckpointError as error:
        return str(error)
    return None


def change_manifest(folder: Path, old: str, new: str) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))


def flip_bit(path: Path, offset: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 2)])
def test_saved_rows_come_back_under_another_number_of_ranks(tmp_path, writers, readers):
    run_distributed(save_steps, writers, str(tmp_path), [4])
    for name, messages, equal in run_distributed(load_latest, readers, str(tmp_path)):
        assert (name, messages, equal) == ("step_00000004", [], True)


def test_older_checkpoints_are_pruned_and_step_zero_stays(tmp_path):
    (names,) = run_distributed(save_steps, 1, str(tmp_path), [0, 1, 2, 3], 2)
    assert names == ["step_00000000", "step_00000002", "step_00000003"]


def test_a_skipped_damaged_checkpoint_does_not_push_out_the_newly_written_one(tmp_path):
    run_distributed(save_steps, 1, str(tmp_path), [2, 4], 2)
    flip_bit(tmp_path / "step_00000004" / "__0_0.distcp")
    (names,) = run_distributed(save_steps, 1, str(tmp_path), [3], 1)
    assert names == ["step_00000003", "step_00000004"]
    assert run_distributed(load_latest, 1, str(tmp_path))[0][0] == "step_00000003"


def test_manifest_lists_every_file(tmp_path):
    run_distributed(save_steps, 2, str(tmp_path), [1])
    folder = tmp_path / "step_00000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 1 and manifest["config_sha256"] == "abc"
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert {"common.pt", ".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp"} <= set(manifest["files"])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: folder.rename(folder.with_name(folder.name + ".tmp")), "its name still ends in .tmp"),
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json, which is written last"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "its file __0_0.distcp is missing"),
        (lambda folder: (folder / "common.pt").write_bytes(b"short"), "its file common.pt has 5 bytes instead of"),
        (lambda folder: flip_bit(folder / "__0_0.distcp"), "its file __0_0.distcp has the checksum"),
        (lambda folder: (folder / "manifest.json").write_text('{"files":'), "its manifest.json cannot be read"),
        (lambda folder: change_manifest(folder, '"size"', '"sizd"'), "it does not say the size of the file"),
        (lambda folder: change_manifest(folder, '"crc32"', '"crc33"'), "it does not say the crc32 of the file"),
    ],
)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_sentence(tmp_path, damage, sentence):
    run_distributed(save_steps, 1, str(tmp_path), [2, 4])
    damage(tmp_path / "step_00000004")
    for name, messages, equal in run_distributed(load_latest, 2, str(tmp_path)):
        assert (name, equal) == ("step_00000002", True)
        assert all(sentence in message for message in messages)
    (_, messages, _) = run_distributed(load_latest, 1, str(tmp_path))[0]
    assert len(messages) == 1 and "Skipping checkpoint" in messages[0] and "looking for an older one" in messages[0]


def test_checksums_are_not_read_with_verify_sizes(tmp_path):
    run_distributed(save_steps, 1, str(tmp_path), [2, 4])
    flip_bit(tmp_path / "step_00000004" / "metadata.json", 2)
    checked = error_text_of_latest(tmp_path, "sizes")
    assert checked == "step_00000004"


def error_text_of_latest(folder: Path, verify: str) -> str | None:
    return run_distributed(name_of_latest, 1, str(folder), verify)[0]


def name_of_latest(rank: int, world_size: int, folder: str, verify: str) -> str | None:
    cpu_backend.install()
    path = CheckpointManager(folder, keep=3, verify=verify).latest()
    return path.name if path else None


def test_no_usable_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path):
    run_distributed(save_steps, 1, str(tmp_path), [2])
    flip_bit(tmp_path / "step_00000002" / "__0_0.distcp")
    for text in run_distributed(error_text, 2, load_latest, str(tmp_path)):
        assert text is not None
        assert text.startswith(f"none of the 1 checkpoints in {tmp_path} can be used (step_00000002: its file __0_0")
        assert text.endswith("repair the folder, or move it away to start anew")


def test_only_an_unfinished_checkpoint_means_a_fresh_start(tmp_path):
    run_distributed(save_steps, 1, str(tmp_path), [2])
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.tmp")
    name, messages, _ = run_distributed(load_latest, 1, str(tmp_path))[0]
    assert name is None and len(messages) == 1
    assert run_distributed(load_latest, 1, str(tmp_path / "missing"))[0][:2] == (None, [])


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(tmp_path):
    run_distributed(save_steps, 1, str(tmp_path), [2])
    flip_bit(tmp_path / "step_00000002" / "__0_0.distcp")
    run_distributed(save_steps, 1, str(tmp_path), [2])
    assert run_distributed(load_latest, 1, str(tmp_path))[0] == ("step_00000002", [], True)


def save_without_space(rank: int, world_size: int, folder: str) -> None:
    manager_module.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1024)
    save_steps(rank, world_size, folder, [4])


def save_and_fail(rank: int, world_size: int, folder: str, failing_rank: int, where: str) -> None:
    """The disk fills up while `failing_rank` writes its shards or the common part."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == failing_rank and where == "shards":
        torch.distributed.checkpoint.filesystem._write_item = full
    if rank == failing_rank and where == "common":
        torch.save = full
    if rank == failing_rank and where == "manifest":
        manager_module.write_manifest = full
    save_steps(rank, world_size, folder, [4])


def test_too_little_space_is_noticed_before_writing(tmp_path):
    run_distributed(save_steps, 1, str(tmp_path), [2])
    for text in run_distributed(error_text, 2, save_without_space, str(tmp_path)):
        assert text is not None
        assert text.startswith(f"cannot save the checkpoint of step 4 to {tmp_path}: it needs about 4.0 MiB and the")
        assert "free some space or lower checkpoint.keep" in text and "earlier checkpoints are untouched" in text
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


@pytest.mark.parametrize(("failing_rank", "where"), [(0, "shards"), (1, "shards"), (0, "common"), (0, "manifest")])
def test_a_full_disk_is_a_sentence_on_every_rank_and_harms_nothing(tmp_path, failing_rank, where):
    run_distributed(save_steps, 1, str(tmp_path), [2])
    texts = run_distributed(error_text, 2, save_and_fail, str(tmp_path), failing_rank, where)
    assert len(set(texts)) == 1 and texts[0] is not None
    assert texts[0].startswith(f"cannot save the checkpoint of step 4 to {tmp_path}: the disk is full; free some space")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    assert run_distributed(load_latest, 2, str(tmp_path))[0] == ("step_00000002", [], True)


def save_with_small_files_only(rank: int, world_size: int, folder: str, limit: int) -> None:
    """Every write beyond `limit` bytes of a file fails in the operating system, as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_steps(rank, world_size, folder, [4])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [100, 1000, 2000])
def test_a_write_that_the_system_refuses_is_a_sentence(tmp_path, limit):
    texts = run_distributed(error_text, 2, save_with_small_files_only, str(tmp_path), limit)
    assert len(set(texts)) == 1 and texts[0] is not None
    assert texts[0].startswith(f"cannot save the checkpoint of step 4 to {tmp_path}: ")
    assert "File too large" in texts[0] or "the disk refused a write" in texts[0]
    assert list(tmp_path.iterdir()) == []


def save_on_a_disk_with_a_quota(rank: int, world_size: int, folder: str) -> None:
    """The system reports free space that this user may not have, as it does under a quota."""
    manager_module.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9)
    save_steps(rank, world_size, folder, [4])


@pytest.mark.parametrize("size_kib", [4, 8, 16])
def test_a_disk_that_is_really_full_is_a_sentence(tmp_path, size_kib):
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        texts = run_distributed(error_text, 2, save_on_a_disk_with_a_quota, str(tmp_path))
        assert len(set(texts)) == 1 and texts[0] is not None
        assert "the disk is full" in texts[0] or "the disk refused a write, most likely because it is full" in texts[0]
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_is_no_checkpoint_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*common.pt .*is not a checkpoint of this program"):
        read_common_state(tmp_path)


def test_changed_bytes_of_the_plain_values_never_end_in_a_traceback(tmp_path):
    """Where checksums are not compared (`verify: sizes`, inspect), any byte of the pickle may be another one."""
    file = tmp_path / "common.pt"
    torch.save({"step": 3, "config": {"name": "a run", "rate": 0.5, "list": [1, (2, None)]}}, file)
    content, refused = file.read_bytes(), 0
    for offset in range(0, len(content), 3):
        file.write_bytes(content)
        flip_bit(file, offset)
        try:
            read_common_state(tmp_path)
        except CheckpointError as error:
            assert f"cannot read {file} (" in str(error)
            refused += 1
    assert refused > 20


def rng_round_trip(rank: int, world_size: int, folder: str) -> bool:
    from megatron_ove.config.parallel import ParallelConfig
    from megatron_ove.parallel.topology import initialize_topology

    initialize_topology(ParallelConfig(), seed=3 + rank)
    checkpoints = CheckpointManager(folder, keep=1, verify="full")
    path = checkpoints.save(1, {"rng": sharded_rng_state(rank=rank, world_size=world_size), "step": 1})
    before = torch.rand(3)
    state = checkpoints.load(path, {"rng": sharded_rng_state(rank=rank, world_size=world_size)})["rng"]
    restore_rng_state(state)
    return torch.equal(before, torch.rand(3))


def test_generators_of_every_rank_come_back(tmp_path):
    assert run_distributed(rng_round_trip, 2, str(tmp_path)) == [True, True]

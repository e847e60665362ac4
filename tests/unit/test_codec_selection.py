"""Which patches are kept: moving things, whatever the camera does, and nothing where nothing happens."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ove.errors import DataError
from megatron_ove.preprocess.codec.clip_store import ClipSelector, load_clip
from megatron_ove.preprocess.codec.mosaic import contact_sheet, make_mosaic
from megatron_ove.preprocess.codec.motion_chain import decode_chain, encode_chain, motion_field
from megatron_ove.preprocess.codec.saliency import fit_camera, patch_scores
from megatron_ove.preprocess.codec.selection import select_clip, select_patches
from megatron_ove.preprocess.codec.settings import CodecSettings
from megatron_ove.preprocess.input_files import InputFile
from tests.support.clips import moving_square, panning_camera, textured_background, write_video
from tests.support.patch_pictures import read_mosaic

_SETTINGS = CodecSettings(frame_height=112, frame_width=112, patch_budget=512)
_FRAME = _SETTINGS.patches_per_frame


def _touched(places: np.ndarray, side: int = 28) -> np.ndarray:
    """[t, 8, 8] bool: patches that the object covers in this frame or did in the one before."""
    touched = np.zeros((len(places), 8, 8), bool)
    for t in range(len(places)):
        for top, left in places[max(t - 1, 0) : t + 1]:
            touched[t, top // 14 : (top + side - 1) // 14 + 1, left // 14 : (left + side - 1) // 14 + 1] = True
    return touched


def _hits(positions: np.ndarray, touched: np.ndarray) -> float:
    later = positions[positions[:, 0] > 0]
    return float(touched[tuple(later.T)].mean())


@pytest.mark.parametrize("scene", [moving_square, panning_camera])
def test_the_moving_object_is_selected_and_the_background_is_not(scene) -> None:
    frames, places = scene(64)
    positions = select_patches(patch_scores(frames, _SETTINGS), _SETTINGS)
    later = positions[positions[:, 0] > 0]
    assert len(later) > 300
    assert _hits(positions, _touched(places)) > 0.9
    covered = [
        ((later == (t, (top + 14) // 14, (left + 14) // 14)).all(1)).any() for t, (top, left) in enumerate(places) if t
    ]
    assert np.mean(covered) > 0.8  # the patch at its centre, frame by frame


def test_still_clip_keeps_its_first_frame_only() -> None:
    still = np.repeat(textured_background(112, 112)[None], 64, axis=0)
    assert len(select_patches(patch_scores(still, _SETTINGS), _SETTINGS)) == _FRAME


def test_camera_noise_on_a_still_scene_keeps_few_patches() -> None:
    noise = np.random.default_rng(1).normal(0, 3, (64, 112, 112, 1))
    noisy = np.clip(textured_background(112, 112)[None] + noise, 0, 255).astype(np.uint8)
    assert len(select_patches(patch_scores(noisy, _SETTINGS), _SETTINGS)) < _FRAME + 150


def test_selection_is_sorted_unique_int32_and_deterministic() -> None:
    frames, _ = moving_square(64)
    first = select_patches(patch_scores(frames, _SETTINGS), _SETTINGS)
    assert first.dtype == np.int32
    flat = np.ravel_multi_index(tuple(first.T), (64, 8, 8))
    assert (np.diff(flat) > 0).all()
    assert len(first) <= _SETTINGS.patch_budget
    np.testing.assert_array_equal(first, select_patches(patch_scores(frames, _SETTINGS), _SETTINGS))


def test_first_frame_is_whole_and_scores_are_shares() -> None:
    frames, _ = moving_square(16)
    scores = patch_scores(frames, _SETTINGS)
    assert (scores[0] == 0).all()
    assert scores.min() >= 0 and scores.max() <= 1
    positions = select_patches(scores, _SETTINGS)
    assert (positions[:_FRAME, 0] == 0).all()


def test_budget_takes_the_best_of_all_frames_and_ties_go_to_the_earlier() -> None:
    scores = np.zeros((4, 2, 2), np.float32)
    scores[1] = 0.5
    scores[2, 0, 1], scores[3, 1, 0] = 0.9, 0.8
    settings = CodecSettings(num_frames=4, frame_height=28, frame_width=28, patch_budget=8)
    expected = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [2, 0, 1], [3, 1, 0]]
    assert select_patches(scores, settings).tolist() == expected


def test_scene_cut_is_capped() -> None:
    frames = np.concatenate([np.repeat(textured_background(112, 112, seed)[None], 32, axis=0) for seed in (1, 2)])
    positions = select_patches(patch_scores(frames, _SETTINGS), _SETTINGS)
    per_frame = np.bincount(positions[:, 0], minlength=64)
    assert per_frame[32] == int(_FRAME * _SETTINGS.max_frame_share)
    assert per_frame[33:].sum() < _FRAME / 2  # the encoder refines the new scene a little


def test_duplicates_and_bars_are_never_selected() -> None:
    scores = np.ones((6, 8, 8), np.float32)
    duplicate = np.array([False, True, False, True, True, False])
    positions = select_patches(scores, _SETTINGS, content_box=(20, 0, 72, 112), is_duplicate=duplicate)
    assert set(positions[:, 0].tolist()) == {0, 2, 5}
    assert positions[:, 1].min() == 2  # rows 2..5 lie wholly inside pixels 20..92
    assert positions[:, 1].max() == 5


def test_short_clip_selects_from_real_frames_only(tmp_path: Path) -> None:
    frames, _ = moving_square(9)
    selected = select_clip(write_video(tmp_path / "short.mp4", frames, options={"crf": "10"}), _SETTINGS)
    assert selected.clip.is_duplicate.sum() == 55
    assert not selected.clip.is_duplicate[selected.positions[:, 0]].any()
    assert len(selected.positions) > _FRAME


def test_camera_fit_recovers_pan_and_zoom_despite_an_outlier_object() -> None:
    row, column = np.mgrid[0:28, 0:28].astype(np.float32)
    field = np.stack([2.0 + 0.1 * (column - 14), -1.0 + 0.1 * (row - 14)], axis=-1)
    true = field.copy()
    field[5:12, 5:12] = (9.0, 9.0)
    field[20, 20] = np.nan
    assert np.abs(fit_camera(field, (0, 0, 112, 112)) - true).max() < 0.1
    assert (fit_camera(np.full((28, 28, 2), np.nan, np.float32), (0, 0, 112, 112)) == 0).all()


def test_motion_field_matches_a_plain_loop() -> None:
    frames, _ = panning_camera(6)
    chain = encode_chain(frames, _SETTINGS)
    fields = [field for _, field in decode_chain(chain)]
    assert len(fields) == 6
    assert np.isnan(fields[0]).all()
    assert np.nanmedian(fields[3][..., 0]) == pytest.approx(1.0, abs=0.3)  # one pixel a frame
    kind = [("w", "u1"), ("h", "u1"), ("dst_x", "i2"), ("dst_y", "i2")]
    kind += [("motion_x", "i4"), ("motion_y", "i4"), ("motion_scale", "u2")]
    blocks = np.array([(16, 8, 8, 4, 4, -8, 4), (8, 16, 28, 8, 6, 2, 4), (16, 16, 40, 8, 1, 1, 4)], kind)
    expected = np.full((4, 10, 2), np.nan)
    for block in blocks:
        left, top = (block["dst_x"] - block["w"] // 2) // 4, (block["dst_y"] - block["h"] // 2) // 4
        for row in range(top, top + block["h"] // 4):
            for column in range(left, min(left + block["w"] // 4, 10)):
                expected[row, column] = block["motion_x"] / 4, block["motion_y"] / 4
    np.testing.assert_array_equal(motion_field(blocks, 16, 40), expected)


def test_mosaic_round_trip() -> None:
    frames, _ = moving_square(4, size=56)
    positions = np.argwhere(np.random.default_rng(0).random((4, 4, 4)) < 0.6).astype(np.int32)
    mosaic = make_mosaic(frames, positions, 14)
    assert mosaic.shape == (-(-len(positions) // 16) * 14, 224, 3)
    patches = read_mosaic(mosaic, len(positions), 14)
    for patch, (t, h, w) in zip(patches, positions, strict=True):
        np.testing.assert_array_equal(patch, frames[t, h * 14 : h * 14 + 14, w * 14 : w * 14 + 14])
    assert (mosaic.reshape(-1, 14, 16, 14, 3)[-1, :, len(positions) % 16 :] == 128).all()


def test_contact_sheet_lights_selected_patches() -> None:
    frames = np.full((3, 28, 28, 3), 200, np.uint8)
    sheet = contact_sheet(frames, np.array([[1, 0, 1]], np.int32), 14, columns=2)
    assert sheet.shape == (60, 60, 3)
    lit = np.argwhere((sheet == 200).all(-1))
    assert lit.min(0).tolist() == [1, 30 + 1 + 14]
    assert lit.max(0).tolist() == [14, 30 + 28]
    assert contact_sheet(frames, np.array([[0, 0, 0]], np.int32), 14, columns=3, frame_width=14).shape == (16, 48, 3)


def test_stored_clip_round_trip_and_rerun(tmp_path: Path) -> None:
    frames, _ = moving_square(70)
    path = write_video(tmp_path / "clip.mp4", frames, options={"crf": "10"})
    selector, item = ClipSelector(tmp_path / "out", _SETTINGS), InputFile(path, "clip.mp4", "clip-1")
    stored = tmp_path / "out" / selector(item)
    clip = load_clip(stored)
    selected = select_clip(path, _SETTINGS)
    np.testing.assert_array_equal(clip.positions, selected.positions)
    assert len(clip.frames) == 64
    assert np.abs(clip.decoded_frames().astype(int) - selected.clip.frames).mean() < 6
    mosaic = np.asarray(Image.open(io.BytesIO(clip.mosaic)))
    expected = make_mosaic(selected.clip.frames, selected.positions, 14)
    assert np.abs(mosaic.astype(int) - expected).mean() < 4
    np.testing.assert_array_equal(np.load(io.BytesIO(clip.positions_npy())), selected.positions)
    assert clip.info["settings"] == _SETTINGS.as_record()
    content, time = stored.read_bytes(), stored.stat().st_mtime_ns
    selector(item)
    assert stored.stat().st_mtime_ns == time  # unchanged clip and settings: left alone
    stored.write_bytes(content[:100])
    selector(item)
    assert stored.read_bytes() == content  # damaged: made again, to the same bytes


def test_file_that_is_no_stored_clip(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match=r"x\.npz is not a stored clip .*; make it again with"):
        load_clip(tmp_path / "x.npz")

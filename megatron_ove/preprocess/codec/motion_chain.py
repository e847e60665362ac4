"""Grid frames -> x264 chain I P P P ... -> luma and motion vectors of every frame.

Re-encoding with one reference, no B frames, no deblocking and no scene-cut I frames makes the statistics of any input
codec comparable, and makes the frame a vector points to known: always the one before. One encoder thread
and no mbtree (with it x264's bits were seen to vary from run to run), so that the same frames give the same bits.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import av
import numpy as np
from av.codec.context import Flags2

from megatron_ove.preprocess.codec.settings import CodecSettings

VECTOR_CELL = 4  # pixels; H.264 motion partitions are multiples of 4


def encode_chain(frames: np.ndarray, settings: CodecSettings) -> bytes:
    """Encodes [t, height, width, 3] uint8 RGB as one H.264 group of pictures, in memory."""
    num_frames, height, width = frames.shape[:3]
    stream_bytes = io.BytesIO()
    interval = num_frames + 1
    with av.open(stream_bytes, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {
            "preset": settings.preset,
            "crf": str(settings.crf),
            "threads": "1",
            "x264-params": f"keyint={interval}:min-keyint={interval}:scenecut=0:bframes=0:ref=1:weightp=0:mbtree=0:"
            "no-deblock=1",
        }
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return stream_bytes.getvalue()


def decode_chain(chain: bytes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, per frame of an encoded chain, its luma and its motion field.

    Yields:
        luma: [height, width] uint8.
        field: [height / 4, width / 4, 2] float32, (x, y) pixels to where each 4 x 4 cell is predicted from in the frame
            before; NaN where the cell is intra coded (all of the first frame).
    """
    with av.open(io.BytesIO(chain)) as container:
        stream = container.streams.video[0]
        stream.codec_context.flags2 |= Flags2.export_mvs
        stream.codec_context.options = {"threads": "1"}
        for frame in container.decode(stream):
            plane = frame.planes[0]
            luma = np.frombuffer(bytes(plane), np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]
            side_data = frame.side_data.get("MOTION_VECTORS")
            vectors = side_data.to_ndarray() if side_data is not None else None
            yield luma, motion_field(vectors, frame.height, frame.width)


def motion_field(vectors: np.ndarray | None, height: int, width: int) -> np.ndarray:
    """Paints FFmpeg's motion vector records onto [ceil(height/4), ceil(width/4), 2] float32; NaN = no vector."""
    rows, columns = -(-height // VECTOR_CELL), -(-width // VECTOR_CELL)
    field = np.full((rows, columns, 2), np.nan, np.float32)
    if vectors is None or len(vectors) == 0:
        return field
    scale = vectors["motion_scale"].astype(np.float32)
    motion = np.stack([vectors["motion_x"] / scale, vectors["motion_y"] / scale], axis=1).astype(np.float32)
    block_width, block_height = vectors["w"].astype(np.int32), vectors["h"].astype(np.int32)
    left = (vectors["dst_x"].astype(np.int32) - block_width // 2) // VECTOR_CELL
    top = (vectors["dst_y"].astype(np.int32) - block_height // 2) // VECTOR_CELL
    for down in range(int(block_height.max()) // VECTOR_CELL):
        for right in range(int(block_width.max()) // VECTOR_CELL):
            row, column = top + down, left + right
            here = (down * VECTOR_CELL < block_height) & (right * VECTOR_CELL < block_width)
            here &= (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            field[row[here], column[here]] = motion[here]
    return field

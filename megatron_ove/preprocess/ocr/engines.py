"""OCR engines behind one small protocol, so that the engine stays replaceable.

`RapidOcrEngine` runs the PP-OCR models that ship inside the rapidocr wheel, on CPU, without a network.
`PaddleOcrEngine` runs PaddleOCR 3.7 with model folders of the user's, for other scripts and for GPUs. Every engine says
exactly what it is (`info`), and that is stored with every page: a vocabulary depends on it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ove.errors import DataError
from megatron_ove.preprocess.ocr.lines import TextLine
from megatron_ove.preprocess.ocr.reading import read_page

DETECTION_SIDE = 1280  # pixels; see tiles.py: how much of a page is searched for lines at once, at the scale it needs
MIN_DETECTION_SIDE = 256  # smaller tiles hold no line, and a page would have thousands of them


@dataclass(frozen=True)
class EngineInfo:
    """What recognized a page: package, its version, and the model files with the first 16 digits of their SHA-256."""

    name: str
    version: str
    models: Mapping[str, str]

    def as_record(self) -> dict[str, object]:
        return asdict(self)


class OcrEngine(Protocol):
    """Reads the text lines of a picture."""

    info: EngineInfo

    def recognize(self, picture: np.ndarray) -> list[TextLine]:
        """Returns the lines of a [height, width, 3] uint8 RGB picture from top to bottom; [] when there is no text."""
        ...


class RapidOcrEngine:
    """PP-OCR through onnxruntime, with one thread: run one engine per process."""

    def __init__(self, *, detection_side: int = DETECTION_SIDE) -> None:
        """Loads the models; `detection_side` is the largest side of the tiles in which lines are found."""
        import rapidocr

        self._side = detection_side
        self._engine = rapidocr.RapidOCR(
            params={
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Global.log_level": "error",
                "Global.use_preprocess_img": False,  # it would scale every page to 2,000 pixels before it is read
                "Det.limit_type": "max",
                "Det.limit_side_len": detection_side,
                "Rec.rec_batch_num": 1,  # on one thread a batch only adds padding: 15 % slower at 6
            }
        )
        folder = Path(str(rapidocr.__file__)).parent / "models"
        models = sorted(path for path in folder.glob("*.onnx") if "_cls_" not in path.name)
        self.info = EngineInfo("rapidocr", version("rapidocr"), {path.name: _digest(path) for path in models})

    def recognize(self, picture: np.ndarray) -> list[TextLine]:
        """See `OcrEngine.recognize`."""
        return read_page(picture, self._find, self._read, side=self._side)

    def _find(self, picture: np.ndarray) -> np.ndarray:
        # The classifier of upside-down lines only costs time: pages are upright.
        boxes = self._engine(_bgr(picture), use_det=True, use_cls=False, use_rec=False).boxes
        return np.zeros((0, 4, 2), np.float32) if boxes is None else np.asarray(boxes, np.float32)

    def _read(self, line: np.ndarray) -> tuple[str, float]:
        result = self._engine(_bgr(line), use_det=False, use_cls=False, use_rec=True)
        return (str(result.txts[0]), float(result.scores[0])) if result.txts and result.scores else ("", 0.0)


class PaddleOcrEngine:
    """PaddleOCR 3.7 with local model folders; nothing is downloaded."""

    def __init__(
        self,
        *,
        detection_model_dir: str | Path,
        recognition_model_dir: str | Path,
        device: str = "cpu",
        detection_side: int = DETECTION_SIDE,
    ) -> None:
        """Loads the models.

        Args:
            detection_model_dir: folder of an exported detection model (holds inference.yml).
            recognition_model_dir: folder of an exported recognition model.
            device: "cpu" or "gpu:0".
            detection_side: largest side of the tiles in which lines are found.

        Raises:
            DataError: the extra is not installed, or a folder holds no exported model.
        """
        if importlib.util.find_spec("paddleocr") is None:
            raise DataError(
                "the PaddleOCR engine needs the package paddleocr, which is not installed; run `pip install "
                "megatron_ove[ocr-paddle]` or choose --engine rapidocr"
            )
        folders = {"detection": Path(detection_model_dir), "recognition": Path(recognition_model_dir)}
        for role, folder in folders.items():
            if not (folder / "inference.yml").is_file():
                raise DataError(
                    f"the {role} model folder {folder} has no inference.yml, so it is not an exported PaddleOCR model; "
                    "download and unpack the inference model and give its folder"
                )
        from paddleocr import TextDetection, TextRecognition

        common = {"device": device, **({"cpu_threads": 1} if device == "cpu" else {})}
        self._side = detection_side
        self._detection = TextDetection(
            model_name=_model_name(folders["detection"]),
            model_dir=str(folders["detection"]),
            limit_type="max",
            limit_side_len=detection_side,
            **common,
        )
        self._recognition = TextRecognition(
            model_name=_model_name(folders["recognition"]), model_dir=str(folders["recognition"]), **common
        )
        models = {
            f"{folder.name}/{path.name}": _digest(path)
            for folder in folders.values()
            for path in sorted(folder.glob("inference.pdiparams"))
        }
        self.info = EngineInfo("paddleocr", version("paddleocr"), models)

    def recognize(self, picture: np.ndarray) -> list[TextLine]:
        """See `OcrEngine.recognize`."""
        return read_page(picture, self._find, self._read, side=self._side)

    def _find(self, picture: np.ndarray) -> np.ndarray:
        return np.asarray(self._detection.predict(_bgr(picture))[0]["dt_polys"], np.float32).reshape(-1, 4, 2)

    def _read(self, line: np.ndarray) -> tuple[str, float]:
        result = self._recognition.predict(_bgr(line))[0]
        return str(result["rec_text"]), float(result["rec_score"])


def build_engine(name: str, options: Mapping[str, Any]) -> OcrEngine:
    """Builds the engine called `name` ("rapidocr" or "paddleocr") with keyword `options`."""
    engines = {"rapidocr": RapidOcrEngine, "paddleocr": PaddleOcrEngine}
    if name not in engines:
        raise DataError(f"there is no OCR engine {name!r}; choose {' or '.join(engines)}")
    return engines[name](**options)


def _bgr(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(picture[..., ::-1])  # OpenCV's channel order


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _model_name(folder: Path) -> str:
    import yaml

    return str(yaml.safe_load((folder / "inference.yml").read_text(encoding="utf-8"))["Global"]["model_name"])

"""A folder of pictures in which `a.png` has its text in `a.txt` (or `a.TXT`, `a.json`): which belongs to which.

Both count under any name that a link in the folder gives them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ove.preprocess.file_kinds import PICTURE_SUFFIXES
from megatron_ove.preprocess.folders import list_inputs
from megatron_ove.preprocess.input_files import InputFile


@dataclass(frozen=True)
class PairedTexts:
    """What a folder holds.

    Attributes:
        pairs: every picture, sorted by name, with the names of the texts beside it; none if there is no text. Of a file
            with several sheets each is a picture.
        paths: name of a text -> its real path.
        alone: names of texts without a picture, sorted.
        unreadable: (path, reason) of what could not be looked at.
        ignored: a sentence on what is neither; "" if there is nothing.
    """

    pairs: tuple[tuple[InputFile, tuple[str, ...]], ...]
    paths: dict[str, Path]
    alone: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...]
    ignored: str


def pair_texts(folder: Path, suffixes: Sequence[str]) -> PairedTexts:
    """Looks through a folder and its subfolders; `suffixes` are those of texts, in lower case.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    listing = list_inputs(folder, "picture")
    texts = {name: path for suffix in suffixes for name, path in listing.take_others(suffix).items()}
    # A text may begin like a picture: "P1 ...", as PBM files do.
    texts |= {item.name: item.path for item in listing.inputs if item.suffix in suffixes}
    by_stem, names = defaultdict[str, list[str]](list), defaultdict[Path, list[str]](list)
    for text in sorted(texts):
        by_stem[stem(text, suffixes)].append(text)
    for name, path in sorted(listing.again.items()):
        names[path].append(name)
    pairs: list[tuple[InputFile, tuple[str, ...]]] = []
    used = set[str]()
    for item in listing.inputs:
        if item.suffix in suffixes:
            continue
        own = [text for name in (item.name, *names[item.path]) for text in by_stem[stem(name, suffixes)]]
        pairs.append((item, tuple(own)))
        used.update(own)
    return PairedTexts(
        tuple(pairs),
        texts,
        tuple(sorted(texts.keys() - used)),
        tuple((str(path), reason) for path, reason in listing.unreadable.items()),
        listing.ignored_sentence(),
    )


def stem(name: str, suffixes: Sequence[str]) -> str:
    """Returns what a picture and its text have in common; what follows the last dot of other names is part of it."""
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in (*suffixes, *PICTURE_SUFFIXES) else name

"""WebDataset tars as documents: members that follow each other and share their name up to the first dot are a sample.

Tars are streams: of one of tens of gigabytes a sample is in memory. Nothing is ever unpacked to disk, so a name or link
that would lead out of a folder can do no harm; such a member is refused all the same, as nobody means it.
"""

from __future__ import annotations

import lzma
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from megatron_ove.errors import DataError
from megatron_ove.preprocess.documents.known_text import TEXT_SUFFIXES, KnownText
from megatron_ove.preprocess.documents.preparing import DocumentInput, PageBytes
from megatron_ove.preprocess.documents.writing import count_ignored, input_refused
from megatron_ove.preprocess.file_kinds import PICTURE_SUFFIXES
from megatron_ove.preprocess.folders import list_named
from megatron_ove.preprocess.input_files import real_path, sample_key
from megatron_ove.shards.documents import MAX_DOCUMENT_BYTES

MAX_SAMPLE_BYTES = 256 << 20
"""All pictures of a sample together: it is held in memory, some at a time per worker."""
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_READ_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
_HEADER_ERROR = tarfile.HeaderError
_PIECE = 1 << 20


def list_tars(places: Sequence[Path], *, say: Callable[[str], object] = str) -> dict[str, Path]:
    """Returns the tars that were given, or lie in folders that were given, in this order.

    Args:
        places: tars and folders, which are looked through as everywhere: also behind links, but no hidden files.
        say: called with a sentence on what in a folder is left aside; `str` says nothing.

    Returns:
        Name -> real path. A name is the path below the folder that all have in common, so that keys depend on nothing
        else.

    Raises:
        DataError: one does not exist, is given twice, or a folder has none.
    """
    found: list[tuple[Path, Path]] = []  # where it was found, its real path
    for place in places:
        if place.is_dir():
            inside = list_named(place, TAR_SUFFIXES, "tar")
            for sentence in inside.sentences():
                say(sentence)
            if not inside.files:
                raise DataError(f"the folder {place} holds no tar, not even in its subfolders; give another")
            found += [(real_path(place) / name, path) for name, path in inside.files.items()]
        elif place.is_file():
            found.append((real_path(place.parent) / place.name, real_path(place)))
        else:
            raise DataError(f"the tar {place} does not exist; check the path")
    times = Counter(real for _, real in found)
    twice = next((path for path, real in found if times[real] > 1), None)
    if twice is not None:
        raise DataError(f"the tar {twice} is given twice, which would make each of its samples double; name it once")
    if len({path.name for path, _ in found}) == len(found):
        return {path.name: real for path, real in found}
    common = os.path.commonpath([path.parent for path, _ in found])
    return {path.relative_to(common).as_posix(): real for path, real in found}


@dataclass
class _Sample:
    """Members that follow each other and share a name.

    Attributes:
        name: folder and what precedes the first dot.
        pictures: the rest of the name -> content.
        texts: the rest of the name -> content.
        size: bytes of both.
        problem: the first thing that is wrong with it.
    """

    name: str
    pictures: dict[str, bytes] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    problem: str = ""

    def document(self, tar: Path, tar_name: str) -> DocumentInput:
        """Returns the document that the members make; pages are in the order of their names, 9 before 10."""
        name, problem = f"{tar}/{self.name}", self.problem
        if not problem and not self.pictures:
            problem = f"{name} has no picture"
        if not problem and not self.texts:
            problem = f"{name} has no text: no member that ends in {' or '.join(TEXT_SUFFIXES)}"
        if problem:
            return input_refused(name, problem)
        order = sorted(self.pictures, key=_natural)
        pages = tuple(PageBytes(self.pictures[rest], f"{name}.{rest}") for rest in order)
        texts = tuple(KnownText(f"{name}.{rest}", self.texts[rest]) for rest in sorted(self.texts, key=_natural))
        return DocumentInput(sample_key(f"{tar_name}/{self.name}."), name, pages, texts)


class _Member(tarfile.TarInfo):
    """A member whose reading leaves behind why it ended: `tarfile` itself takes a damaged header for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile)
        except _HEADER_ERROR as error:
            tarfile.end = error
            raise


@dataclass
class TarSamples:
    """Samples of tars, one tar after the other.

    Attributes:
        tars: name -> path, see `list_tars`.
        ignored: suffix -> number of members that are neither picture nor text, of the tars read so far.
    """

    tars: dict[str, Path]
    ignored: Counter[str] = field(default_factory=Counter)

    def inputs(self) -> Iterator[DocumentInput]:
        """Yields the documents; what is wrong with a sample, or with a tar from some place on, is a `problem`."""
        for name, path in self.tars.items():
            seen: set[str] = set()
            for sample in self._samples(path):
                if isinstance(sample, DocumentInput):
                    yield sample
                    continue
                if sample.name in seen and not sample.problem:
                    sample.problem = (
                        f"{path}/{sample.name} came earlier already: members of a sample must follow each other, and "
                        "no two samples may share a name; sort the tar by name or rename them"
                    )
                seen.add(sample.name)
                yield sample.document(path, name)

    def _samples(self, path: Path) -> Iterator[_Sample | DocumentInput]:
        """Yields the samples of one tar, and as the last one what is wrong with the tar."""
        sample: _Sample | None = None
        try:
            # As a stream: a file object that can seek would let `tarfile` go over what is cut off.
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # they would grow with the tar
                    name, rest = _split(member.name)
                    if member.isdir() or not name:
                        self.ignored["hidden files"] += not member.isdir()
                        continue
                    if sample is None or sample.name != name:
                        if sample is not None:
                            yield sample
                        sample = _Sample(name)
                    self._add(tar, member, sample, rest, path)
                problem, is_cut = _end_problem(tar)
        except _READ_ERRORS as error:
            problem, is_cut = f"is truncated or damaged ({error}), or is no tar", True
        if sample is not None and is_cut:
            reason = f"{path}/{sample.name} is the last one before the damage of its tar, so it may lack members"
            sample.problem = sample.problem or reason
        if sample is not None:
            yield sample
        if problem:
            yield input_refused(str(path), f"{path} {problem}; what came before is used, copy the tar again")

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, sample: _Sample, rest: str, path: Path) -> None:
        """Takes a member into its sample; what is wrong with it becomes the sample's problem."""
        suffix = PurePosixPath(f"a.{rest}").suffix.lower()
        is_text, is_picture = suffix in TEXT_SUFFIXES, suffix in PICTURE_SUFFIXES
        problem = _problem(member, sample)
        if not problem and not is_text and not is_picture:
            count_ignored(self.ignored, (suffix if rest else "without suffix",))
            return
        if not problem and is_text and member.size > MAX_DOCUMENT_BYTES:
            problem = f"has {member.size} bytes, more than {MAX_DOCUMENT_BYTES}, which is no text of a picture"
        if not problem and sample.size + member.size > MAX_SAMPLE_BYTES:
            problem = f"makes its sample larger than {MAX_SAMPLE_BYTES} bytes; divide the sample"
        if not problem and rest in (*sample.pictures, *sample.texts):
            problem = "is there twice; name each member once"
        if problem:
            sample.problem = sample.problem or f"{path}/{member.name} {problem}"
            return
        stream = tar.extractfile(member)
        content = b"" if stream is None else stream.read()
        sample.size += len(content)
        (sample.texts if is_text else sample.pictures)[rest] = content


def _split(name: str) -> tuple[str, str]:
    """Returns a member's folder with its name up to the first dot, "" for a hidden file, and what follows the dot."""
    folder, _, base = name.rpartition("/")
    first, _, rest = base.partition(".")
    if not first:
        return "", rest
    return (f"{folder}/{first}" if folder else first).removeprefix("./"), rest


def _problem(member: tarfile.TarInfo, sample: _Sample) -> str:
    """Returns why nobody can mean such a member, as the end of a sentence; "" if it is a file inside the tar."""
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname}, and links are not followed"
    if not member.isreg():
        return "is neither a file nor a folder, and nothing else is read"
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        return "has a name that leads out of the tar; pack it with names below one folder"
    if not sample.name.isprintable():
        return "has a name with signs that cannot be printed; rename it"
    return ""


def _end_problem(tar: tarfile.TarFile) -> tuple[str, bool]:
    """Returns what is wrong where a tar seemed to end, as part of a sentence, and whether it is cut off there.

    "" if it ended as a tar does.
    """
    end = getattr(tar, "end", None)
    if isinstance(end, tarfile.EOFHeaderError):
        stream = tar.fileobj
        while stream is not None and (piece := stream.read(_PIECE)):
            if piece.strip(b"\0"):
                return "has more behind its end, which is not read, as if two tars were joined", False
        return "", False
    if isinstance(end, tarfile.EmptyHeaderError):
        return "lacks the zeros that end a tar, so it may be truncated", True
    return f"is damaged: where a member should begin there is none ({end})", True


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Orders names as people do: page 10 comes after page 9."""
    parts = re.split(r"([0-9]+)", name)
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]

"""What stands on the pages of a microbatch, and where its pages went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_ove.batch import Samples
from megatron_ove.data.windows import Windows
from megatron_ove.shards.documents import Document

if TYPE_CHECKING:
    from megatron_ove.data.sample_reader import SampleReader


def documents_of(
    samples: Samples, sources: Sequence[str], first_segment: Sequence[int], reader: SampleReader
) -> Iterator[tuple[int, Document, Windows, int]]:
    """Yields (place in the microbatch, document, windows of pages, number of its first page among them) of every sample
    that could be read, in microbatch order within each source; of others a warning is written.

    Args:
        samples: of the microbatch.
        sources: whose samples are documents.
        first_segment: of each sample the first segment, and the end.
        reader: reads them.
    """
    for name in sources:
        if name not in samples.source_names:
            continue  # a held-out set comes under the name of one source
        own = samples.of(name)
        own = own[samples.is_valid[own]]
        if not len(own):
            continue
        rows, seeds, places = samples.row[own], samples.seed[own], own.tolist()
        windows = reader.windows(name, rows, seeds)
        assert windows is not None, "documents are pictures"
        pages = [first_segment[place + 1] - first_segment[place] for place in places]
        firsts = np.cumsum([0, *pages]).tolist()
        for place, document, first in zip(places, reader.readable_documents(name, rows), firsts, strict=False):
            if document is not None:
                yield place, document, windows, first

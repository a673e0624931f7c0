"""Cut a batch of rows into blocks, so that temporary memory stays bounded for any size of a layer.

>>> blocks = list(row_blocks((2, 5), width=10, elements=30))          # 2 x 5 rows of 10, at most 3 rows a block
>>> [(heads.start, rows.start, rows.stop) for heads, rows in blocks]
[(0, 0, 2), (0, 2, 5), (1, 0, 2), (1, 2, 5)]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

BLOCK_ELEMENTS = 2**15
"""Elements of one block: a float64 temporary is 256 KB then, and the six or so alive at once stay below 2 MB, whatever
the size of the layer. They fit a core's second-level cache and are small enough for the allocator to hand the same
pages out again: with larger blocks a small layer (4 heads of 128 rows) takes 2.5 times as long, in page faults."""


def row_blocks(shape: tuple[int, ...], width: int, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[slice, ...]]:
    """Yield index tuples that cover every row of a (shape..., width) tensor once, in order.

    Args:
        shape: shape of the rows, the last axis of the tensor left out.
        width: length of one row.
        elements: most elements in a block. A block has at least one row.

    Rows are never cut, so that the bits of a sum over a row do not depend on its block.
    """
    rows = max(1, elements // max(width, 1))
    steps = []
    for axis, size in enumerate(shape):
        below = math.prod(shape[axis + 1 :])
        steps.append(_even_slices(size, max(1, min(size, rows // max(below, 1)))))
    return itertools.product(*steps)


def _even_slices(size: int, largest: int) -> list[slice]:
    # Even parts: a remainder of a single row would be summed by several threads, in another order.
    parts = -(-size // max(largest, 1))
    edges = [size * part // parts for part in range(parts + 1)] if parts else []
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

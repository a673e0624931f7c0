"""Repair a single wrong element of the scores, the weights or the output of one attention call.

    scores, repairs = repair_scores(query, key, scores)       # the tensor itself when nothing was repaired
    repairs[0].status, repairs[0].index                       # ('repaired', (0, 2, 17, 5))

The sums of a product's rows and columns say which row and which column hold an error; their crossing is the element.
It is computed again from its operands, in float64, and replaced in a copy only if *no* correct computation could have
stored its value. So a correct element is never changed, regardless of the number of faults; ambiguous cases are left
alone and reported. Weights have no column sums: a row that is not a distribution is compared with the softmax of its
logits. Statements and proofs: docs/theory.md, T18 and T19.

>>> query, key = torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
>>> scores = query @ key.mT
>>> scores[0, 0, 1, 2] = 1e30
>>> repaired, repairs = repair_scores(query, key, scores)
>>> repaired[0, 0, 1, 2].item(), repairs[0].status, repairs[0].index, repairs[0].value_after
(4.0, 'repaired', (0, 0, 1, 2), 4.0)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bounds.core.row_check import RowCheck
from bounds.numerics.rounding import softmax_error
from bounds.products import output_sums, score_sums
from bounds.softmax import softmax_rows, softmax_sums

Index = tuple[int, int, int | None, int | None]


@dataclass(frozen=True)
class Repair:
    """The fate of one violation: one record for each head of a product, one for each row of the weights.

    Attributes:
        location: ``scores``, ``weights`` or ``out``.
        index: (batch, head, row, column); an unknown coordinate is None.
        status: ``repaired``, or ``unrepaired`` if the tensor was left as it was.
        value_before: the stored element; None unless exactly one element is wrong.
        value_after: the new value of the element; None if it was not replaced.
        layer, call: the attention call of the tensor; None and 0 if unknown.
    """

    location: str
    index: Index
    status: str
    value_before: float | None = None
    value_after: float | None = None
    layer: int | None = None
    call: int = 0


@torch.no_grad()
def repair_scores(
    query: Tensor, key: Tensor, scores: Tensor, factor: float = 1.0, addend: Tensor | None = None
) -> tuple[Tensor, tuple[Repair, ...]]:
    """Repair ``scores = factor * QK^T + addend``.

    Args:
        query: (B, H, T, d).
        key: (B, H_kv, S, d), not repeated.
        scores: (B, H, T, S), masked positions included.
        factor: what the product multiplies by.
        addend: what it adds, broadcastable to the scores.

    Returns:
        The scores, a copy if an element was replaced, and one record per violated head whose queries and keys are
        finite. (An error of a query or a key is none of the product; it reaches every score it enters.)
    """
    return _repair(_Product("scores", query, key, scores, factor, addend))


@torch.no_grad()
def repair_output(mass: Tensor, value: Tensor, out: Tensor) -> tuple[Tensor, tuple[Repair, ...]]:
    """Repair ``out = mass V``: mass (B, H, T, S), value (B, H_kv, S, D_v), out (B, H, T, D_v).

    Returns what ``repair_scores`` does, of heads whose mass and values are finite.
    """
    return _repair(_Product("out", mass, value.mT, out))


@dataclass(frozen=True, eq=False)
class _Product:
    """``factor * left right^T + addend`` as stored in ``result``, with the checks of its location.

    Shapes: left (B, H, T, p), right (B, H_kv, S, p), result (B, H, T, S).
    """

    location: str
    left: Tensor
    right: Tensor
    result: Tensor
    factor: float = 1.0
    addend: Tensor | None = None

    def rows(self) -> RowCheck:
        """Check the row sums: (B, H, T)."""
        if self.location == "scores":
            return score_sums.row_sums(self.left, self.right, self.result, self.factor, self.addend)
        return output_sums.row_sums(self.left, self.right.mT, self.result)

    def columns(self) -> RowCheck:
        """Check the column sums: (B, H, S)."""
        if self.location == "scores":
            return score_sums.column_sums(self.left, self.right, self.result, self.factor, self.addend)
        return output_sums.column_sums(self.left, self.right.mT, self.result)

    def part(self, batch: int, head: int, rows: slice, columns: slice) -> _Product:
        """Return some rows and columns of one head: a product in its own right."""
        one, heads = slice(batch, batch + 1), slice(head, head + 1)
        source = head * self.right.shape[1] // self.left.shape[1]
        addend = self.addend
        if addend is not None:
            addend = addend.broadcast_to(self.result.shape)[one, heads, rows, columns]
        return replace(
            self,
            left=self.left[one, heads, rows],
            right=self.right[one, source : source + 1, columns],
            result=self.result[one, heads, rows, columns],
            addend=addend,
        )

    def elements(self) -> RowCheck:
        """Check every element of a product of one row, or of one column: each is a sum of its own."""
        return self.columns() if self.result.shape[-2] == 1 else self.rows()

    def element(self) -> Tensor:
        """Return the one element of a product of one row and one column, computed in float64 and stored as its."""
        exact = self.factor * (self.left.double() @ self.right.double().mT)
        if self.addend is not None:
            exact = exact + self.addend.double()
        return exact.to(self.result.dtype)[0, 0, 0, 0]


def _repair(product: _Product) -> tuple[Tensor, tuple[Repair, ...]]:
    rows, columns = _broken(product.rows()), _broken(product.columns())
    repairs: list[Repair] = []
    for batch, head in (rows.any(-1) | columns.any(-1)).nonzero().tolist():
        whole = product.part(batch, head, slice(None), slice(None))
        if not bool(torch.isfinite(whole.left).all() & torch.isfinite(whole.right).all()):
            continue
        result, repair = _repair_head(product, batch, head, _places(rows[batch, head]), _places(columns[batch, head]))
        product = replace(product, result=result)
        repairs.append(repair)
    return product.result, tuple(repairs)


def _repair_head(
    product: _Product, batch: int, head: int, rows: list[int], columns: list[int]
) -> tuple[Tensor, Repair]:
    """Repair the one wrong element where the violated row crosses the violated column.

    If no column (row) is violated, because a sum of more elements has a larger tolerance, any column (row) may be it.
    """
    row, column = (places[0] if len(places) == 1 else None for places in (rows, columns))
    repair = Repair(product.location, (batch, head, row, column), "unrepaired")
    if len(rows) > 1 or len(columns) > 1:
        return product.result, repair
    wrong = _places(_broken(product.part(batch, head, _only(row), _only(column)).elements())[0, 0])
    if len(wrong) != 1:
        return product.result, repair
    row, column = (wrong[0] if place is None else place for place in (row, column))
    suspect = product.part(batch, head, _only(row), _only(column))
    value = suspect.element()
    repair = replace(repair, index=(batch, head, row, column), value_before=float(suspect.result))
    changed = product.result.clone()
    changed[batch, head, row, column] = value
    after = replace(product, result=changed)
    line = after.part(batch, head, _only(row), slice(None)).rows()
    pile = after.part(batch, head, slice(None), _only(column)).columns()
    if bool(_broken(line).any() | _broken(pile).any()):
        return product.result, repair
    return changed, replace(repair, status="repaired", value_after=float(value))


@torch.no_grad()
def repair_weights(logits: Tensor, weights: Tensor, visible: Tensor | None = None) -> tuple[Tensor, tuple[Repair, ...]]:
    """Repair ``weights = softmax(logits)``.

    Args:
        logits: (B, H, T, S), as the softmax received them.
        weights: (B, H, T, S), as it returned them.
        visible: bool, True where a query sees a key, broadcastable to (B, H, T, S); None: everywhere.

    Returns:
        The weights, a copy if an element was replaced, and one record per row that does not sum to one or leaves
        ``0 <= w <= 1``, ``w = 0`` where masked. Rows without a visible key are skipped, because their softmax is not
        defined. Rows with logits that are not finite, or that let masked keys compete, are skipped, too: their error
        happened earlier.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=weights.device) if visible is None else visible
    mask = mask.expand(*mask.shape[:-1], weights.shape[-1])
    count, seen = mask.sum(-1), mask.expand(weights.shape)
    checks = softmax_sums.row_sums(weights, count), softmax_rows.simplex(weights, count, visible)
    where = (_broken(checks[0]) | _broken(checks[1])).nonzero()
    if not len(where):
        return weights, ()
    places = tuple(where.T)
    stored = weights[places]
    judged, wrong, repaired = _repair_rows(logits[places], stored, seen[places])
    single = judged & (wrong.sum(-1) == 1)
    done = single & ~_broken(softmax_sums.row_sums(repaired, seen[places].sum(-1)))
    if bool(done.any()):
        weights = weights.clone()
        weights[tuple(where[done].T)] = repaired[done]
    records = zip(where.tolist(), wrong, stored, repaired, done.tolist(), judged.tolist(), strict=True)
    return weights, tuple(_weight_repair(*record) for *record, counts in records if counts)


def _repair_rows(logits: Tensor, stored: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which rows (m, S) can be judged, their wrong elements, and the rows without them."""
    exact, tolerance = _softmax(logits, seen.sum(-1), stored.dtype)
    judged = (torch.isfinite(exact) & ((exact == 0) | seen)).all(-1)
    # A masked key has weight zero, not nearly so.
    wrong = ~((stored.double() - exact).abs() <= tolerance.masked_fill(~seen, 0.0))
    return judged, wrong, torch.where(wrong, exact.to(stored.dtype), stored)


def _softmax(logits: Tensor, count: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the float64 softmax of rows of logits, and how far weights stored in ``dtype`` may be from it (F13)."""
    # Over all columns, as the softmax itself read them: a masked logit is too low to count.
    logits, count = logits.double(), count.unsqueeze(-1)
    exact = torch.softmax(logits, -1)
    spread = softmax_sums.largest_spread(count)
    # The weights recomputed here are no more than those of a softmax in float64.
    stored, own = softmax_error(count, spread, dtype), softmax_error(count, spread, torch.float64)
    delta = (logits.amax(-1, keepdim=True) - logits).clamp_(max=stored.reach)
    relative = stored.relative + own.relative + (stored.slope + own.slope) * delta
    return exact, (relative * exact + stored.absolute + 2 * own.absolute) * (1 + 2.0**-28)


def _weight_repair(where: list[int], wrong: Tensor, stored: Tensor, repaired: Tensor, done: bool) -> Repair:
    batch, head, row = where
    places = _places(wrong)
    if len(places) != 1:
        return Repair("weights", (batch, head, row, None), "unrepaired")
    column = places[0]
    return Repair(
        "weights",
        (batch, head, row, column),
        "repaired" if done else "unrepaired",
        float(stored[column]),
        float(repaired[column]) if done else None,
    )


def _broken(check: RowCheck) -> Tensor:
    """Return which rows fire: the decision rule of ``bounds.core.row_check``."""
    broken = ~(check.residual <= check.tolerance) | ~torch.isfinite(check.tolerance)
    return broken if check.checked is None else broken & check.checked


def _places(marks: Tensor) -> list[int]:
    places: list[int] = marks.nonzero()[:, 0].tolist()
    return places


def _only(place: int | None) -> slice:
    return slice(None) if place is None else slice(place, place + 1)

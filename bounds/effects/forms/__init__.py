"""The closed forms of faults, one module for each location (docs/theory.md, T20-T26).

    CLOSED_FORMS["scores"].exact(state, index, after, logit_map, effect)

A location whose row in ``fault_injection.locations`` says ``closed_form`` has one here.
"""

from bounds.effects.forms import key, out, query, scores, value, weights
from fault_injection.table import Table

CLOSED_FORMS = Table("location", [form.CLOSED_FORM for form in (query, key, value, scores, weights, out)])
"""The table. ``CLOSED_FORMS.register`` adds a row, ``CLOSED_FORMS.registered`` for the duration of a block."""

r"""Tables as JSON that is safe inside an HTML page.

Browsers end a script element at any ``</script``, even inside a JSON text, and ``<!--`` changes how they search for
that end. So ``<``, ``>`` and ``&`` are written as ``\u003c``, ``\u003e`` and ``\u0026``, which JSON reads as the same
characters.

>>> print(json_block({"model": "</script><!--"}))
{"model":"\u003c/script\u003e\u003c!--"}
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd

_ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def json_block(value: Any) -> str:
    """Return strict JSON (NaN and infinity become ``null``) without characters that have a meaning in HTML."""
    text = json.dumps(plain_value(value), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.translate(_ESCAPED)


def table_json(table: pd.DataFrame) -> dict[str, Any]:
    """Return a table as ``{"columns": [...], "data": [[...], ...]}``; ``pandas.DataFrame(**value)`` reads it back."""
    return {"columns": [str(name) for name in table.columns], "data": table.astype(object).to_numpy().tolist()}


def plain_value(value: Any) -> Any:
    """Return a value as one of Python's own types, with ``None`` for missing and non-finite numbers."""
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, (bool, int, float, str)) else str(value)

"""Take the options of a command out of its arguments; the remaining arguments describe a configuration.

>>> arguments = ["--shard", "1/2", "--seed", "3"]
>>> take_value(arguments, "--shard"), arguments
('1/2', ['--seed', '3'])
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.campaign.folder import CampaignFolder
from experiments.errors import UsageError


def take_flag(arguments: list[str], name: str) -> bool:
    """Remove a flag; return whether it was given."""
    present = name in arguments
    arguments[:] = [argument for argument in arguments if argument != name]
    return present


def take_value(arguments: list[str], name: str) -> str | None:
    """Remove ``name VALUE`` or ``name=VALUE``; return the value, or ``None`` if the option was not given."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            del arguments[position]
            return argument.partition("=")[2]
        if argument == name:
            if position + 1 >= len(arguments) or arguments[position + 1].startswith("--"):
                raise UsageError(f"{name}: needs a value")
            value = arguments[position + 1]
            del arguments[position : position + 2]
            return value
    return None


def whole_number(text: str, *, most: int | None = None) -> bool:
    """Return whether a text is a whole number in ASCII digits; with ``most``, a number from 1 to ``most``."""
    if not (text.isascii() and text.isdigit()):
        return False
    # Python refuses to read thousands of digits.
    return most is None or (len(text.lstrip("0")) <= len(str(most)) and 1 <= int(text.lstrip("0") or "0") <= most)


def one_folder(command: str, arguments: Sequence[str]) -> CampaignFolder:
    """Return the folder of the campaign that the only argument names."""
    if len(arguments) != 1:
        raise UsageError(f"{command}: needs one campaign folder, e.g. results/default; got {list(arguments)}")
    return CampaignFolder.existing(arguments[0])

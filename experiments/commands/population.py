"""The possible faults of a campaign's grid, counted on its model and data: places times bits.

total = print_population(config, needed=lambda faults: sample_size(0.01, 0.95, faults))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from experiments.config import ExperimentConfig
from experiments.engine.contexts import Contexts
from experiments.engine.pairs import PairedRunner
from experiments.errors import UsageError
from experiments.machine.environment import set_determinism
from experiments.plan.plan import make_plan
from fault_injection.faults.candidates import ElementPool
from fault_injection.faults.fault import bit_choices
from fault_injection.faults.kinds import BITS, FAULT_KINDS, NOTHING, that_draw
from fault_injection.numbers.bits import float_format
from monitoring import TraceWriter


def print_population(config: ExperimentConfig, needed: Callable[[int], int]) -> int:
    """Print and count the possible faults of the grid, over all inputs; layers with equal counts share a line.

    Args:
        config: the campaign; the grid may not hold several models, data sets or seeds.
        needed: how many runs so many faults need.
    """
    several = next((key for key in config.sweep if key.startswith(("model.", "data.", "fault.index", "seed"))), None)
    if several is not None:
        raise UsageError(f"sweep.{several}: faults are counted for one model and data set; give --{several} one value")
    for kind in _kinds(config):
        if FAULT_KINDS[kind].draws not in (BITS, NOTHING):
            countable = ", ".join(that_draw(BITS)), ", ".join(that_draw(NOTHING))
            raise UsageError(
                f"fault.kind: got {kind!r}, allowed {' and '.join(countable)}: its faults are not "
                "places times bits; give --population"
            )
    set_determinism(config.run.threads)
    plan, total = make_plan(config), 0
    with Contexts(TraceWriter(None)) as contexts:
        pairs = contexts.open(plan.config_of(plan.runs[0]))
        several_kinds = f" (bits of {', '.join(_kinds(config))} together)" if len(_kinds(config)) > 1 else ""
        print(f"{config.model.path}, {len(pairs.batches)} inputs: places x bits = faults{several_kinds}")
        print(f"{'location':10}{'layer':>9}{'places':>15}{'bits':>6}{'faults':>18}{'runs':>10}")
        for location in config.sweep.get("fault.location", [config.fault.location]):
            counts = list(_layers(pairs, config, location))
            for (places, bits), group in itertools.groupby(counts, key=lambda count: count[1:]):
                layers, faults = [count[0] for count in group], places * bits
                shown = str(layers[0]) if len(layers) == 1 else f"{layers[0]}..{layers[-1]} each"
                runs = needed(faults)
                print(f"{location:10}{shown:>9}{places:15,}{bits:6}{faults:18,}{runs:10,}")
            here = sum(places * bits for _, places, bits in counts)
            total += here
            if len(counts) > 1:
                print(f"{location:10}{'all':>9}{'':21}{here:18,}{needed(here):10,}")
    return total


def _layers(pairs: PairedRunner, config: ExperimentConfig, location: str) -> Iterator[tuple[int, int, int]]:
    """Yield each layer with the number of elements that may be hit (over all inputs) and the number of bits."""
    fault, first = config.fault, config.with_field("sweep", {})
    asked = config.sweep.get("fault.layers", [fault.layers])
    layers = {layer for value in asked for layer in pairs.drawing.layers(first.with_field("fault.layers", value))}
    for layer in sorted(layers):
        places = 0
        for batch_index in range(len(pairs.batches)):
            site = pairs.baseline(batch_index, first).sites[layer, location]
            places += len(ElementPool.of(site, fault.index.element(), include_masked=fault.include_masked))
        yield layer, places, sum(_choices(config, kind, site.dtype) for kind in _kinds(config))


def _kinds(config: ExperimentConfig) -> list[str]:
    """Return the different kinds of fault of the grid."""
    return list(dict.fromkeys(config.sweep.get("fault.kind", [config.fault.kind])))


def _choices(config: ExperimentConfig, kind: str, dtype: torch.dtype) -> int:
    """Return how many faults of a kind one element can have: distinct bits, or sets of them."""
    if FAULT_KINDS[kind].draws == NOTHING:
        return 1
    width, found = float_format(dtype).width, set[tuple[int, ...]]()
    for value in config.sweep.get("fault.bit", [config.fault.bit]):
        if isinstance(value, list):
            found.add(tuple(sorted(value)))
        else:
            found |= {(value,)} if isinstance(value, int) else {(bit,) for bit in bit_choices(value, dtype)}
    return sum(bits[-1] < width for bits in found)

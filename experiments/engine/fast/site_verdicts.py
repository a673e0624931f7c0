"""What the detectors say of faults at their sites, from the groups of heads that the faults hit.

    clean = CleanGroups(detectors, situation)          # a tap of the recorded fault-free pass
    verdicts = clean.judge(layer, step)                # by detector, for each fault of a site step

The verdict on a call is the verdicts on its groups of heads, joined. For a fault, all groups but one are those of the
fault-free pass, which were judged once. A detector that reads operands and their origin alone (the projections) judges
all heads of a sequence, and only where a fault changed its operand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bounds import AttentionState, Detector, Verdict
from bounds.core.sequences import by_group, gathered, groups_joined, merged, origins_by_group
from experiments.engine.fast.recording import AttentionRecord
from experiments.engine.fast.site_step import Keeper, SiteStep
from experiments.passes.taps.call_state import COMPLETE, Origins, Situation, call_state, keep_tensor, only_read
from fault_injection import AttentionCall
from fault_injection.attention.call_tensors import CallTensors
from fault_injection.locations import LOCATION_TABLE, OPERAND_TENSORS

_FIELDS = {name: LOCATION_TABLE[name].tensor for name in COMPLETE}

_ORIGIN_ONLY = frozenset({*OPERAND_TENSORS.values(), "projected"})

Verdicts = dict[str, Verdict]


def unsupported(detectors: Sequence[Detector]) -> str | None:
    """Return why some of the detectors cannot judge single groups of heads, or None if all can."""
    for detector in detectors:
        if not detector.per_group and not detector.needs <= _ORIGIN_ONLY:
            return f"detector {detector.name} judges whole layers"
        if detector.propagates and not detector.oracle and detector.name != "finite":
            return f"detector {detector.name} looks behind the fault: no proof rules out that it fires there"
    return None


class CleanGroups:
    """A tap: judges the groups of heads of a fault-free pass, and then those that faults changed.

    Args:
        detectors: prepared ones, none of them ``unsupported``.
        situation: of the input, with what oracles keep of the fault-free pass.
        origins: tells where operands come from while the pass runs.

    Attributes:
        bounds_seconds, detection_seconds: time spent in ``judge``.
    """

    locations = COMPLETE
    layers = None

    def __init__(
        self,
        detectors: Sequence[Detector],
        situation: Situation,
        origins: Origins | None = None,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self.bounds_seconds = self.detection_seconds = 0.0
        self._detectors, self._situation, self._origins = detectors, situation, origins
        self._synchronize = synchronize
        self._kept = CallTensors()
        self._verdicts: dict[tuple[str, int], list[Verdict]] = {}
        self._statistics: dict[tuple[str, int], Any] = {}
        self._fired: dict[tuple[str, int], Verdict] = {}
        self._others: dict[tuple[str, int, int], tuple[list[Verdict], list[Verdict]]] = {}
        self._layers: dict[tuple[str, int], Verdict] = {}
        self._light: dict[int, AttentionState] = {}
        self._call: dict[int, AttentionState] = {}

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Keep the tensor until the call's output is there; then judge its groups."""
        if call.number:
            return
        keep_tensor(self._kept, location, tensor, call, self._situation)
        if location != "out":
            return
        layer, kept = call.core.index, self._kept.take(call)
        with torch.no_grad(), only_read(kept, call.core.name):
            state = call_state(call, kept, self._situation, self._origins)
            groups = by_group(state)
            for detector in self._detectors:
                parts = groups if detector.per_group else state
                statistics = detector.reduce(parts) if detector.oracle else None
                if detector.oracle and statistics is None:
                    continue
                self._statistics[detector.name, layer] = statistics
                self._verdicts[detector.name, layer] = verdicts = detector.check_each(parts, statistics)
                if not detector.oracle and any(verdict.fired for verdict in verdicts):
                    # Of groups of heads no positions are kept.
                    self._fired[detector.name, layer] = detector.check(state)
        self._light[layer] = _without_operands(_without_products(groups))
        self._call[layer] = _without_products(state)

    def whole(self) -> dict[tuple[str, int], Verdict]:
        """Return by detector and layer what the verdicts on the groups say of the whole calls."""
        return {key: merged(*verdicts) for key, verdicts in self._verdicts.items()}

    @property
    def verdicts(self) -> dict[tuple[str, int], Verdict]:
        """What the detectors say of the whole calls, by ``(detector, layer)``; oracles do not judge their own pass."""
        oracles = {detector.name for detector in self._detectors if detector.oracle}
        return {key: verdict for key, verdict in self.whole().items() if key[0] not in oracles} | self._fired

    @property
    def statistics(self) -> dict[tuple[int, int], dict[str, Any]]:
        """What the oracles keep of the whole calls, by ``(layer, call)`` and detector."""
        found: dict[tuple[int, int], dict[str, Any]] = {(layer, 0): {} for layer in self._call}
        by_group = {detector.name for detector in self._detectors if detector.per_group}
        for (name, layer), kept in self._statistics.items():
            if kept is not None:
                batch = self._call[layer].rows[0]
                found[layer, 0][name] = groups_joined(kept, batch) if name in by_group else kept
        return found

    def judge(self, kept: AttentionRecord, step: SiteStep) -> list[Verdicts]:
        """Return for each fault of a step what every detector says of the layer.

        Args:
            kept: the layer's evaluation in the fault-free pass.
            step: with its tensors kept.
        """
        layer, start = kept.core.index, self._now()
        group_number = [site.sequence * kept.key.shape[1] + site.group for site in step.sites]
        numbers = torch.tensor(group_number, device=step.out.device)
        state = self._state(layer, step, numbers)
        locations = {site.fault.location for site in step.sites}
        changed = frozenset[str]().union(*(LOCATION_TABLE[location].changes for location in locations))
        looking = [each for each in self._detectors if (each.name, layer) in self._verdicts and each.needs & changed]
        found: list[Verdicts] = [{} for _ in step.sites]
        with torch.no_grad():
            for detector in looking:
                if detector.per_group:
                    detector.derive(state)
            prepared = self._now()
            self.bounds_seconds += prepared - start
            for detector in self._detectors:
                if (detector.name, layer) not in self._verdicts:
                    continue
                if not detector.per_group:
                    self._judge_operand(detector, step, found)
                elif detector in looking:
                    statistics = gathered(self._statistics[detector.name, layer], numbers)
                    verdicts = detector.check_each(state, statistics)
                    for verdict, group, of_fault in zip(verdicts, group_number, found, strict=True):
                        of_fault[detector.name] = self._joined(detector.name, layer, group, verdict)
                else:
                    for of_fault in found:
                        of_fault[detector.name] = self._layer(detector.name, layer)
        self.detection_seconds += self._now() - prepared
        return found

    def finite_behind(self, kept: AttentionRecord, seen: Keeper, sequences: Sequence[int]) -> list[Verdict] | None:
        """Return what ``finite`` says of a layer behind faults, for each sequence that was computed wholly again.

        None if the detector is not asked. All other detectors are silent there, or are not asked (``unsupported``).
        """
        layer = kept.core.index
        finite = next((each for each in self._detectors if each.name == "finite"), None)
        if finite is None:
            return None
        call, groups = self._call[layer], kept.key.shape[1]
        tensors: dict[str, Any] = {field: seen.tensors[name] for name, field in _FIELDS.items()}
        visible = gathered(call.visible, torch.tensor(sequences, device=seen.tensors["out"].device))
        own = finite.check_each(replace(call, **tensors, projected=None, score_addend=None, visible=visible))
        clean = self._verdicts[finite.name, layer]
        others = (
            [verdict for number, verdict in enumerate(clean) if number // groups != sequence] for sequence in sequences
        )
        return [merged(verdict, *rest) for verdict, rest in zip(own, others, strict=True)]

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _state(self, layer: int, step: SiteStep, numbers: Tensor) -> AttentionState:
        light, kept = self._light[layer], step.tensors
        mass, weights = kept["mass"], kept["weights"]
        same = (
            mass.data_ptr() == weights.data_ptr() and mass.stride() == weights.stride() and mass.dtype == weights.dtype
        )
        return replace(
            light,
            query=kept["q"],
            key=kept["k"],
            value=kept["v"],
            logits=kept["logits"],
            weights=weights,
            out=kept["out"],
            scores=kept["scores"],
            mass=weights if same else mass,
            score_factor=step.product.factor,
            score_addend=step.product.addend,
            # grouped for each step anew: as groups of heads they would be copies, and kept for all layers
            projected=gathered(origins_by_group(self._call[layer]), numbers),
            visible=gathered(light.visible, numbers),
            heads=gathered(light.heads, numbers),
        )

    def _judge_operand(self, detector: Detector, step: SiteStep, found: Sequence[Verdicts]) -> None:
        """Let a detector of operands judge the layer, where a fault changed its operand."""
        layer = step.sites[0].fault.layer
        for of_fault in found:
            of_fault[detector.name] = self._layer(detector.name, layer)
        for location, name in OPERAND_TENSORS.items():
            mine = [i for i, site in enumerate(step.sites) if site.fault.location == location]
            if not mine or name not in detector.needs:
                continue
            verdicts = detector.check_each(self._with_faults(step, location, mine))
            for i, verdict in zip(mine, verdicts, strict=True):
                found[i][detector.name] = self._joined(detector.name, layer, step.sites[i].sequence, verdict)

    def _with_faults(self, step: SiteStep, location: str, mine: Sequence[int]) -> AttentionState:
        """Return whole layers, one a fault, with the faulty operand; what detectors of operands do not read is 0."""
        sites, device = [step.sites[i] for i in mine], step.out.device
        call, count = self._call[sites[0].fault.layer], len(sites)
        sequence = torch.tensor([site.sequence for site in sites], device=device)
        group = torch.tensor([site.group for site in sites], device=device)
        faulty = step.tensors[location][mine]
        operand = getattr(call, OPERAND_TENSORS[location]).index_select(0, sequence)
        operand.unflatten(1, (-1, faulty.shape[1]))[torch.arange(count, device=device), group] = faulty
        tensors: dict[str, Any] = {
            name: _zero(getattr(call, name)[:1]).expand(count, -1, -1, -1)
            for name in ("query", "key", "value", "logits", "weights", "out")
        }
        tensors[OPERAND_TENSORS[location]] = operand
        origin = None if call.projected is None else call.projected.get(location)
        if origin is not None:
            own = replace(origin, projected=origin.projected.index_select(0, sequence), source=sequence)
            tensors["projected"] = {location: own}
        return replace(call, **tensors, visible=None)

    def _joined(self, name: str, layer: int, part: int, verdict: Verdict) -> Verdict:
        """Return what a detector says of the layer, given what it says of one group of heads, or one sequence."""
        verdicts = self._verdicts[name, layer]
        if verdict == verdicts[part]:
            return self._layer(name, layer)
        key = name, layer, part
        if key not in self._others:
            before, behind = verdicts[:part], verdicts[part + 1 :]
            self._others[key] = [merged(*before)] if before else [], [merged(*behind)] if behind else []
        # In order: of rows with the same margin the first one counts.
        before, behind = self._others[key]
        return merged(*before, verdict, *behind)

    def _layer(self, name: str, layer: int) -> Verdict:
        if (name, layer) not in self._layers:
            self._layers[name, layer] = merged(*self._verdicts[name, layer])
        return self._layers[name, layer]


def _without_products(state: AttentionState) -> AttentionState:
    """Return a state that keeps alive no tensor of queries by keys, but for which keys are visible."""
    return replace(
        state, logits=_zero(state.logits), weights=_zero(state.logits), mass=None, scores=None, out=_zero(state.out)
    )


def _without_operands(state: AttentionState) -> AttentionState:
    query, key, value = (_zero(getattr(state, name)) for name in OPERAND_TENSORS.values())
    return replace(state, query=query, key=key, value=value, projected=None)


def _zero(tensor: Tensor) -> Tensor:
    """Return as many zeros, of which one is in memory."""
    return tensor.new_zeros(()).expand(tensor.shape)

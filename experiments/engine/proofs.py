"""The start-up proofs of one context: found among those that are kept, or made.

proofs = Proofs(context, kept)
proof = proofs.get(config, batch_index=0)      # asked for often, found out once
"""

from __future__ import annotations

import logging

from experiments.config import ExperimentConfig
from experiments.engine.context import Context, detection_key
from experiments.engine.kept_proofs import KeptProofs, Said
from experiments.engine.proof import Proof, prove
from experiments.engine.proof_key import proof_key
from experiments.errors import CheckRefusedError
from experiments.inputs.blocks import block_chain

logger = logging.getLogger(__name__)


class Proofs:
    """Says which shortcuts are exact, for each choice of detectors and shape of input.

    Args:
        context: the model and its inputs.
        kept: proofs of earlier starts (default: none).
    """

    def __init__(self, context: Context, kept: KeptProofs | None = None) -> None:
        self._context, self._kept = context, kept
        self._known: dict[str, tuple[Proof, str]] = {}
        self._said: set[str] = set()

    def get(self, config: ExperimentConfig, batch_index: int = 0) -> Proof:
        """Return which shortcuts are exact for a configuration and inputs of the shape of this one.

        Raises:
            CheckRefusedError: ``run.engine`` is ``fast``, and changed rows alone are not exact.
        """
        proof = self.known(config, batch_index)
        if proof is None:
            proof = self._make(config, batch_index)
            self._known[self._name(config, batch_index)] = proof, "made at this start"
        self._say(self._name(config, batch_index))
        if config.run.engine == "fast" and proof.rows is not None:
            raise CheckRefusedError(f"run.engine: got 'fast', but it would not be exact here: {proof.rows}")
        return proof

    def known(self, config: ExperimentConfig, batch_index: int = 0) -> Proof | None:
        """Return the proof if it was made before, by this process or one whose proof is kept; None if it was not."""
        name = self._name(config, batch_index)
        if name not in self._known and self._kept is not None:
            key = proof_key(self._context, config, batch_index)
            found = None if key is None else self._kept.find(key)
            proof = None if found is None else self._restored(found[0])
            if found is not None and proof is not None:
                logger.info("start-up proof: kept in %s", found[1])
                self._known[name] = proof, f"kept in {found[1]}"
        return self._known[name][0] if name in self._known else None

    def _make(self, config: ExperimentConfig, batch_index: int) -> Proof:
        """Return a new proof, and keep it where that is possible."""
        key = None if self._kept is None else proof_key(self._context, config, batch_index)
        proof = prove(self._context, config, batch_index)
        if self._kept is not None and key is not None and proof.repeatable and proof.faults:
            said = {"resume": proof.resume, "rows": proof.rows, "head": proof.head, "faults": proof.faults}
            self._kept.keep(key, said)
        return proof

    def _say(self, name: str) -> None:
        """Note for provenance how runs are executed, once for each proof that is used; the last one stays."""
        if name not in self._said:
            self._said.add(name)
            proof, origin = self._known[name]
            self._context.facts["execution"] = {**proof.facts(), "proof": origin}

    def _name(self, config: ExperimentConfig, batch_index: int) -> str:
        shapes = [list(tensor.shape) for tensor in self._context.batches[batch_index].values()]
        return f"{detection_key(config)} {config.run.propagation} {shapes}"

    def _restored(self, said: Said) -> Proof | None:
        chain = block_chain(self._context.subject.model, self._context.subject.cores)
        if isinstance(chain, str):
            return None
        return Proof(chain if said["resume"] is None else None, **said)

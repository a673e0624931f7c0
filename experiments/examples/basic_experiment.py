"""A small experiment from Python: ten faults in the scores of two layers, and what they did.

Run it from the repository:  python -m experiments.examples.basic_experiment
"""

from experiments.config import ExperimentConfig
from experiments.inputs.models import load_model
from experiments.inputs.windows import make_batches
from experiments.runner import CompleteExperimentRunner
from fault_injection import check_kv_consistency, monkey_patch_model, unpatch_model


def main() -> None:
    """Load the built-in model, check K and V, inject, and print one line a run."""
    config = ExperimentConfig(
        exp_name="basic",
        injection_layers=[0, 1],
        injection_layer_mode="specific",
        injection_location="scores",
        injection_bit=30,
        tolerance=1e-5,
        num_runs=10,
    )
    loaded = load_model(config.model)
    batches = make_batches(config.data, loaded.tokenizer, config.seed, loaded.family, loaded.vocabulary)

    for name, layer in check_kv_consistency(loaded.model).items():
        print(f"{name}: K = V is {layer.kv_equal}, relative difference {layer.relative_difference:.3f}")

    model = monkey_patch_model(loaded.model)
    runner = CompleteExperimentRunner(config)
    for result in runner.run_all(model, batches):
        print(
            f"{result.run_id}: {result.outcome:9} loss_diff {result.loss_diff:+.6f}, "
            f"{result.num_violations} violations ({result.detectors or 'nobody saw it'})"
        )
    unpatch_model(model)


if __name__ == "__main__":
    main()

"""The instrumented attention: it finds the cores, probes them and shows their tensors to taps."""

"""The difference between the faulty and the fault-free output of a model."""

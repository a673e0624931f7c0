"""The fast engine: runs that compute only what their fault can have changed, bit for bit the plain pair.

chain        the blocks of a model, one after the other, and how to run it from one of them
recording    what a fault-free pass leaves behind for the runs of its input
pack         the rows of many runs as one tensor
site_step    many faults of one layer, each in its own head, evaluated together
propagation  the changed rows of many runs through the blocks behind
proof        which of these are exact on the model, dtype, device and shapes at hand
"""

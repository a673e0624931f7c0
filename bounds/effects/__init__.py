"""The effect of a fault on a layer, in closed form; a bound for undetected faults; the repair of errors."""

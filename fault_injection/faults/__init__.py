"""What a fault is, where it can lie, how it is drawn and injected."""

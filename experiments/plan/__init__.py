"""Which runs there are, who does them, and when enough are done."""

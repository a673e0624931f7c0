"""What watches or repairs a pass while it runs."""

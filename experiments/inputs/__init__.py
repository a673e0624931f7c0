"""What comes in: models, texts, windows, batches."""

"""The inputs of a campaign: models, texts, windows, batches."""

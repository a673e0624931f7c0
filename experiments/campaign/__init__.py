"""Campaigns on disk: the folder, its shards and their writers, and the merge at the end."""

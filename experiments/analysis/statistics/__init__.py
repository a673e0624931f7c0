"""Clusters, intervals and estimates: the arithmetic under the tables."""

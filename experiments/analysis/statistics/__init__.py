"""Clusters, intervals and estimates: the arithmetic behind the tables."""

"""Figures of a run: curves from its metrics, and the layout of its shards."""

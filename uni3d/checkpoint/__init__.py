"""Saving an engine and restoring it."""

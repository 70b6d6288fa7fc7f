"""Exports to other frameworks' folders."""

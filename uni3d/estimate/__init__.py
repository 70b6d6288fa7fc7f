"""Memory, traffic and files of a run, computed without running it; needs no torch."""

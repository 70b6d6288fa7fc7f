"""Parts of `python -m benchmarks.checkpoint`: a module for each kind of figure and each yardstick.

    save, load, topologies, resize, export, tiny, memory   the figures: each has functions that return rows
    subject                                                the model that is saved, as uni3d's engine holds it
    yardsticks, dcp, deepspeed_arm                         what it is measured against
    bench, ranks, workspace, procfs, table                 turns, processes, folders, counters, the table
    export_once                                            a program of its own, as `tiny` is too

This module imports nothing: `export_once` is about the memory of an interpreter that has nothing in it.
"""

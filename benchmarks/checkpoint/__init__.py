"""Parts of `python -m benchmarks.checkpoint`: a module for each kind of figure and each yardstick.

    save, load, resize, export, tiny, memory               the figures: functions that return rows
    subject                                                the model that is saved, as uni3d's engine holds it
    yardsticks, dcp, peers                                 raw calls, DCP and DeepSpeed beside it
    bench, ranks, workspace, procfs, table                 turns, processes, folders, counters, the table
    export_once, dcp_once, deepspeed_arm                   separate programs, as `tiny` is too

This module imports nothing: `export_once` measures the memory of an interpreter with nothing else loaded.
"""

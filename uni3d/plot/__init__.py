"""Figures of a run: curves from its metrics, and the layout of its shards.

    metrics     reads curves from metrics files, and checkpoints as marks on them
    curves      draws the curves
    resize      topologies before and after a resize
    layout      draws the parts that ranks hold of an atom
    schedule    draws what each rank runs when in a step
    figure      common style, and writing to files

matplotlib is loaded only when something is drawn.
"""

"""Parts of `python -m benchmarks.gpu`: what is to be measured on a GPU, in a few minutes.

    schedule        parts in order of worth, each with a time limit, within one budget; their processes
    parts           the parts: commands that are run, and rows of what they wrote
    search          the largest model with offload: which sizes are tried
    report          rows, the table and the JSON
    machine         program: the GPU, versions, cores and memory
    stall           program: the stall of an asynchronous save beside a plain copy
    offload         program: a few steps of one model with offload
    model           the model that the programs train, and files for their figures

Only the programs load torch.
"""

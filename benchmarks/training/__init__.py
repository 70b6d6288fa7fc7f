"""Parts of `python benchmarks/train.py --peers`: training by uni3d beside other libraries.

    arms                                         what is measured, and beside what
    task                                         one arm's work: model, data, optimizer; also train.py's
    worker                                       the process of one rank: steps, and what is measured of them
    trainer                                      the form in which a library is handed to the worker
    ours, with_deepspeed, with_torch             a function for each library: from a task to its steps
    launch                                       whole processes, one for each rank
    report                                       medians, ratios, tables; whether the losses agree

`task`, `worker` and `with_deepspeed` also run in an interpreter that has torch and DeepSpeed but not uni3d.
"""

"""Memory, traffic and files of a run, computed without running it.

    gpt             shape of a GPT, and the tensors that it is made of
    job             a planned training job: model, ranks and settings
    activations     memory that a forward pass keeps for the backward pass
    zero            memory and traffic of ZeRO, by formula
    memory          peak memory of each pipeline rank
    traffic         bytes sent in a step, and the pipeline bubble
    step            time of a step: compute, bubble, communication that isn't hidden
    search          topologies that fit in a memory limit, fastest first
    save            files that a save would write
    saved           boxes of a checkpoint's arrays on the ranks of any topology
    holders         parts held by the ranks that wrote a checkpoint or resume from it, and what those read

None of them loads torch. Tests compare the figures with real runs.
"""

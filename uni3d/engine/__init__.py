"""Training: `initialize` builds an engine, `Engine` trains.

Modules:
    build           `initialize`: from a model and a config to an engine
    ranks           the ranks' connections, process group and topology
    start           the first values of the parameters: drawn, read from files, or loaded by a resume
    arguments       checks of the model and the data, refusals of copies
    deepspeed_arguments  `initialize`'s less common arguments: an `mpu`, a config in base64
    training_core   the engine's calls that train: whole batches, or micro batches one by one
    checkpoint_core  its calls that save and load
    engine          `Engine`: these and DeepSpeed's names, as a module of torch
    grid            places and groups of ranks by DeepSpeed's and Megatron's names
    optimizer_face  names that DeepSpeed scripts use on the optimizer
    micro_batches   forward and backward passes of a step, without a pipeline
    step            the optimizer step: from summed gradients to updated parameters
    step_numbers    loss and norm of a step, which the host may read in the next one
    batches         checks of micro batches, the loss of one, dropout's random state
    token_means     the numbers of label tokens behind the losses of Hugging Face models
    sample_order    the order of samples
    sample_workers  the processes that load samples
    data_loader     the data loader
    given_loader    loaders and streams that the script brings as training data
    guard           failures during collective calls
    garbage         Python's garbage collector, kept out of steps
    host_threads    threads of an optimizer that steps in host memory
"""

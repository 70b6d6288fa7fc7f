"""Checkpoints of a run: saving and restoring an engine, or what another trainer trains.

Modules:
    checkpointer, functions  other trainers' checkpoints, by an object or by single calls
    random_states      generators of random numbers of all ranks, as an object of a Checkpointer
    save               plan the shards, snapshot them, write them with the manifest
    restore            check that a checkpoint fits the engine, then load it
    newest_tag         the newest checkpoint of a run
    copies             copies of a tensor on several ranks, compared before a save
    flat_states        FSDP1's parameters and their states, gathered for a save, and read by rows
    lost_ranks         ranks that are lost meanwhile, told by one error
    pinned             the bounded host memory of a load into a GPU
    background         the host memory of an asynchronous save
    extra_state        what modules and optimizers keep besides tensors by parameter: taken apart, put back
    extra_load         the extra states of a checkpoint: compared, read, given back
    json_state         states of schedulers and loops as JSON
    data_state         where the script's own loaders of data stand
    known_kinds        values that only others of the same kind can replace
    several            several optimizers or schedulers, handled as one
    tied               weights that are tied in a checkpoint alone, or in a run alone
    optimizer_groups   hyperparameters and scalars of an optimizer, by parameter name
    model_spec         the model's own description, for the manifest
    adapters           its adapters of peft, for the manifest
    live_weights       a live model's weights as plain tensors
    stored_weights     a checkpoint's weights as plain tensors, read when asked for
    file_weights       weights in safetensors files, of which each rank reads its parts
"""

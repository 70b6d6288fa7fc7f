"""Readers of other frameworks' checkpoints. None of those frameworks is needed, and none of their code runs.

A reader raises CheckpointError if anything is missing, damaged, inconsistent or unsupported.

Modules:
    detect         which framework wrote a file or folder, and the reader for it
    source         the result of a reader: arrays that are read on demand, and everything else
    write          write a source as a checkpoint of uni3d, array by array
    in_place       the same, read and loaded without writing it
    trial          a process that tries pickles first, with limits of memory and time
    pickles        the restricted unpickler: plain containers, tensors, inert stand-ins; nothing else
    torch_files    files of `torch.save`, mapped into memory
    torch_tensors  tensors in those files; each storage is verified when it is first read
    weight_files   the one set of weights in a folder, and the files that aren't read
    state_dicts    safetensors files, and `state_dict`s saved by `torch.save`
    tensor_parts   parts of tensors in safetensors files
    dcp            torch's distributed checkpoint
    accelerate     the folders of accelerate and transformers' Trainer under FSDP
    trainer_files  the optimizer, the schedule and the number of steps beside weights
    deepspeed      DeepSpeed's checkpoints, universal ones too
    megatron       Megatron-core's distributed checkpoint
"""

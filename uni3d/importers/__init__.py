"""Checkpoints of other frameworks, read so that they can be imported. No code of theirs is run, or needed.

    pickles       the restricted unpickler: plain containers, tensors, inert stand-ins; all else is refused
    torch_files   files of `torch.save`, mapped into memory
    torch_tensors the tensors in them, each storage verified when it is first read
    source        what a reader finds: arrays that are read when they are asked for, and all that is beside
    kinds         which framework wrote a folder or file, and its reader
    write         a source's arrays as a checkpoint's atoms, streamed

Each of the others reads one kind: `safetensors_files`, `torch_state_dicts`, `deepspeed*`, `dcp`, `megatron`.
"""

"""Exports in torch's own formats, whose files hold pickles that torch writes. Loads torch.

Modules:
    dcp                   a folder that `torch.distributed.checkpoint.load` reads
    deepspeed_universal   a folder that DeepSpeed loads with `load_universal`
    megatron              a folder that Megatron-core's distributed checkpointing loads
    optimizer             the optimizer's record, as torch's `state_dict` has it
    torch_file            one file of `torch.save`, streamed
"""

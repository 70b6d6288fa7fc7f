"""Script for torchrun: save a run by DCP twice, here and in DCP's own process, into the folder given."""

import sys

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcp_runs import save, state_of, trained
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import uni3d

if __name__ == "__main__":
    dist.init_process_group("gloo")
    state = state_of(trained(sharded=True))
    save(state, sys.argv[1], "here")
    writer = uni3d.dcp.StorageWriter(sys.argv[1], "process")
    kind = AsyncCheckpointerType.PROCESS
    dcp.async_save(state, storage_writer=writer, async_checkpointer_type=kind).result()
    dist.destroy_process_group()

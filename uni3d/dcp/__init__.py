"""Storage for torch's distributed checkpoint (DCP): `dcp.save` and `dcp.load` on universal checkpoints.

    dcp.save(state_dict, storage_writer=uni3d.dcp.StorageWriter(run))
    dcp.load(state_dict, storage_reader=uni3d.dcp.StorageReader(run))

The writer makes a whole checkpoint of uni3d out of the state_dict, by the rules by which `uni3d import` reads
DCP's own folders: weights and optimizer states become atoms, hyperparameters and step counts go into the
manifest, and what lies beside them is the client state. The reader fills a state_dict from any checkpoint of
uni3d, whoever saved it.

Modules:
    writer   StorageWriter
    reader   StorageReader
    live     the state_dict that is being saved, described from the plans and values of all ranks
    arrays   its tensors as parts of arrays
    names    the state_dict's names that a checkpoint can fill
    form     the state_dict's form, for the manifest
    values   values that JSON can represent, and back
"""

from uni3d.dcp.reader import StorageReader
from uni3d.dcp.writer import StorageWriter

__all__ = ["StorageReader", "StorageWriter"]

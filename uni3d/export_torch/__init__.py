"""Exports in torch's own formats, whose files hold pickles that torch writes. Loads torch.

Modules:
    torch_file   one file of `torch.save`, streamed
"""

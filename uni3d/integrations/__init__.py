"""Checkpoints for the loops of other libraries, each in a module of its own that imports its library.

Modules:
    transformers  a callback for the Trainer of Hugging Face's transformers
    accelerate    checkpoints of all that an Accelerator has prepared
    lightning     a callback for the Trainer of PyTorch Lightning
"""

"""Exports to other frameworks' folders.

Modules:
    hugging_face   config.json and tensors by their Hugging Face names
    new_folder     a folder that appears under its name when it is whole
    peft_adapters  a model's adapters, as peft saves them
"""

"""Optimizers, learning-rate schedules and loss scaling.

Modules:
    optimizers     the config's optimizer, over this rank's parts of the parameters
    adam           Adam and AdamW
    lion           Lion
    muon           Muon for matrices with AdamW for the rest
    lr_schedules   formulas of DeepSpeed's learning-rate schedules
    schedule_classes  these as classes, and the config's
    loss_scale     the loss scale of fp16
"""

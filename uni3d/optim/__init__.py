"""Optimizers, learning-rate schedules and loss scaling.

Modules:
    optimizers     the config's optimizer, over this rank's parts of the parameters
    lion           Lion
    muon           Muon for matrices with AdamW for the rest
    lr_schedules   DeepSpeed's learning-rate schedules
    loss_scale     the loss scale of fp16
"""

"""Numbers of label tokens behind the mean losses that Hugging Face models compute.

Such a model hands its labels to its `loss_function`, which returns a mean over those that aren't masked.
Micro batches can have unequal numbers of them, so their means must not be averaged alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

LIBRARY = "transformers"
MASKED = -100
"""Label that `transformers` leaves out, by default."""
TOKEN_MEANS = {
    "ForCausalLMLoss",
    "ForMaskedLMLoss",
    "ForTokenClassification",
    "ForSequenceClassificationLoss",
}
"""Loss functions of `transformers` that return a mean over unmasked labels.

Others stay means of micro batches: they have no masks, or are sums of several means.
"""


class Counted:
    """Counts of the labels that the loss function was called with, one for each call."""

    def __init__(self) -> None:
        self.counts: list[Tensor | None] = []

    @property
    def terms(self) -> Tensor | None:
        """Number of terms in the model's mean loss; None if it isn't one mean over label tokens."""
        return self.counts[0] if len(self.counts) == 1 else None


@contextmanager
def counted_labels(model: nn.Module) -> Iterator[Counted]:
    """Count the labels of the loss that the model computes inside.

    The loss function is also given their number as `num_items_in_batch`, at least 1, so that the loss of a
    micro batch without any is 0 rather than 0 / 0.
    """
    counted, owner = Counted(), _with_loss_function(model)
    if owner is None:
        yield counted
        return
    inner: Callable[..., Tensor] = owner.loss_function
    own = vars(owner).get("_loss_function")  # set by the script, or absent

    def count_and_call(*args: Any, **kwargs: Any) -> Tensor:
        terms = _count(inner, args, kwargs)
        counted.counts.append(terms)
        if terms is not None:
            kwargs["num_items_in_batch"] = terms.clamp(min=1)
        return inner(*args, **kwargs)

    owner.loss_function = count_and_call
    try:
        yield counted
    finally:
        if own is None:
            del owner._loss_function
        else:
            owner.loss_function = own


def _with_loss_function(model: nn.Module) -> Any:
    """Return the model of `transformers` that this is, or that `peft` has wrapped, or None."""
    base = getattr(model, "get_base_model", None)
    model = base() if callable(base) else model
    ours = any(kind.__module__.split(".")[0] == LIBRARY for kind in type(model).__mro__)
    return model if ours and hasattr(type(model), "loss_function") else None


def _count(loss_function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the number of labels that the mean is over, or None if it isn't known to be over labels."""
    name = getattr(loss_function, "__name__", "")
    if name not in TOKEN_MEANS or not loss_function.__module__.startswith(f"{LIBRARY}."):
        return None
    given = inspect.signature(loss_function).bind(*args, **kwargs).arguments
    given = given | given.get("kwargs", {})
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if name == "ForSequenceClassificationLoss":
        config = given["config"]
        if config.num_labels == 1 or config.problem_type not in (None, "single_label_classification"):
            return None
    if name == "ForCausalLMLoss" and isinstance(labels, Tensor):
        labels = labels[..., 1:] if shifted is None else shifted  # a token predicts the next one
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    counts: Tensor = labels != given.get("ignore_index", MASKED)
    return counts.sum()

"""Optimizer with states of its own: a count, a tensor, and a state that belongs to no parameter."""

from typing import Any

import torch


class Paced(torch.optim.Optimizer):
    """Optimizer whose rate depends on a count, a tensor and a state that belongs to no parameter."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.seen, self.average = 0, torch.zeros(2)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen += 1
        self.average = 0.5 * self.average + self.seen
        shared = self.state["global"]
        shared["decay"] = shared.get("decay", 1.0) * 0.75
        shared["past"] = torch.cat([shared.get("past", torch.zeros(0)), self.average[:1]])
        factor = shared["decay"] * (1 + self.average.sum().item() + len(shared["past"]))
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["count"] = torch.zeros_like(p, dtype=torch.int32)
                    state["count"] += 1
                    p.sub_(p.grad * state["count"], alpha=group["lr"] * factor)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seen": self.seen, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mine = dict(state_dict)
        self.seen, self.average = mine.pop("seen"), mine.pop("average")
        super().load_state_dict(mine)

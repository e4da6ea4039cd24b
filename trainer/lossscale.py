"""fp16's loss scale: gradients that would vanish in 16 bits are scaled up; where one overflows, the step is left out.

As `torch.amp.GradScaler` does it. That one refuses gradients in fp16, which trained weights in fp16 have, and counts
where a checkpoint does not see it.
"""

from __future__ import annotations

from dataclasses import dataclass

from xflux_trainer.errors import UserError

FLOOR = 2.0**-10
"""Below it nothing is gained: it takes 26 overflows in a row, of gradients that are not finite whatever their scale."""


@dataclass
class LossScale:
    """Halved after an overflow, doubled after `interval` steps without one: GradScaler's own numbers."""

    scale: float = 65536.0
    good: int = 0
    """Steps without an overflow since the scale last changed."""
    interval: int = 2000

    def update(self, overflow: bool) -> None:
        """After a step's norm is known, alike on all ranks. Raises `UserError` where halving does not help."""
        if overflow:
            self.scale, self.good = self.scale / 2, 0
            if self.scale < FLOOR:
                error = UserError(
                    "The gradients overflow in fp16 at every step, however small their scale.",
                    "Set mixed_precision to bf16, or lower learning_rate. The last checkpoint is unharmed.",
                )
                error.everywhere = True
                raise error
            return
        self.good += 1
        if self.good == self.interval:
            self.scale, self.good = self.scale * 2, 0

    def scalars(self) -> dict[str, float]:
        return {"loss_scale": self.scale, "growth_tracker": float(self.good)}

    def load(self, scalars: dict[str, float]) -> None:
        """What `scalars` gave; a checkpoint of a run without a scale leaves it as it is."""
        self.scale = scalars.get("loss_scale", self.scale)
        self.good = int(scalars.get("growth_tracker", self.good))

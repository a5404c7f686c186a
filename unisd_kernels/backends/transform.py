"""Constants of a head at a temperature: from a raw product to a logit and back."""

from __future__ import annotations

from dataclasses import dataclass

from unisd_kernels.heads import LMHead


@dataclass(frozen=True)
class LogitTransform:
    """Constants between the raw product `x = h W^T + b` and the logit `z = softcap_c(a x) / tau`."""

    logit_scale: float
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, head: LMHead, temperature: float) -> LogitTransform:
        return cls(head.logit_scale, head.softcap, temperature)

    @property
    def product_scale(self) -> float:
        """Factor of the raw product before the tile is handed over: all of the transform without a cap, the argument of
        the tanh with one. Matrix products apply it for free (`alpha`)."""
        return self.logit_scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def tanh_scale(self) -> float | None:
        """Factor `c / tau` of the tanh; None without a cap."""
        return None if self.softcap is None else self.softcap / self.temperature

    @property
    def gradient_scale(self) -> float:
        """Constant part `a / tau` of `dz / dx`. It is applied to the small result, not to the tile."""
        return self.logit_scale / self.temperature

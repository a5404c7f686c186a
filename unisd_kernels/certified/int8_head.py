"""An output head made ready for int8 products: codes, scales, and what its rounding errors amount to at most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unisd_kernels.certified.coordinates import directions_and_transform
from unisd_kernels.heads import LMHead

# Rows of the weight that are float64 at a time.
_ROWS = 8192
# Heads that are kept ready: a student's and a teacher's.
_KEPT = 2


def int8_codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, H] int8 and scales [N] of rows, whose product is nearest to them."""
    scales = values.abs().amax(-1) / 127
    codes = (values / torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(-1)).round_()
    return codes.to(torch.int8), scales


def padded(width: int) -> int:
    """The number of codes in a row: products take four at a time."""
    return -(-width // 4) * 4


@dataclass(frozen=True)
class Int8Head:
    """A head in the notation of `reference/certified.py`.

    Attributes:
        head: the head itself, for exact logits.
        directions: P [H, r], float64.
        inverse: [H, H], float64: h' = h @ inverse, without the part along P.
        lead: W P [V, r], float32 or, for a float64 head, float64.
        codes, scales: int8 [V, H], zeros up to a multiple of four columns, and [V], in the dtype of `lead`.
        offsets: int32 [V], 128 times the sum of a row of codes.
        residual_length, code_length: the longest row of R and of the codes times their scales.
        residual_norm, cross_norm: sigma(R) and sigma(R^T int8(W')).
        gram: [H, H] of the codes times their scales, in the dtype of `lead`: ||int8(W') r||^2 = r gram r.
        gram_rounding: by which the product above may be off at most, for ||r|| = 1.
    """

    head: LMHead
    directions: torch.Tensor
    inverse: torch.Tensor
    lead: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    residual_length: float
    code_length: float
    residual_norm: float
    cross_norm: float
    gram: torch.Tensor
    gram_rounding: float

    @classmethod
    @torch.no_grad()
    def of(cls, head: LMHead, hidden: torch.Tensor) -> Int8Head:
        """Prepare a head. Five products of H rows, in float64: worth it for a head that stays as it is.

        Args:
            head: on a CPU.
            hidden: [N, H] hidden states that are like those to be scored. Bounds hold for any; for unlike ones they are
                wide.

        Raises:
            ValueError: the weight is not finite.
        """
        head.require_whole("a score by int8 products")
        weight = head.active_weight.detach()
        if not bool(weight.isfinite().all()):
            raise ValueError("the head's weight holds numbers that are not finite: it has no int8 codes")
        width, dtype = weight.shape[1], torch.float64 if weight.dtype == torch.float64 else torch.float32
        rows = hidden.detach().double()
        rows = rows[rows.isfinite().all(-1)]
        moments = torch.zeros(width, width, dtype=torch.float64)
        for start in range(0, len(weight), _ROWS):
            part = weight[start : start + _ROWS].double()
            moments += part.T @ part / len(weight)
        directions, transform, inverse = directions_and_transform(rows.T @ rows / max(len(rows), 1), moments)
        left = torch.eye(width, dtype=torch.float64) - directions @ directions.T
        into = left @ transform
        codes = torch.zeros(len(weight), padded(width), dtype=torch.int8)
        scales, lead = (weight.new_empty(len(weight), *shape, dtype=dtype) for shape in ((), directions.shape[1:]))
        gram, residual_gram, cross = (torch.zeros_like(left) for _ in range(3))
        residual_length = code_length = 0.0
        for start in range(0, len(weight), _ROWS):
            place = slice(start, start + _ROWS)
            wide = weight[place].double()
            turned = wide @ into
            rounded_codes, fine = int8_codes(turned)
            codes[place, :width] = rounded_codes
            # What is off because the scale is a narrow number is part of the residual.
            scales[place] = fine.to(dtype)
            rounded = rounded_codes.double() * scales[place].double().unsqueeze(-1)
            residual = turned - rounded
            lead[place] = (wide @ directions).to(dtype)
            gram += rounded.T @ rounded
            residual_gram += residual.T @ residual
            cross += residual.T @ rounded
            residual_length = max(residual_length, float(residual.norm(dim=1).amax()))
            code_length = max(code_length, float(rounded.norm(dim=1).amax()))
        residual_norm = float(torch.linalg.eigvalsh(residual_gram)[-1].clamp(min=0.0).sqrt())
        return cls(
            head=head.detach(),
            directions=directions,
            inverse=left @ inverse.T,  # for rows of h
            lead=lead,
            codes=codes,
            scales=scales,
            offsets=128 * codes.sum(1, dtype=torch.int32),
            residual_length=residual_length,
            code_length=code_length,
            residual_norm=residual_norm,
            cross_norm=float(torch.linalg.matrix_norm(cross, 2)),
            gram=gram.to(dtype),
            # Two sums of H products, and the rounding of gram and r: |error| <= (2 H + 3) u |r| |gram| |r|.
            gram_rounding=(width + 2) * torch.finfo(dtype).eps * float(torch.linalg.matrix_norm(gram.abs(), 2)),
        )


_ready: list[tuple[torch.Tensor, LMHead, Int8Head]] = []


def ready_head(head: LMHead, hidden: torch.Tensor) -> Int8Head:
    """`Int8Head.of`, or what an earlier call made of the same weight.

    Whether it is the same is seen by its product with one fixed vector: an optimizer, a moving average or a checkpoint
    changes a weight in place, so that neither its address nor its object tells.
    """
    weight = head.active_weight.detach()
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(weight.shape[1], generator=generator, dtype=torch.float64).to(weight.dtype)
    mark = weight @ vector
    for place, (known, of_head, ready) in enumerate(_ready):
        if known.dtype == mark.dtype and _same_constants(of_head, head) and torch.equal(known, mark):
            _ready.append(_ready.pop(place))
            # The exact logits are of the weight given now.
            return Int8Head(**{**ready.__dict__, "head": head.detach()})
    ready = Int8Head.of(head, hidden)
    _ready.append((mark, head.detach(), ready))
    del _ready[:-_KEPT]
    return ready


def _same_constants(a: LMHead, b: LMHead) -> bool:
    return (a.logit_scale, a.softcap, a.active_weight.shape) == (b.logit_scale, b.softcap, b.active_weight.shape)

"""Random problems for the certificate: heads, hidden states with channels that stand out, views that are near."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.studies.sampled_views import FileViews
from unisd_kernels import LMHead


class ViewsProblem(NamedTuple):
    """K views [N, H] of the same tokens, other hidden states to prepare with, and a head."""

    views: tuple[torch.Tensor, ...]
    others: torch.Tensor
    head: LMHead
    target_ids: torch.Tensor
    cu_seqlens: torch.Tensor

    def to(self, dtype: torch.dtype) -> ViewsProblem:
        head = self.head
        bias = None if head.bias is None else head.bias.to(dtype)
        narrow = LMHead(head.weight.to(dtype), bias, head.logit_scale, head.softcap, head.vocab_size)
        return ViewsProblem(
            tuple(view.to(dtype) for view in self.views),
            self.others.to(dtype),
            narrow,
            self.target_ids,
            self.cu_seqlens,
        )


def views_problem(
    seed: int,
    *,
    num_views: int = 3,
    num_rows: int | None = None,
    width: int | None = None,
    columns: int | None = None,
    size: float | None = None,
    apart: float | None = None,
) -> ViewsProblem:
    """What is None is drawn; float64, of values that float32 holds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()

    num_rows, width = num_rows or draw(1, 12), width or draw(1, 48)
    columns = columns or draw(1, 200)
    channels = (normal(width) * (draw(0, 3) / 2)).exp()
    size = size or 10.0 ** (draw(-10, 8) / 10)
    weight = size / width**0.5 * normal(columns, width) * (normal(columns, 1) / 3).exp() / channels
    base = normal(num_rows, width)
    apart = apart or 10.0 ** (-draw(0, 20) / 10)
    views = [((base + apart * normal(num_rows, width)) * channels).float().double() for _ in range(num_views)]
    others = (normal(draw(1, 40), width) * channels).float().double()
    head = LMHead(
        weight.float().double(),
        normal(columns) if draw(0, 2) == 0 else None,
        float([1.0, 1.0, -0.7, 2.5][draw(0, 3)]),
        [None, None, 5.0][draw(0, 2)],
        draw(1, columns) if draw(0, 3) == 0 else None,
    )
    ids = torch.randint(0, head.num_columns, (num_rows,), generator=generator)
    middle = draw(0, num_rows)
    return ViewsProblem(tuple(views), others, head, ids, torch.tensor([0, middle, middle, num_rows]))


def sampled_problem(rows: int, width: int, columns: int) -> tuple[LMHead, FileViews]:
    """A head, and three near views of rows in float32, as `bench.studies.sampled_views` takes them from a model."""
    generator = torch.Generator().manual_seed(0)
    channels = (1.5 * torch.randn(width, generator=generator)).exp()
    head = LMHead(0.5 * torch.randn(columns, width, generator=generator) / channels)
    base = torch.randn(rows, width, generator=generator)
    views = torch.stack([(base + 0.1 * torch.randn(rows, width, generator=generator)) * channels for _ in range(3)])
    return head, FileViews("rows.jsonl", views, torch.randint(columns, (rows,), generator=generator))

"""Intervals from FP8 codes hold the exact score too; the formats are what they say; the counts made from them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.studies import view_formats
from bench.studies.view_bounds import Coordinates, RowScores
from bench.studies.view_formats import E4M3, FORMATS, INT8, fp8_rows
from tests.certified.problems import sampled_problem, views_problem
from unisd_kernels import reference
from unisd_kernels.certified.coordinates import directions_and_transform
from unisd_kernels.certified.int8_head import Int8Head
from unisd_kernels.reference.certified import int8_rows, logprob_bounds

ROUNDINGS = (fp8_rows, partial(fp8_rows, scales=3), partial(fp8_rows, dtype=torch.float8_e5m2))


def check_bounds(seed: int) -> bool:
    """Every bound of one random problem holds; whether they say something (a width below a quarter of a nat)."""
    problem = views_problem(seed, num_views=1)
    hidden, weight, rows = problem.views[0], problem.head.active_weight, problem.others
    exact = reference.linear_logprobs(hidden, problem.head, problem.target_ids).logprobs
    lead, transform, _ = directions_and_transform(rows.T @ rows / len(rows), weight.T @ weight / len(weight))
    narrow = True
    for threshold in (1.0, 1e-2):
        lower, upper = logprob_bounds(
            hidden, problem.head, problem.target_ids, lead, transform, threshold, ROUNDINGS[seed % len(ROUNDINGS)]
        )
        assert bool((lower <= exact + 1e-9).all()), (seed, threshold)
        assert bool((upper >= exact - 1e-9).all()), (seed, threshold)
        narrow &= bool(((upper - lower) < 0.25).all())
    return narrow


def test_bounds_hold_for_fp8():
    assert sum(check_bounds(seed) for seed in range(60)) > 10


def test_the_reference_rounds_as_it_is_told():
    problem = views_problem(2, num_views=1, num_rows=6, width=24, columns=100, size=1.0)
    weight, rows = problem.head.active_weight, problem.others
    lead, transform, _ = directions_and_transform(rows.T @ rows / len(rows), weight.T @ weight / len(weight))
    given = (problem.views[0], problem.head, problem.target_ids, lead, transform, 1e-3)
    seen = []

    def rounding(values):
        seen.append(tuple(values.shape))
        return fp8_rows(values)

    widths = [upper - lower for lower, upper in (logprob_bounds(*given), logprob_bounds(*given, rounding))]
    assert seen == [tuple(weight.shape), (6, 24)]
    assert bool((widths[1] > 1.5 * widths[0]).all())
    for pair in zip(logprob_bounds(*given), logprob_bounds(*given, int8_rows), strict=True):
        assert torch.equal(*pair)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(3))
def test_bounds_hold_for_fp8_on_three_thousand_problems(part):
    assert sum(check_bounds(seed) for seed in range(1000 * part, 1000 * (part + 1))) > 150


def test_rows_of_fp8():
    rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-448.0, 19.1, 0.3, 2.0**-9], [-896.0, 38.2, 0.6, 0.0005]]).double()
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-448.0, 20.0, 0.3125, 2.0**-9], [-896.0, 40.0, 0.625, 0.0]])
    torch.testing.assert_close(fp8_rows(rows), expected.double(), rtol=1e-12, atol=0.0)
    one = fp8_rows(torch.tensor([[57344.0, 19.0]]).double(), torch.float8_e5m2)
    assert one.tolist() == [[57344.0, 20.0]]


def test_the_best_scale_leaves_the_shortest_error():
    values = torch.randn(50, 400, dtype=torch.float64)
    lengths = torch.stack([(values - fp8_rows(values, scales=scales)).norm(dim=-1) for scales in (1, 2, 8)])
    assert bool((lengths[1] <= lengths[0]).all())
    assert bool((lengths[2] <= lengths[1]).all())
    assert bool((lengths[2] < 0.98 * lengths[0]).any())
    # Not what any scale can take away.
    assert bool((lengths[2] > 0.02 * values.norm(dim=-1)).all())
    relative = ((values - fp8_rows(values, scales=8)) / values).abs()
    assert float(relative[values.abs() > 1e-3].max()) <= 1 / 16


@pytest.fixture(scope="module")
def problem():
    return sampled_problem(60, 96, 700)


@pytest.fixture(scope="module")
def found(problem):
    head, file = problem
    return view_formats.measure(head, [file])


def test_without_rounding_the_coordinates_of_every_format_give_the_logits(problem):
    head, file = problem
    hidden, ids = file.views[0], file.ids
    for name, of in FORMATS.items():
        exact = of._replace(rounding=lambda values: values)
        at = view_formats.coordinates(head, hidden, exact)
        rows = RowScores.of(hidden, head, ids, at, exact.rounding)
        assert float(rows.error.max()) < 1e-4, name
        assert float((rows.approximate_target - rows.target).abs().max()) < 1e-3, name
        assert at.directions.shape[1] == min(of.directions, 96 // 4)


def test_int8_is_the_package_s(problem):
    head, file = problem
    hidden = file.views.flatten(0, 1)
    ours = view_formats.coordinates(head, hidden, FORMATS[INT8])
    package = Coordinates.of(Int8Head.of(head, hidden))
    for name, a, b in zip(ours._fields[:-1], ours[:-1], package[:-1], strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-4, msg=name)


def test_few_eigenvectors_are_above_all_of_them(problem):
    head, file = problem
    at = view_formats.coordinates(head, file.views.flatten(0, 1), FORMATS[INT8])
    left = torch.randn(200, 96, dtype=torch.float64)
    values = torch.linalg.eigvalsh(at.gram)
    few, all_of_them = (torch.linalg.vecdot(left @ gram, left) for gram in (at.with_few_eigenvectors(9).gram, at.gram))
    assert bool((few >= all_of_them * (1 - 1e-12)).all())
    torch.testing.assert_close(torch.linalg.eigvalsh(at.with_few_eigenvectors(9).gram)[-9:], values[-9:])
    assert bool((few <= values[-1] * left.square().sum(-1)).all())


def test_an_e_for_each_column_holds_whatever_the_errors_and_is_sharper():
    generator = torch.Generator().manual_seed(1)
    narrower = 0
    for place in range(200):
        n, columns = 20, 30
        logits = 3 * torch.randn(columns, generator=generator, dtype=torch.float64)
        share = logits.softmax(-1).expand(n, -1)
        entries = (3 * torch.rand(columns, generator=generator, dtype=torch.float64)).square().div(3).expand(n, -1)
        sign = torch.randint(0, 2, (n, columns), generator=generator) * 2.0 - 1.0
        # Few columns at their limit, or all as far as the length of all errors lets them.
        off = entries * sign * (torch.rand(n, columns, generator=generator) < [0.1, 0.5, 1.0][place % 3])
        whole = off.norm(dim=-1) + 1e-12
        rows = RowScores(
            torch.zeros(n).double(),
            share,
            entries.amax(-1),
            whole,
            share.log() + off,
            share[:, 0].log(),
            share[:, 0].log(),
            entries,
        )
        is_exact = share > [1.0, 0.05][place % 2]
        lower, upper = rows.interval_by_column(is_exact)
        exact = rows.target - (share * off.exp()).sum(-1).log()
        assert bool((lower <= exact + 1e-12).all())
        assert bool((upper >= exact.clamp(max=0.0) - 1e-12).all())
        largest = share.masked_fill(is_exact, 0.0).amax(-1)
        plain = rows.interval(is_exact, largest)
        assert bool((lower >= plain.lower - 1e-12).all())
        assert bool((upper <= plain.upper + 1e-12).all())
        narrower += int(((upper - lower) < 0.9 * (plain.upper - plain.lower)).sum())
    assert narrower > 1000


def test_every_interval_holds_and_fp8_is_wider(found):
    rows = {row["format"]: row for row in found["formats"]}
    assert list(rows) == list(FORMATS)
    assert all(row["largest_outside"] <= 1e-4 for row in (*found["formats"], *found["columns"]))
    assert rows[E4M3]["half_width_median"] > 2 * rows[INT8]["half_width_median"]
    assert rows["e5m2, best scale"]["rounded_off"] > 1.8 * rows[E4M3]["rounded_off"]
    assert 0.02 < rows[E4M3]["rounded_off"] < 0.03
    assert rows[E4M3]["rescored"]["0.01"] >= rows[INT8]["rescored"]["0.01"]


def test_the_columns_are_counted(found):
    columns = {row["exact"]: row for row in found["columns"] if row["format"] == INT8}
    assert columns["above 1e-04"]["half_width_median"] == pytest.approx(found["formats"][0]["half_width_median"])
    assert columns["none"]["half_width_median"] > columns["above 1e-03"]["half_width_median"]
    means = [columns[f"above {threshold:.0e}"]["a_row_mean"] for threshold in view_formats.THRESHOLDS]
    assert sorted(means, reverse=True) == means
    assert means[0] <= columns["above 1e-05"]["a_block_mean"] <= columns["above 1e-05"]["columns"] == 700
    assert columns["the 8.3% most probable before"]["a_block_mean"] == 58
    page = view_formats.table({"model": "m", "files": ["rows.jsonl"], **found})
    assert f"| {E4M3} |" in page
    assert page.count("| none |") == 2
    own, one = columns["above 1e-03, each column's length"], columns["above 1e-03"]
    assert own["a_row_mean"] == one["a_row_mean"]
    assert own["half_width_median"] < one["half_width_median"]

"""The window of metrics: means over tokens, minima, several processes."""

from types import SimpleNamespace

import torch

from unisd.metrics import MetricWindow, add_loss_statistics


def test_means_are_over_items_not_over_micro_batches():
    window = MetricWindow()
    window.add_values("d", torch.tensor([1.0, 2.0, 3.0]))
    window.add_values("d", torch.tensor([10.0]))
    window.add_minimum("w", torch.tensor([0.5, 0.2]))
    window.add_minimum("w", torch.tensor([0.3]))
    assert window.flush(lambda tensor: tensor) == {"d": (4.0, 4.0), "w": (torch.tensor(0.2).item(), 1.0)}
    assert window.flush(lambda tensor: tensor) == {}


def test_processes_are_added_up_in_one_read():
    window = MetricWindow()
    window.add_values("d", torch.tensor([1.0, 2.0, 3.0]))
    window.add_values("share", torch.tensor([True, False]))
    window.add_minimum("w", torch.tensor([0.5]))
    calls = []

    def gather(tensor):
        calls.append(tensor)
        other = torch.tensor([[10.0, 1.0, 0.0, 2.0, 0.25]])  # another process: sums, counts, minimum
        return torch.cat([tensor, other])

    assert window.flush(gather) == {"d": (4.0, 4.0), "share": (0.25, 4.0), "w": (0.25, 1.0)}
    assert len(calls) == 1


def test_nothing_to_average_is_left_out():
    window = MetricWindow()
    window.add_values("d", torch.zeros(0))
    window.add_minimum("w", torch.zeros(0))
    window.add_values("n", torch.tensor([1.0]))
    assert window.flush(lambda tensor: tensor) == {"n": (1.0, 1.0)}


def test_low_weights_are_counted():
    window, weights = MetricWindow(), torch.tensor([0.5, 0.89, 0.95, 1.0, 0.1])
    off = dict.fromkeys(("divergence", "contrastive", "feature_distance", "student_entropy", "teacher_entropy"))
    result = SimpleNamespace(loss=torch.tensor(1.0), clipped=None, **off)
    add_loss_statistics(window, result, clips=False, agreement_weights=weights, disagreement=None)
    found = window.flush(lambda tensor: tensor)
    assert round(found["agreement_low_share"][0], 6) == 0.6

"""The window of metrics: means over tokens, minima, several processes."""

import torch

from unisd.metrics import MetricWindow


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

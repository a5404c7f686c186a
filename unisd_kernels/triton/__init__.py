"""Triton kernels (impl="triton"): products with the statistics of a vocabulary behind them, and gradients of logits.

score.py        one view: log-sum-exp, target logit, entropy
pair.py         student and teacher at once, with the statistics of their divergence
statistics.py   those statistics, by blocks and of rows; also from logits that library products made
gradients.py    gradients with respect to the logits
rows.py         scaling and differences of [N, H] rows
launch.py       grids, devices, tensor descriptors
tuning.py       tile shapes by architecture, and measuring them
ahead_of_time.py  compiling all of them without a GPU
assembler.py    what NVIDIA's assembler says of them

Importing this package needs triton; `unisd_kernels.tiles.triton` is what uses it.
"""

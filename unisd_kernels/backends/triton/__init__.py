"""Triton kernels (impl="triton"): products with the statistics of a vocabulary behind them, and gradients of logits.

backend.py             the backend: which kernel for what
score.py               one view: log-sum-exp, target logit, entropy
fused_divergence.py    student and teacher in one product kernel, with the statistics of their divergence
chunked_divergence.py  the same statistics from logits that library products made; mixtures
statistics.py          what both share: statistics of blocks of columns and of rows
gradients.py           gradients with respect to the logits
rows.py                scaling and differences of [N, H] rows, logits of one token a row
gemm.py                a tile of a product, and one view's side of it
math.py                elementary functions that keep the digits of small numbers
launch.py              what launches need: devices, grids, tensor descriptors
configs.py             tile shapes by architecture, and measuring them

A kernel stands beside the function that launches it. Importing `backend` needs triton.
"""

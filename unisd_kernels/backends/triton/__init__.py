"""Triton kernels (impl="triton"): products with the statistics of a vocabulary behind them, and gradients of logits.

backend.py           the backend: which kernel for what, and its launches
divergence.py        the launches of the two designs of a divergence
score.py             one view: log-sum-exp, target logit, entropy
fused_divergence.py  student and teacher at once, with the statistics of their divergence
statistics.py        those statistics, by blocks and of rows; also from logits that library products made
gradients.py         gradients with respect to the logits
rows.py              scaling and differences of [N, H] rows
gemm.py, math.py     a tile of a product; elementary functions
launch.py            grids, devices, tensor descriptors
configs.py           tile shapes by architecture, and measuring them

Importing `backend` needs triton.
"""

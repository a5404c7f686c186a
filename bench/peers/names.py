"""Names that others depend on: the base of every ratio, and this package's default."""

FLOOR, OURS = "gemm floor", "unisd_kernels"

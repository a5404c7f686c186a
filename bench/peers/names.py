"""Names that others depend on: the floors, the first of them the base of every ratio, and this package's default."""

FLOOR, OURS = "gemm floor", "unisd_kernels"
FLOOR_FLOAT32, PEAK = "gemm floor float32", "fma peak"
FLOORS = (FLOOR, FLOOR_FLOAT32, PEAK)

"""Benchmarks: declarative cases, peers behind one small interface, every figure with its machine and versions."""

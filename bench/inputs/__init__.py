"""Tensors that peers are given: random sets, and hidden states of a real model."""

"""Pallas kernels behind jaxtok.ops."""

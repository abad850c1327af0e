"""Triton kernels for CUDA. Each has a form in PyTorch beside it, which other devices use."""

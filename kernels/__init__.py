"""Triton kernels, one file an operation, installed as `blipfast.kernels`; importing this alone does not need Triton.

A kernel file has its mathematics and cost in its docstring, `@triton.jit` functions and thin launchers on tensors.
Autograd, input checks and the choice between a kernel and PyTorch are in `blipfast.ops`.
"""

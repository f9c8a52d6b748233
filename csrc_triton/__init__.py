"""Triton kernels of clha-fast. They know pointers, strides and tiles; allocation and launch live in `clha_fast`."""

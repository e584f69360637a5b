"""Triton kernels: what the tensor code of the engine computes, in one launch each. Their files import triton; nothing else does."""

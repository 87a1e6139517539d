from triton_kernels import *  # noqa: F403

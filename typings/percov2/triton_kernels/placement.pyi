from triton_kernels.placement import *  # noqa: F403

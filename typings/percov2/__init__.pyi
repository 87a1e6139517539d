# Lets type checkers find percov2.triton_kernels, whose source lies in triton_kernels/ and not in
# the package. The rest of percov2 is found in python/ first.

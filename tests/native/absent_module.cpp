// A Python module with the CUDA part of percov2._native as a build without CUDA has it.
#include "python/bindings.h"

PYBIND11_MODULE(absent_cuda, module) { percov2::bind_cuda(module); }

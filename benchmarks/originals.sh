#!/usr/bin/env bash
# Makes the environment of the layers that PerCo (SD v2.1) is built of: CompressAI's attention block
# and vector-quantize-pytorch, in .originals/ of the repository or in the folder given. Afterwards
# tests/models/test_perco_weights.py compares percov2's layers with them.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
folder="${1:-$root/.originals}"

"${PYTHON:-python3}" -m venv "$folder"
export PIP_DISABLE_PIP_VERSION_CHECK=1
install() { "$folder/bin/python" -m pip install --quiet "$@"; }
# The same torch and numpy as percov2's; the version of the quantizer is that of the original's
# requirements. CompressAI's own requirements are another numpy and torchvision: only two of its
# modules are used, and only where a wheel needs no compiler.
install -c "$root/constraints.txt" torch numpy safetensors einops einx
install --no-deps --only-binary compressai compressai==1.2.8 vector-quantize-pytorch==1.15.3
"$folder/bin/python" -m pip list 2>/dev/null | grep -i -E '^(compressai|vector-quantize|numpy|torch) '

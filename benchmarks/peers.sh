#!/usr/bin/env bash
# Makes the environment of the coders that percov2 is measured against: constriction, torchac,
# CompressAI and torch-ans, in .peers/ of the repository or in the folder given. Needs a C++ compiler, because
# torchac compiles itself. Afterwards: percov2 bench entropy --peers
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
folder="${1:-$root/.peers}"

"${PYTHON:-python3}" -m venv "$folder"
folder="$(cd "$folder" && pwd)"
export PIP_DISABLE_PIP_VERSION_CHECK=1
install() { "$folder/bin/python" -m pip install --quiet "$@"; }
# The same torch and numpy as percov2's.
install -c "$root/constraints.txt" torch numpy 'constriction==0.5.*' torchac==0.9.3 ninja setuptools
# Only its compiled coder is used; the rest of the package needs another numpy and torchvision.
install --no-deps compressai==1.2.8
# A prebuilt module for torch 2.10 and later.
install --no-deps torch_ans==0.4.0

# torchac compiles itself when it is imported, without optimisation unless the compiler adds it.
printf '#!/bin/sh\nexec c++ -O3 "$@"\n' >"$folder/bin/optimizing-c++"
chmod +x "$folder/bin/optimizing-c++"
ln -sf "$root/benchmarks/peer_coders.py" "$folder/peer_coders.py"
echo "compiling torchac (about a minute)"
PATH="$folder/bin:$PATH" CXX="$folder/bin/optimizing-c++" \
  TORCH_EXTENSIONS_DIR="$folder/torch_extensions" "$folder/bin/python" -c 'import torchac' >/dev/null
"$folder/bin/python" -m pip list 2>/dev/null | grep -i -E '^(constriction|torchac|compressai|torch_ans|numpy|torch) '

#!/usr/bin/env bash
# Install torch for an interpreter, unless it has one that dcache can use: tools/install_torch.sh PYTHON VERSION
#
# On Linux the plain wheel is the CUDA build, several GB with what it pulls in. Where there is no GPU this asks for
# the CPU build: first by its version, which works wherever pip is configured to find CPU builds, then through uv,
# which knows where they are published.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
version=$2
range=$(sed -n 's/^ *"\(torch[<>=][^"]*\)",$/\1/p' pyproject.toml) # as dcache declares it

pip_install() { "$python" -m pip install -qq --disable-pip-version-check "$@"; }

if "$python" -c 'import torch' 2>/dev/null && pip_install --no-index "$range" 2>/dev/null; then
  exit 0 # with no index, pip succeeds when nothing is missing
fi
if [ "$(uname -s)" != Linux ] || nvidia-smi >/dev/null 2>&1; then
  echo "installing torch $version"
  pip_install "torch==$version"
  exit 0
fi
echo "installing torch $version, CPU build"
if pip_install "torch==$version+cpu" 2>/dev/null; then
  exit 0
fi
if pip_install uv && "$python" -m uv pip install --quiet --python "$python" --torch-backend=cpu "torch==$version"; then
  exit 0
fi
echo "no CPU build of torch $version found; installing the CUDA build, which runs without a GPU but is several GB" >&2
pip_install "torch==$version"

#!/usr/bin/env bash
# mypy --strict over the package. Type checkers know nothing of the mapping in pyproject.toml that installs policies/ as
# dcache.policies, so this lays the tree out in types/ as an install would, in links, and checks that.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf types
mkdir -p types/dcache
cd types/dcache
ln -s ../../dcache/[!_]* ../../dcache/__init__.py ../../dcache/__main__.py ../../policies ../../models ../../kernels .
cd ..
exec "${PYTHON:-python3}" -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p dcache "$@"

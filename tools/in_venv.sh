#!/usr/bin/env bash
# Run a command with the tools of .venv first, so that a commit made outside the activated environment is checked alike.
set -euo pipefail
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH" exec "$@"

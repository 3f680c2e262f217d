#!/usr/bin/env bash
# Show the runs in TensorBoard. Usage: ./run_tensorboard.sh [LOG_DIR] [--host ADDRESS] [--port PORT]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
koret="$here/.venv/bin/koret"
if [ ! -x "$koret" ]; then
    koret="$(command -v koret || true)"
fi
if [ -z "$koret" ]; then
    echo "koret is not installed: run 'make setup' in $here first" >&2
    exit 1
fi
exec "$koret" tensorboard "$@"

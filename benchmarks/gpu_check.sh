#!/usr/bin/env bash
# Parity and latency on a CUDA device, with what is installed there (see gpu_check.py); installs nothing.
# PYTHON chooses the interpreter. Exit codes: 0 done, 1 parity failed, 3 no CUDA device.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"

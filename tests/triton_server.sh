#!/usr/bin/env bash
# Makes an environment with a real Triton server, its Python backend and its client in the directory given:
#
#   triton_server.sh DIRECTORY [PYTHON]
#
# The server is that of the package nvidia-pytriton, without the packages that its own Python part needs: the backend's
# processes import numpy 2 and ONNX Runtime from here. The environment is its own because tritonclient needs another
# protobuf than onnx does. tests/test_triton.py finds it in build/triton, or where MSCOMPILE_TRITONSERVER says.
set -euo pipefail

directory=${1:?"usage: triton_server.sh DIRECTORY [PYTHON]"}
root=$(cd "$(dirname "$0")/.." && pwd)
[ -f "$directory/.ready" ] && exit 0

rm -rf "$directory"
"${2:-python3}" -m venv "$directory"
pip() { "$directory/bin/python" -m pip --disable-pip-version-check install -q "$@"; }
pinned() { sed -nE "s/^($1==.*)/\1/p" "$root/constraints.txt"; }
pip --no-deps nvidia-pytriton==0.7.0
pip 'tritonclient[grpc]==2.73.0' "$(pinned numpy)" "$(pinned onnxruntime)" "$(pinned rich)" "$(pinned typer)"

site=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
version=$("$directory/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
server=$site/pytriton/tritonserver
cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$server/backends/python/"
echo "$root" >"$site/mscompile.pth" # the backend's processes ignore PYTHONPATH
touch "$directory/.ready"

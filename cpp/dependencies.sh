#!/usr/bin/env bash
# Gets what the C++ runtime is built with into the directory given, and nothing into the system:
#
#   dependencies.sh DIRECTORY [clang]
#
# ONNX Runtime's headers, nlohmann-json and OpenSSL, from Debian packages, unpacked under DIRECTORY/usr; with `clang`
# instead the compiler with its fuzzer, clang-format and clang-tidy, as DIRECTORY/bin/clang++ and so on. apt checks the
# packages by Debian's keys, with state of its own. Where a package manager has installed libonnxruntime-dev,
# nlohmann-json3-dev and libssl-dev, none of this is needed.
set -euo pipefail

directory=${1:?"usage: dependencies.sh DIRECTORY [clang]"}
keys=/usr/share/keyrings/debian-archive-keyring.gpg
headers_suite=trixie # the first Debian release with ONNX Runtime; the other packages are of this machine's release

if ! command -v dpkg-deb >/dev/null || [ ! -f "$keys" ]; then
    echo "dependencies.sh needs a Debian system; elsewhere, install ONNX Runtime's headers, nlohmann-json and" \
        "OpenSSL, and give CMake their places in CMAKE_PREFIX_PATH" >&2
    exit 3
fi

mkdir -p "$directory"
cd "$directory"
[ -f ".ready${2:+-$2}" ] && exit 0
mkdir -p apt/lists/partial apt/cache/archives/partial
mirror=$(grep -rhoE 'https?://[^ ]*/debian/?( |$)' /etc/apt/sources.list* 2>/dev/null | head -n 1 | tr -d ' ') || true
suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-trixie}")
for name in "$suite" "$headers_suite"; do
    echo "deb [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} $name main"
done | sort -u >apt/sources.list
options=(-q -oDir::State::Lists="$PWD/apt/lists" -oDir::Etc::SourceList="$PWD/apt/sources.list"
    -oDir::Etc::SourceParts=/dev/null -oDir::Cache="$PWD/apt/cache" -oAPT::Default-Release="$suite"
    -oAPT::Sandbox::User="$(id -un)")

apt-get "${options[@]}" update >&2

packages=(libonnxruntime-dev/"$headers_suite" nlohmann-json3-dev libssl-dev libssl3)
if [ "${2-}" = clang ]; then
    number=$(apt-cache "${options[@]}" show clang | sed -nE 's/^Depends:.*clang-([0-9]+).*/\1/p' | head -n 1)
    packages=("clang-$number" "clang-format-$number" "clang-tidy-$number" "libllvm$number" "libclang-cpp$number"
        "libclang1-$number" "libclang-common-$number-dev" "libclang-rt-$number-dev")
fi
for package in "${packages[@]}"; do
    apt-get "${options[@]}" download "$package" >&2
done
for file in *.deb; do
    dpkg-deb --extract "$file" .
    rm "$file"
done
if [ "${2-}" = clang ]; then
    mkdir -p bin
    for tool in clang clang++ clang-format clang-tidy; do
        printf '#!/bin/sh\nexport LD_LIBRARY_PATH="%s"\nexec "%s" "$@"\n' \
            "$(echo "$PWD"/usr/lib/*-linux-gnu):$PWD/usr/lib/llvm-$number/lib" "$PWD/usr/bin/$tool-$number" >"bin/$tool"
        chmod +x "bin/$tool"
    done
fi
touch ".ready${2:+-$2}"

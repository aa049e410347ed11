"""A CMake project around a bundle: a main.cpp that generates text, and the C++ runtime that it is built with."""

from __future__ import annotations

import shutil
from pathlib import Path

from mscompile.packaging.sources import sources
from mscompile.runtime import Bundle

RUNTIME = ("CMakeLists.txt", "cmake", "dependencies.sh", "include", "src")  # of the C++ sources, what a build needs

CMAKE = """\
cmake_minimum_required(VERSION 3.21)
project(generate LANGUAGES C CXX)

add_subdirectory(mscompile)
add_executable(generate main.cpp)
target_link_libraries(generate PRIVATE mscompile::mscompile)
"""

README = """\
# {name}

A program in C++17 that continues texts with the model in `{name}.msc`, {title}. `mscompile/` holds the runtime.

It needs CMake 3.21, OpenSSL 3 and nlohmann-json, and ONNX Runtime: headers of 1.18 or newer to build, a library to run.
On Debian, the first line gets what the build needs into a folder of its own; where it is installed, leave it out.

```bash
bash mscompile/dependencies.sh dependencies
cmake -B build -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$PWD/dependencies/usr"
cmake --build build
pip install onnxruntime
build/generate {name}.msc "{prompt}" 200 0.8 1
```

The arguments are the bundle, a prompt, how many tokens, the temperature (0 is greedy) and a seed. The library of ONNX
Runtime is the one that MSCOMPILE_ONNXRUNTIME names, that of the Python package, or the system's.
"""


def fill(bundle: Bundle, directory: Path) -> None:
    """A CMake project: the bundle, a main.cpp that generates text, and the runtime that both need."""
    runtime, name = sources("cpp", "CMakeLists.txt"), bundle.manifest.name
    prompt = next((token for token in bundle.tokenizer.tokens if token.isalnum()), bundle.tokenizer.tokens[0])
    shutil.copytree(bundle.path, directory / f"{name}.msc")
    shutil.copyfile(runtime / "example" / "main.cpp", directory / "main.cpp")
    for entry in RUNTIME:
        source, target = runtime / entry, directory / "mscompile" / entry
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    (directory / "CMakeLists.txt").write_text(CMAKE, encoding="utf-8")
    readme = README.format(name=name, title=bundle.manifest.title, prompt=prompt)
    (directory / "README.md").write_text(readme, encoding="utf-8")

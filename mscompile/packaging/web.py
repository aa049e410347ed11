"""A static page that generates text in the browser, with the bundle, the JavaScript runtime and ONNX Runtime Web.

    index.html, page/      the page, and the worker that the model runs in
    runtime/               the JavaScript runtime, for programs of your own, too
    onnxruntime/           of the npm package onnxruntime-web, whose files are copied from where npm has put them
    model.msc/             the bundle

No part of it is made for the model: the page reads the manifest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mscompile.errors import UsageError
from mscompile.packaging.sources import sources
from mscompile.runtime import Bundle

MARKER = "index.html"
MODULES = "MSCOMPILE_NODE_MODULES"  # the environment variable that names a folder node_modules
PACKAGE = "onnxruntime-web"
# Names that every server knows the type of: .mjs is unknown to older ones, and then browsers refuse the module.
FILES = {
    "ort.wasm.bundle.min.mjs": "ort.wasm.bundle.min.js",
    "ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}

README = """\
# {name} in the browser

A page that generates text with {title}, in the browser of whoever opens it. It is made of static files and loads
nothing from elsewhere. Any web server will do:

```console
$ python -m http.server --bind localhost 8000
```

Then open http://localhost:8000/. Browsers check files by their hashes only on pages that come by https or from
localhost, so elsewhere serve it by https.

| | |
| --- | --- |
| `model.msc/` | the bundle; the page fetches {needed_mb:.0f} MB of it: its graphs, their weights and the vocabulary |
| `onnxruntime/` | ONNX Runtime Web {version} of Microsoft Corporation, MIT License, {wasm_mb:.0f} MB |
| `page/`, `index.html` | the page; `?prompt=..&count=..&temperature=..&seed=..` fills in its form |
| `runtime/` | the JavaScript runtime: modules for pages and for Node programs of yours |
"""


def fill(bundle: Bundle, directory: Path) -> None:
    """The page and all it needs. UsageError for a bundle that a page cannot run, or where onnxruntime-web is missing.

    Raises BundleError and InputError for a bundle in whose vocabulary no text can be typed.
    """
    if names := ", ".join(given.name for given in bundle.spec.inputs):
        raise UsageError(
            f"{bundle.path} takes {names} from its host, which a page does not have; run it in Python or C++, "
            "with a source for each"
        )
    bundle.tokenizer.encode("")
    web = sources("web", "package.json")
    package = _onnxruntime_web(web)
    shutil.copyfile(web / "page" / MARKER, directory / MARKER)
    shutil.copytree(web / "page", directory / "page", ignore=shutil.ignore_patterns(MARKER))
    shutil.copytree(web / "runtime", directory / "runtime")
    shutil.copytree(bundle.path, directory / "model.msc")
    (directory / "onnxruntime").mkdir()
    for name, renamed in FILES.items():
        shutil.copyfile(package / "dist" / name, directory / "onnxruntime" / renamed)
    (directory / "README.md").write_text(_readme(bundle, package), encoding="utf-8")


def _onnxruntime_web(web: Path) -> Path:
    """The npm package, from the folder that MSCOMPILE_NODE_MODULES names, or as Node would find it from here."""
    wanted = f"{PACKAGE}@{_json(web / 'package.json')['devDependencies'][PACKAGE]}"
    for modules in _node_modules(web):
        package = modules / PACKAGE
        if not (package / "package.json").is_file():
            continue
        if missing := next((name for name in FILES if not (package / "dist" / name).is_file()), None):
            raise UsageError(f"{package} has no dist/{missing}; run npm install --ignore-scripts {wanted}")
        return package
    raise UsageError(
        f"{PACKAGE} is not installed here; run npm install --ignore-scripts {wanted} in this folder, "
        f"or name the folder node_modules that has it in {MODULES}"
    )


def _node_modules(web: Path) -> Iterator[Path]:
    if named := os.environ.get(MODULES):
        yield Path(named)
        return
    here = Path.cwd()
    yield from (folder / "node_modules" for folder in (here, *here.parents))
    yield web.parent / "build" / "web" / "node_modules"  # of `make web`


def _readme(bundle: Bundle, package: Path) -> str:
    files = bundle.manifest.files
    graphs = {f"graphs/{name}" for name in ("weights.bin", *(f"{graph.name}.onnx" for graph in bundle.spec.graphs))}
    return README.format(
        name=bundle.manifest.name,
        title=bundle.manifest.title,
        needed_mb=sum(files[name].size_bytes for name in graphs & files.keys()) / 1e6,
        version=_json(package / "package.json")["version"],
        wasm_mb=sum((package / "dist" / name).stat().st_size for name in FILES) / 1e6,
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

/** ONNX Runtime Web, which `mscompile package --format web` puts beside the page. */
declare module "*/ort.wasm.bundle.min.js";

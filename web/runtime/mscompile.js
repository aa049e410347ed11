/** Runs bundles in browsers and in Node, on onnxruntime-web or onnxruntime-node. In Node, `folder` is in node.js. */

export { Bundle, openBundle } from "./bundle.js";
export { MsCompileError } from "./error.js";
export { generate } from "./generate.js";
export { Logits, Session } from "./session.js";
export { site } from "./site.js";
export { Tokenizer } from "./tokenizer.js";

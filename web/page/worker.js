/**
 * Runs the model beside the page, which stays responsive.
 *
 * The page says {verb: "open", bundle, runtime} once, then {verb: "generate", prompt, count, temperature, seed} and
 * {verb: "stop"} as often as it likes. It hears {verb: "progress" | "opened" | "token" | "done" | "refused", ..}.
 */

import * as ort from "../onnxruntime/ort.wasm.bundle.min.js";
import { MsCompileError, generate, openBundle, site } from "../runtime/mscompile.js";
import { whole } from "../runtime/site.js";

const WASM = new URL("../onnxruntime/ort-wasm-simd-threaded.wasm", import.meta.url);

/** @type {import("../runtime/session.js").Session} */ let session;
/** @type {import("../runtime/tokenizer.js").Tokenizer} */ let tokenizer;
let stopped = false;

/** The memory of the runtime, which does not tell it otherwise. @type {WebAssembly.Memory | null} */
let memory = null;
WebAssembly.Memory = class extends WebAssembly.Memory {
    /** @param {WebAssembly.MemoryDescriptor} descriptor */
    constructor(descriptor) {
        super(descriptor);
        memory = this;
    }
};

/** @param {string} address */
async function open(address) {
    /** @type {Map<string, number>} */
    const loaded = new Map();
    const progress = (/** @type {string} */ file, /** @type {number} */ bytes) => {
        loaded.set(file, bytes);
        postMessage({ verb: "progress", bytes: [...loaded.values()].reduce((a, b) => a + b, 0) });
    };
    const bundle = await openBundle(site(address), { progress });
    tokenizer = await bundle.tokenizer();
    const response = await fetch(WASM);
    if (!response.ok) throw new MsCompileError("unavailable", `${WASM.pathname} is missing; package the bundle again`);
    ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
    ort.env.wasm.wasmBinary = (await whole(response, (bytes) => progress(WASM.pathname, bytes))).buffer;
    session = await bundle.session(ort);
    const { manifest, bytesPerStream, needed } = bundle;
    const bytes = needed.reduce((sum, file) => sum + manifest.files[file].size_bytes, 0);
    postMessage({
        verb: "opened",
        manifest,
        bytesPerStream,
        bytes,
        runtime: ort.env.versions.web,
        tokens: tokenizer.tokens,
    });
}

/** @param {{ prompt: string, count: number, temperature: number, seed: number | null }} wanted */
async function write({ prompt, ...sampling }) {
    stopped = false;
    session.reset();
    session.calls.forEach((_, graph) => session.calls.set(graph, 0));
    const ids = tokenizer.encode(prompt);
    const begun = performance.now();
    /** @type {number | null} */
    let first = null;
    let tokens = 0;
    const facts = () => ({
        tokens,
        prompt: ids.length,
        prompt_ms: first === null ? null : first - begun,
        decode_ms: first === null ? null : performance.now() - first,
        calls: Object.fromEntries(session.calls),
        memory: memory?.buffer.byteLength,
    });
    for await (const id of generate(session, ids, sampling)) {
        first ??= performance.now();
        tokens += 1;
        postMessage({ verb: "token", text: tokenizer.decode([id]), ...facts() });
        await messages();
        if (stopped) break;
    }
    postMessage({ verb: "done", stopped, ...facts() });
}

/** Lets messages that have come in be heard: awaiting promises alone would not. */
function messages() {
    return new Promise((resume) => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = () => {
            port1.close();
            resume(undefined);
        };
        port2.postMessage(null);
    });
}

onmessage = async ({ data }) => {
    try {
        if (data.verb === "open") await open(data.bundle);
        if (data.verb === "generate") await write(data);
        if (data.verb === "stop") stopped = true;
    } catch (error) {
        postMessage({
            verb: "refused",
            expected: error instanceof MsCompileError,
            message: /** @type {Error} */ (error).message,
        });
    }
};

/**
 * Does what a script says, for tests/test_web.py.
 *
 * stdin: {"bundle", "modules", "runtime", "batch", "script": [[verb, ...], ..]}, where `modules` is a node_modules folder
 * and `runtime` the package to run on. stdout: {"logits": base64 of float32, "said": [..]}.
 */

import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

import { MsCompileError, generate, openBundle } from "../runtime/mscompile.js";
import { folder } from "../runtime/node.js";

const { bundle: path, modules, runtime, batch, script } = JSON.parse(await text(process.stdin));
const ort = createRequire(`${modules}/`)(runtime);
if (runtime === "onnxruntime-web") ort.env.wasm.numThreads = 1;

/** @type {Float32Array[]} */
const logits = [];
/** @type {unknown[]} */
const said = [];
/** @type {any[]} */
const engines = [];

/** The runtime, with what it opened at hand. */
const watched = {
    Tensor: ort.Tensor,
    InferenceSession: {
        create: async (/** @type {any[]} */ ...given) => {
            engines.push(await ort.InferenceSession.create(...given));
            return engines.at(-1);
        },
    },
};

/** @param {() => Promise<unknown>} action */
async function sentence(action) {
    try {
        await action();
        return "nothing was refused";
    } catch (error) {
        if (!(error instanceof MsCompileError)) throw error;
        return { fault: error.fault, message: error.message };
    }
}

/** @type {import("../runtime/session.js").Session} */ let session;
/** @type {any} */ let saved;
/** @type {import("../runtime/bundle.js").Bundle} */ let bundle;

/** @type {Record<string, (...values: any[]) => unknown>} */
const VERBS = {
    step: async (tokens) => logits.push((await session.step(tokens)).data),
    reset: (rows) => session.reset(rows),
    save: () => (saved = session.state()),
    restore: () => session.restore(saved),
    refused: async (tokens) => said.push(await sentence(() => session.step(tokens))),
    together: async (tokens) => {
        const first = session.step(tokens);
        said.push(await sentence(() => session.step(tokens)));
        logits.push((await first).data);
    },
    "wrong reset": async (rows) => said.push(await sentence(async () => session.reset(rows))),
    "wrong snapshot": async () => {
        const other = await bundle.session(watched, { batch: batch + 1 });
        said.push(await sentence(async () => session.restore(other.state())));
    },
    release: async () => {
        for (const engine of engines) await engine.release();
    },
    encode: async (words) => said.push(await sentence(async () => (await bundle.tokenizer()).encode(words))),
    generate: async (prompt, count, temperature, seed) => {
        const tokenizer = await bundle.tokenizer();
        const ids = [];
        const sampling = { count, temperature, seed: seed === null ? null : BigInt(seed) };
        for await (const id of generate(session, tokenizer.encode(prompt), sampling)) ids.push(id);
        said.push(tokenizer.decode(ids));
    },
    calls: () => said.push(Object.fromEntries(session.calls)),
    position: () => said.push(session.position),
    bytes: () => said.push(bundle.bytesPerStream),
};

const refused = await sentence(async () => {
    bundle = await openBundle(folder(path));
    session = await bundle.session(watched, { batch });
    for (const [verb, ...values] of script) await VERBS[verb](...values);
});
if (typeof refused === "object") said.push(refused);
const bytes = Buffer.concat(logits.map((part) => Buffer.from(part.buffer, part.byteOffset, part.byteLength)));
process.stdout.write(JSON.stringify({ logits: bytes.toString("base64"), said }));

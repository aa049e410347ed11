/** ONNX Runtime, as onnxruntime-web or onnxruntime-node bring it: one inference session a graph. */

import { MsCompileError } from "./error.js";

/**
 * @typedef {import("./arrays.js").TypedArray} TypedArray
 * @typedef {import("./spec.js").GraphSpec} GraphSpec
 * @typedef {import("./spec.js").TensorSpec} TensorSpec
 * @typedef {{ dtype: string, shape: number[], data: TypedArray }} Value
 *
 * What is used of either package; `import * as ort` gives it.
 * @typedef {{ InferenceSession: { create: Function }, Tensor: new (...values: any[]) => any }} Ort
 * @typedef {{ inputNames: readonly string[], outputNames: readonly string[], run: Function, [key: string]: any }} OrtSession
 */

export class Engine {
    /** @type {Ort} */ #ort;
    /** @type {Map<string, OrtSession>} */ #sessions;

    /**
     * @param {Ort} ort
     * @param {Map<string, OrtSession>} sessions
     */
    constructor(ort, sessions) {
        this.#ort = ort;
        this.#sessions = sessions;
    }

    /**
     * @param {Ort} ort
     * @param {GraphSpec[]} graphs
     * @param {(graph: string) => Promise<Uint8Array>} model  the ONNX file of a graph
     * @param {{ path: string, data: Uint8Array }[]} externalData  the weights that all of them use
     * @param {object} options  of every session, as ONNX Runtime's JavaScript takes them
     */
    static async load(ort, graphs, model, externalData, options) {
        const wanted = { logSeverityLevel: 3, ...options, ...(externalData.length ? { externalData } : {}) };
        const sessions = new Map();
        for (const graph of graphs) {
            const session = await opened(ort, graph.name, await model(graph.name), wanted);
            check(graph.name, "input", session.inputNames, session.inputMetadata, graph.inputs);
            check(graph.name, "output", session.outputNames, session.outputMetadata, graph.outputs);
            sessions.set(graph.name, session);
        }
        return new Engine(ort, sessions);
    }

    /**
     * @param {string} graph
     * @param {Map<string, Value>} inputs
     * @returns {Promise<Map<string, Value>>}
     */
    async run(graph, inputs) {
        const session = /** @type {OrtSession} */ (this.#sessions.get(graph));
        try {
            const feeds = [...inputs].map(([name, { dtype, data, shape }]) => [
                name,
                new this.#ort.Tensor(dtype, data, shape),
            ]);
            const found = await session.run(Object.fromEntries(feeds));
            return new Map(
                Object.entries(found).map(([name, { type, data, dims }]) => {
                    const bits = type === "float16" ? new Uint16Array(data.buffer, data.byteOffset, data.length) : data;
                    return [name, { dtype: type, data: bits, shape: dims }];
                }),
            );
        } catch (error) {
            throw failure(`ONNX Runtime failed in graph ${graph}`, error);
        }
    }
}

/**
 * @param {Ort} ort
 * @param {string} graph
 * @param {Uint8Array} content
 * @param {object} options
 * @returns {Promise<OrtSession>}
 */
async function opened(ort, graph, content, options) {
    try {
        return await ort.InferenceSession.create(content, options);
    } catch (error) {
        throw failure(`ONNX Runtime cannot load ${graph}.onnx here`, error);
    }
}

/**
 * The first line of what the runtime says, in one sentence.
 * @param {string} what
 * @param {unknown} error
 */
function failure(what, error) {
    const [line] = String(error instanceof Error ? error.message : error)
        .trim()
        .split("\n");
    return new MsCompileError("engine", `${what}: ${line}`, { cause: error });
}

/**
 * Names, types and shapes are those of the manifest; of types and shapes, as far as the package tells them.
 * @param {string} graph
 * @param {string} kind
 * @param {readonly string[]} names
 * @param {readonly any[] | undefined} metadata
 * @param {TensorSpec[]} wanted
 */
function check(graph, kind, names, metadata, wanted) {
    const contract = new Map(wanted.map((tensor) => [tensor.name, tensor]));
    const strangers = names.filter((name) => !contract.has(name));
    const absent = wanted.map(({ name }) => name).filter((name) => !names.includes(name));
    const others = (metadata ?? []).filter(({ name, type, shape }) => {
        const tensor = contract.get(name);
        return tensor && (type !== tensor.dtype || String(shape) !== String(tensor.shape));
    });
    const differing = [...strangers, ...absent, ...others.map(({ name }) => name)].sort();
    if (!differing.length) return;
    const what = `${kind}s ${differing.join(", ")} are not what the manifest says`;
    throw new MsCompileError("bundle", `${graph}.onnx: ${what}`);
}

/** What must hold inside a manifest, so that a host can follow it without looking twice. */

import { ITEM_BYTES, Schedule, product } from "./spec.js";
import { quoted, tuple } from "./text.js";

/**
 * @typedef {import("./manifest.js").Manifest} Manifest
 * @typedef {import("./spec.js").Dim} Dim
 * @typedef {import("./spec.js").GraphSpec} GraphSpec
 * @typedef {import("./spec.js").HostInput} HostInput
 * @typedef {import("./spec.js").StateSpec} StateSpec
 * @typedef {import("./spec.js").StreamSpec} StreamSpec
 * @typedef {import("./spec.js").TensorSpec} TensorSpec
 * @typedef {Generator<string, void>} Faults
 */

const SIZE_LIMIT = 2 ** 31 - 1; // of one dimension, and of every count
const RANK_LIMIT = 32; // dimensions of a tensor
const VALUES_LIMIT = 2 ** 40; // of one stream in a state
const VOCAB_LIMIT = 2 ** 24;
const NAMED = /^(batch|(chunk|context)(\/[1-9][0-9]{0,8})?)$/;

/**
 * The first contradiction, as part of a sentence; null if there is none.
 * @param {Manifest} manifest
 * @returns {string | null}
 */
export function manifestFault(manifest) {
    const [first = null] = faultsOf(manifest);
    return first;
}

/**
 * @param {Manifest} manifest
 * @returns {Faults}
 */
function* faultsOf(manifest) {
    yield* nameFaults("bundle", [manifest.name]);
    yield* numericsFaults(manifest.engines);
    yield* nameFaults("engine", Object.keys(manifest.engines));
    if (manifest.verified && manifest.parity === null) yield "it says that it was verified and has no parity report";
    for (const name of Object.keys(manifest.files)) {
        const fault = pathFault(name);
        if (fault !== null) yield `file ${quoted(name)} is listed, ${fault}`;
    }
    yield* sameFileFaults(Object.keys(manifest.files));
    yield* specFaults(manifest.spec);
    for (const { name } of manifest.spec.graphs) {
        const file = `graphs/${name}.onnx`;
        if (!(file in manifest.files)) yield `file ${quoted(file)} of a graph is not listed`;
    }
}

/**
 * `numerics` are the number of `products` by type for each graph.
 * @param {Record<string, any>} engines
 * @returns {Faults}
 */
function* numericsFaults(engines) {
    const isObject = (/** @type {any} */ value) =>
        typeof value === "object" && value !== null && !Array.isArray(value);
    for (const [name, { numerics = {} }] of Object.entries(engines)) {
        if (!isObject(numerics) || !Object.values(numerics).every((row) => isObject(row) && isObject(row.products))) {
            yield `engine ${quoted(name)} has numerics that are no products by graph`;
        }
    }
}

/** @param {string} name */
function pathFault(name) {
    if (name === "manifest.json") return "which cannot hold its own hash";
    if (name.startsWith("/") || name.includes("\\") || name.split("/")[0].includes(":")) {
        return "which is not a relative path with forward slashes";
    }
    const odd = name.split("/").some((part) => ["", ".", ".."].includes(part));
    return odd ? "which has an empty, '.' or '..' part" : null;
}

/**
 * Names that differ only in case, or in how their characters are composed.
 * @param {string[]} names
 * @returns {Faults}
 */
function* sameFileFaults(names) {
    /** @type {Map<string, string>} */
    const known = new Map();
    for (const name of [...names].sort()) {
        const key = name.normalize("NFC").toUpperCase().toLowerCase();
        const other = known.get(key);
        if (other !== undefined) {
            yield `files ${quoted(other)} and ${quoted(name)} are one file on systems that do not tell their names apart`;
        }
        known.set(key, name);
    }
}

/**
 * @param {string} what
 * @param {string[]} names
 * @returns {Faults}
 */
function* nameFaults(what, names) {
    for (const name of names) {
        const odd = ["", ".", ".."].includes(name) || /[/\\:*?"<>|\x00-\x1f\x7f]/.test(name);
        if (odd) yield `${what} name ${quoted(name)} cannot be used in a file name`;
    }
}

/**
 * @param {StreamSpec} spec
 * @returns {Faults}
 */
function* specFaults(spec) {
    const graphs = spec.graphs.map(({ name }) => name);
    const states = spec.states.map(({ name }) => name);
    for (const [what, names] of /** @type {const} */ ([
        ["graph", graphs],
        ["state", states],
    ])) {
        for (const name of twice(names)) yield `two ${what}s are named ${quoted(name)}`;
        yield* nameFaults(what, names);
    }
    if (Math.min(spec.vocab_size, spec.max_batch, spec.max_context ?? 1) < 1) {
        yield "vocab_size, max_batch and max_context must be at least 1";
    }
    if (spec.vocab_size > VOCAB_LIMIT || Math.max(spec.max_batch, spec.max_context ?? 1) > SIZE_LIMIT) {
        yield `vocab_size must be at most ${VOCAB_LIMIT}, max_batch and max_context at most ${SIZE_LIMIT}`;
    }
    for (const state of spec.states) yield* stateFaults(state);
    for (const graph of spec.graphs) {
        yield* graphFaults(graph, spec.states);
        yield* tokenFaults(graph, spec.vocab_size);
    }
    yield* inputFaults(spec);
    yield* scheduleFaults(spec.schedule, graphs);
}

/** @param {string[]} names */
const twice = (names) => new Set(names.filter((name, index) => names.indexOf(name) !== index));

/**
 * @param {StateSpec} state
 * @returns {Faults}
 */
function* stateFaults(state) {
    const { shape, batch_axis, time_axis } = state;
    const where = `state ${quoted(state.name)}`;
    yield* tensorFaults(where, state);
    const values = product(shape.filter((dim) => typeof dim === "number"));
    if (values > VALUES_LIMIT) yield `${where} has ${BigInt(values)} values a stream, more than ${VALUES_LIMIT}`;
    if (shape[batch_axis] !== "batch") {
        yield `${where} has batch_axis ${batch_axis}, where its shape ${tuple(shape)} has no 'batch'`;
    }
    if (shape.filter((dim) => typeof dim === "string").length !== 1) {
        yield `${where} has shape ${tuple(shape)}, which must be fixed but for 'batch'`;
    }
    if (state.update === "append" && time_axis === null) yield `${where} is 'append' with time_axis None`;
    if (time_axis !== null && (!(time_axis in shape) || time_axis === batch_axis)) {
        yield `${where} has time_axis ${time_axis}, which its shape ${tuple(shape)} lacks`;
    }
    if (state.update === "append" && shape[time_axis ?? 0] === 0) yield `${where} is 'append' and has no rows`;
    const row = product(/** @type {number[]} */ (shape.filter((_, axis) => axis !== batch_axis && axis !== time_axis)));
    if (Array.isArray(state.initial) && state.initial.length !== row) {
        yield `${where} has ${state.initial.length} initial values, where a row has ${row}`;
    }
}

/**
 * @param {GraphSpec} graph
 * @param {StateSpec[]} states
 * @returns {Faults}
 */
function* graphFaults(graph, states) {
    const where = `graph ${quoted(graph.name)}`;
    const known = new Map(states.map((state) => [state.name, state]));
    for (const [verb, names] of /** @type {const} */ ([
        ["reads", graph.reads],
        ["writes", graph.writes],
    ])) {
        for (const name of names)
            if (!known.has(name)) yield `${where} ${verb} state ${quoted(name)}, which does not exist`;
        for (const name of twice(names)) yield `${where} ${verb} state ${quoted(name)} twice`;
    }
    yield* missing(
        where,
        "input",
        graph.inputs,
        graph.reads.map((name) => `${name}.in`),
    );
    yield* missing(
        where,
        "output",
        graph.outputs,
        graph.writes.map((name) => `${name}.out`),
    );
    for (const tensor of [...graph.inputs, ...graph.outputs]) {
        yield* tensorFaults(`${where}, tensor ${quoted(tensor.name)},`, tensor);
    }
    yield* fitFaults(where, graph.inputs, new Map(graph.reads.map((name) => [`${name}.in`, known.get(name)])), true);
    yield* fitFaults(
        where,
        graph.outputs,
        new Map(graph.writes.map((name) => [`${name}.out`, known.get(name)])),
        false,
    );
    if (![0, 1, "chunk"].includes(graph.tokens)) yield `${where} consumes ${graph.tokens} tokens, not 0, 1 or 'chunk'`;
}

/**
 * @param {string} where
 * @param {string} what
 * @param {TensorSpec[]} tensors
 * @param {string[]} wanted
 * @returns {Faults}
 */
function* missing(where, what, tensors, wanted) {
    const names = tensors.map(({ name }) => name);
    for (const name of twice(names)) yield `${where} has ${what} ${quoted(name)} twice`;
    for (const name of wanted) if (!names.includes(name)) yield `${where} lacks ${what} ${quoted(name)}`;
}

/**
 * Inputs and outputs have what a host keeps of a state: all of it, its leading rows, or new rows.
 * @param {string} where
 * @param {TensorSpec[]} tensors
 * @param {Map<string, StateSpec | undefined>} held
 * @param {boolean} input
 * @returns {Faults}
 */
function* fitFaults(where, tensors, held, input) {
    for (const { name, dtype, shape } of tensors) {
        const state = held.get(name);
        if (state === undefined) continue;
        const free = state.update === "append" ? state.time_axis : null;
        const fits =
            shape.length === state.shape.length &&
            shape.every((dim, axis) => {
                if (dim === state.shape[axis]) return true;
                return axis === free && (!input || String(dim).startsWith("context"));
            });
        if (!fits || dtype !== state.dtype) {
            yield `${where}, tensor ${quoted(name)}, is ${dtype} ${tuple(shape)}, which its state is not`;
        }
    }
}

/**
 * Tokens, positions and logits have the shapes that a host gives and takes.
 * @param {GraphSpec} graph
 * @param {number} vocab
 * @returns {Faults}
 */
function* tokenFaults(graph, vocab) {
    const wanted = /** @type {const} */ ([
        ["tokens", graph.inputs, ["batch", graph.tokens]],
        ["position", graph.inputs, ["batch"]],
        ["logits", graph.outputs, ["batch", graph.tokens, vocab]],
    ]);
    for (const [name, tensors, shape] of wanted) {
        for (const tensor of tensors) {
            if (tensor.name === name && tuple(tensor.shape) !== tuple(shape)) {
                yield `graph ${quoted(graph.name)} has ${name} of shape ${tuple(tensor.shape)}, not ${tuple(shape)}`;
            }
        }
    }
}

/**
 * @param {StreamSpec} spec
 * @returns {Faults}
 */
function* inputFaults({ inputs, states }) {
    for (const name of twice(inputs.map((given) => given.name))) yield `two host inputs are named ${quoted(name)}`;
    for (const { name, every } of inputs) {
        if (states.every((state) => state.name !== `${name}.recent`)) {
            const recent = quoted(`${name}.recent`);
            yield `host input ${quoted(name)} has no state ${recent}, int64 (batch, ${every}), to be asked for with`;
        }
    }
}

/**
 * @param {import("./spec.js").ScheduleSpec} spec
 * @param {string[]} graphs
 * @returns {Faults}
 */
function* scheduleFaults(spec, graphs) {
    const { ticks, prefill, chunk_multiple, max_chunk } = spec;
    if (!ticks.length || ticks.some(({ repeat }) => repeat < 1)) {
        yield "the schedule must have ticks, each repeated at least once";
    }
    if (Math.max(new Schedule(spec).period, chunk_multiple, max_chunk) > SIZE_LIMIT) {
        yield `the period, chunk_multiple and max_chunk of the schedule must be at most ${SIZE_LIMIT}`;
    }
    const used = [
        ...ticks.flatMap((tick) => [...tick.graphs, ...tick.closing]),
        ...(prefill === null ? [] : [prefill]),
    ];
    for (const name of used) {
        if (!graphs.includes(name)) yield `the schedule runs graph ${quoted(name)}, which does not exist`;
    }
    if (prefill !== null && !(1 <= chunk_multiple && chunk_multiple <= max_chunk)) {
        yield `the schedule has chunk_multiple ${chunk_multiple} and max_chunk ${max_chunk}`;
    }
}

/**
 * @param {string} where
 * @param {{ dtype: string, shape: Dim[] }} tensor
 * @returns {Faults}
 */
function* tensorFaults(where, { dtype, shape }) {
    if (!ITEM_BYTES.has(dtype)) {
        yield `${where} has dtype ${quoted(dtype)}, not one of ${[...ITEM_BYTES.keys()].join(", ")}`;
    }
    if (shape.length > RANK_LIMIT) yield `${where} has ${shape.length} dimensions, more than ${RANK_LIMIT}`;
    for (const dim of shape) {
        const known = typeof dim === "number" ? 0 <= dim && dim <= SIZE_LIMIT : NAMED.test(dim);
        const came = typeof dim === "number" ? dim : quoted(dim);
        if (!known)
            yield `${where} has dimension ${came}, not a size, 'batch', 'chunk', 'context' or one of these by k`;
    }
}

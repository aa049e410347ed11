/** The manifest of a bundle: strict JSON to values, then what must hold between them. */

import { MsCompileError } from "./error.js";
import { manifestFault } from "./fault.js";
import { quoted, shown, typeName } from "./text.js";

/**
 * @typedef {import("./spec.js").StreamSpec} StreamSpec
 * @typedef {{ sha256: string, size_bytes: number }} FileEntry
 * @typedef {object} Manifest
 * @property {number} schema
 * @property {string} name
 * @property {string} title
 * @property {string} family
 * @property {string} precision
 * @property {boolean} verified
 * @property {Record<string, any>} source
 * @property {Record<string, object>} engines
 * @property {object | null} parity
 * @property {StreamSpec} spec
 * @property {Record<string, FileEntry>} files
 */

export const MANIFEST = "manifest.json";
export const AGAIN = "export or copy it again";
const SCHEMA = 1;
const DEPTH_LIMIT = 64; // of objects and lists in one another

/** Something that does not fit its place. */
class Misfit extends Error {}

/**
 * A form reads a JSON value at a place, or throws a Misfit; `words` name it for people.
 * @typedef {{ words: string, read: (value: any, where: string) => any, optional?: boolean, otherwise?: any }} Form
 */

/**
 * @param {string} words
 * @param {(value: any) => boolean} fits
 * @returns {Form}
 */
function plain(words, fits) {
    const read = (/** @type {any} */ value, /** @type {string} */ where) => {
        if (!fits(value)) throw wrong(words, value, where);
        return value;
    };
    return { words, read };
}

/**
 * @param {string} words
 * @param {unknown} value
 * @param {string} where
 */
function wrong(words, value, where) {
    return new Misfit(`${where}: wanted ${words}, got ${typeName(value)} ${shown(value)}`);
}

const anything = plain("anything", () => true);
const text = plain("str", (value) => typeof value === "string");
const boolean = plain("bool", (value) => typeof value === "boolean");
const integer = plain("int", Number.isSafeInteger);
const size = plain("int or str", (value) => typeof value === "string" || Number.isSafeInteger(value));
const NOT_FINITE = new Map([
    ["NaN", NaN],
    ["Infinity", Infinity],
    ["-Infinity", -Infinity],
]);
/** @type {Form} */
const number = {
    words: "float",
    read(value, where) {
        if (NOT_FINITE.has(value)) return NOT_FINITE.get(value);
        if (typeof value !== "number") throw wrong("float", value, where);
        return value;
    },
};

/** @param {unknown} value */
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/**
 * @param {...string} words
 * @returns {Form}
 */
const oneOf = (...words) => plain(words.map(quoted).join(" or "), (value) => words.includes(value));

/**
 * @param {Form} form
 * @returns {Form}
 */
const nullable = (form) => ({ ...form, read: (value, where) => (value === null ? null : form.read(value, where)) });

/**
 * @param {Form} form
 * @param {any} otherwise
 * @returns {Form}
 */
const optional = (form, otherwise) => ({ ...form, optional: true, otherwise });

/**
 * @param {Form} item
 * @returns {Form}
 */
const list = (item) => ({
    words: "list",
    read(value, where) {
        if (!Array.isArray(value)) throw wrong("list", value, where);
        return value.map((entry, index) => item.read(entry, `${where}[${index}]`));
    },
});

/**
 * @param {Form} item
 * @returns {Form}
 */
const mapping = (item) => ({
    words: "object",
    read(value, where) {
        if (!isObject(value)) throw wrong("object", value, where);
        const entries = Object.entries(value).map(([key, entry]) => [
            key,
            item.read(entry, `${where}[${quoted(key)}]`),
        ]);
        return Object.fromEntries(entries);
    },
});

/** @type {Form} */
const initial = {
    words: "float or list",
    read(value, where) {
        try {
            return Array.isArray(value) ? list(number).read(value, where) : number.read(value, where);
        } catch {
            throw wrong("float or list", value, where);
        }
    },
};

/**
 * @param {string} name
 * @param {Record<string, Form>} fields
 * @returns {Form}
 */
function record(name, fields) {
    const known = Object.keys(fields);
    return {
        words: "object",
        read(value, where) {
            if (!isObject(value)) throw wrong("object", value, where);
            const [unknown] = Object.keys(value)
                .filter((key) => !known.includes(key))
                .sort();
            if (unknown !== undefined) {
                throw new Misfit(`${where}: unknown key ${quoted(unknown)}, ${name} has ${known.join(", ")}`);
            }
            const missing = known.find((key) => !(key in value) && !fields[key].optional);
            if (missing !== undefined) throw new Misfit(`${where}: missing key ${quoted(missing)}`);
            const given = Object.keys(value).map((key) => [key, fields[key].read(value[key], `${where}.${key}`)]);
            const absent = known.filter((key) => !(key in value)).map((key) => [key, fields[key].otherwise]);
            return Object.fromEntries([...given, ...absent]);
        },
    };
}

const tensor = record("TensorSpec", { name: text, dtype: text, shape: list(size) });
const state = record("StateSpec", {
    name: text,
    dtype: text,
    shape: list(size),
    update: optional(oneOf("replace", "append"), "replace"),
    time_axis: optional(nullable(integer), null),
    batch_axis: optional(integer, 0),
    initial: optional(initial, 0),
    reads_initial: optional(boolean, false),
});
const graph = record("GraphSpec", {
    name: text,
    inputs: list(tensor),
    outputs: list(tensor),
    reads: list(text),
    writes: list(text),
    tokens: size,
});
const tick = record("Tick", { graphs: list(text), closing: optional(list(text), []), repeat: optional(integer, 1) });
const schedule = record("Schedule", {
    ticks: list(tick),
    prefill: optional(nullable(text), null),
    chunk_multiple: optional(integer, 1),
    max_chunk: optional(integer, 1),
});
const hostInput = record("HostInput", {
    name: text,
    dtype: text,
    shape: list(integer),
    every: integer,
    below: optional(nullable(integer), null),
});
const spec = record("StreamSpec", {
    states: list(state),
    graphs: list(graph),
    schedule,
    vocab_size: integer,
    max_batch: integer,
    max_context: optional(nullable(integer), null),
    inputs: optional(list(hostInput), []),
});
const profile = record("Profile", {
    min_batch: optional(integer, 1),
    max_batch: optional(integer, 8),
    max_chunk: optional(integer, 512),
});
const hit = record("Hit", { name: text, place: text, applied: boolean, reason: text });
const file = record("FileEntry", { sha256: text, size_bytes: integer });
const manifest = record("Manifest", {
    schema: integer,
    name: text,
    title: text,
    family: text,
    precision: text,
    verified: boolean,
    source: mapping(anything),
    versions: mapping(text),
    profile,
    engines: mapping(mapping(anything)),
    costs: mapping(integer),
    tolerances: mapping(number),
    parity: nullable(mapping(anything)),
    rules: list(hit),
    passes: list(hit),
    spec,
    files: optional(mapping(file), {}),
});
// What is read of the facts about the checkpoint, which are free otherwise.
const stage = record("Stage", { after: text, graphs: mapping(integer) });
const source = record("Source", {
    sha256: text,
    parameters: optional(nullable(integer), null),
    nodes: optional(list(stage), []),
});
const tokenizer = record("Tokenizer", { kind: oneOf("char"), tokens: list(text) });

/**
 * @param {Uint8Array} content
 * @returns {any}
 */
function parsed(content) {
    const data = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(content));
    let level = [data];
    for (let depth = 0; level.length; depth += 1) {
        if (depth === DEPTH_LIMIT) throw new Misfit(`it has values ${DEPTH_LIMIT} levels deep and more`);
        level = level.flatMap((value) => (typeof value === "object" && value !== null ? Object.values(value) : []));
    }
    return data;
}

/**
 * The manifest of the bundle called `bundle`, with every default filled in.
 * @param {Uint8Array} content
 * @param {string} bundle
 * @returns {Manifest}
 */
export function parseManifest(content, bundle) {
    const path = `${bundle}/${MANIFEST}`;
    let stage = "is not valid JSON";
    try {
        const data = parsed(content);
        checkSchema(data, bundle, path);
        stage = `does not follow schema ${SCHEMA}`;
        const found = manifest.read(data, "manifest");
        const fault = sourceFault(found.source) ?? manifestFault(found);
        if (fault !== null) throw new MsCompileError("bundle", `${path} contradicts itself: ${fault}; ${AGAIN}`);
        return found;
    } catch (error) {
        if (error instanceof MsCompileError) throw error;
        throw new MsCompileError("bundle", `${path} ${stage}: ${/** @type {Error} */ (error).message}; ${AGAIN}`);
    }
}

/**
 * @param {Record<string, any>} given
 * @returns {string | null}
 */
function sourceFault(given) {
    const read = ["sha256", "parameters", "nodes"].filter((key) => key in given);
    try {
        source.read(Object.fromEntries(read.map((key) => [key, given[key]])), "source");
        return null;
    } catch (error) {
        return /** @type {Error} */ (error).message;
    }
}

/**
 * @param {any} data
 * @param {string} bundle
 * @param {string} path
 */
function checkSchema(data, bundle, path) {
    const schema = isObject(data) ? data.schema : undefined;
    if (!Number.isInteger(schema) || schema < 1) {
        const why = "it has no schema number";
        throw new MsCompileError("bundle", `${path} is not the manifest of a bundle: ${why}; ${AGAIN}`);
    }
    if (schema > SCHEMA) {
        const reads = `this bundle has schema ${schema}, this mscompile reads up to ${SCHEMA}; upgrade mscompile`;
        throw new MsCompileError("bundle", `${bundle}: ${reads}`);
    }
}

/**
 * The texts of a tokenizer.json.
 * @param {Uint8Array} content
 * @param {string} path
 * @returns {string[]}
 */
export function parseTokenizer(content, path) {
    try {
        return tokenizer.read(parsed(content), "tokenizer").tokens;
    } catch (error) {
        const why = /** @type {Error} */ (error).message;
        throw new MsCompileError(
            "bundle",
            `${path} is not a tokenizer of this format: ${why}; export the bundle again`,
        );
    }
}

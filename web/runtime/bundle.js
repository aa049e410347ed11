/**
 * Open a bundle, check it, run it.
 *
 * A source says where the files are: `folder(path)` of node.js, or `site(url)`. The files of a folder are all held
 * against the manifest when it is opened. A site cannot be listed, and its files may be large: each is checked when it
 * is fetched, and only what runs here is fetched.
 */

import { Engine } from "./engine.js";
import { MsCompileError } from "./error.js";
import { AGAIN, MANIFEST, parseManifest, parseTokenizer } from "./manifest.js";
import { Session } from "./session.js";
import { bytesPerStream } from "./spec.js";
import { quoted } from "./text.js";
import { Tokenizer } from "./tokenizer.js";

/**
 * @typedef {import("./engine.js").Ort} Ort
 * @typedef {import("./manifest.js").Manifest} Manifest
 * @typedef {(name: string, loaded: number) => void} Progress
 * @typedef {object} Source
 * @property {string} name  of the bundle, for people
 * @property {(file: string, progress?: Progress) => Promise<Uint8Array<ArrayBuffer> | null>} read  null: not there
 * @property {() => Promise<Map<string, number>>} [list]  the size of every file
 * @typedef {{ hashFiles?: boolean, progress?: Progress }} OpenOptions
 * @typedef {{ batch?: number, options?: object }} SessionOptions
 */

const MANIFEST_LIMIT = 64 * 2 ** 20; // bytes
const BIG_FILE = 64 * 2 ** 20; // bytes
const GRAPHS = "graphs";
const WEIGHTS = "weights.bin";
const REWRITTEN = "engines/ort"; // half precision in FP32 arithmetic, for CPUs

export class Bundle {
    /** @type {Source} */ #source;
    /** @type {Required<OpenOptions>} */ #options;
    /** @type {Map<Ort, Promise<Engine>>} */ #engines = new Map();

    /**
     * @param {Source} source
     * @param {Manifest} manifest
     * @param {Required<OpenOptions>} options
     */
    constructor(source, manifest, options) {
        this.#source = source;
        this.#options = options;
        this.manifest = manifest;
    }

    get spec() {
        return this.manifest.spec;
    }

    /** Bytes of state that a stream keeps, as the manifest says. */
    get bytesPerStream() {
        return bytesPerStream(this.spec);
    }

    /** The files that a session needs. */
    get needed() {
        const weights = `${GRAPHS}/${WEIGHTS}`;
        const graphs = this.spec.graphs.map(({ name }) => this.#graph(name));
        return weights in this.manifest.files ? [...graphs, weights] : graphs;
    }

    async tokenizer() {
        const file = "tokenizer.json";
        if (!(file in this.manifest.files)) {
            const why = "its vocabulary was not known at export; use token ids";
            throw new MsCompileError("bundle", `${this.#source.name} has no tokenizer: ${why}`);
        }
        return new Tokenizer(parseTokenizer(await this.read(file), `${this.#source.name}/${file}`));
    }

    /**
     * A new group of streams at position 0, on `ort`: what onnxruntime-web or onnxruntime-node exports.
     * Sessions of one bundle share the engine that the first of them loads, with the `options` of that one.
     * @param {Ort} ort
     * @param {SessionOptions} [wanted]
     */
    async session(ort, { batch = 1, options = {} } = {}) {
        const [given] = this.spec.inputs;
        if (given !== undefined) {
            const why = `this model needs ${given.name} from its host every ${given.every} tokens`;
            throw new MsCompileError(
                "unavailable",
                `${why}, which this runtime does not supply; run it in Python or C++`,
            );
        }
        let engine = this.#engines.get(ort);
        if (engine === undefined) this.#engines.set(ort, (engine = this.#load(ort, options)));
        engine.catch(() => this.#engines.delete(ort));
        return new Session(this.spec, await engine, batch);
    }

    /**
     * A file of the bundle, held against the manifest.
     * @param {string} file
     */
    async read(file) {
        const content = await this.#source.read(file, this.#options.progress);
        const where = `${this.#source.name}: file ${quoted(file)}`;
        if (content === null) {
            throw new MsCompileError("bundle", `${where} is listed in ${MANIFEST} and missing; ${AGAIN}`);
        }
        const { size_bytes, sha256 } = this.manifest.files[file];
        if (content.length !== size_bytes) throw wrongSize(where, content.length, size_bytes);
        if ((this.#options.hashFiles || size_bytes <= BIG_FILE) && (await hash(content)) !== sha256) {
            const what = `does not have the sha256 that ${MANIFEST} says`;
            throw new MsCompileError("bundle", `${where} ${what}; the bundle is damaged or was changed, ${AGAIN}`);
        }
        return content;
    }

    /**
     * @param {Ort} ort
     * @param {object} options
     */
    async #load(ort, options) {
        const weights = `${GRAPHS}/${WEIGHTS}`;
        const empty = !this.manifest.files[weights]?.size_bytes; // onnxruntime-node takes no empty file
        const data = empty ? [] : [{ path: WEIGHTS, data: await this.read(weights) }];
        return Engine.load(ort, this.spec.graphs, (name) => this.read(this.#graph(name)), data, options);
    }

    /** @param {string} name */
    #graph(name) {
        const own = `${REWRITTEN}/${name}.onnx`;
        return own in this.manifest.files ? own : `${GRAPHS}/${name}.onnx`;
    }
}

/**
 * Open and verify a bundle; with `hashFiles: false` the hashes of files over 64 MiB are not compared.
 * @param {Source} source
 * @param {OpenOptions} [options]
 */
export async function openBundle(source, { hashFiles = true, progress = () => {} } = {}) {
    const sizes = await source.list?.();
    const size = sizes?.get(MANIFEST);
    if (size !== undefined && size > MANIFEST_LIMIT) throw manifestTooLong(source.name, size);
    const content = await source.read(MANIFEST);
    if (content === null) throw new MsCompileError("bundle", `${source.name} is not a bundle: it has no ${MANIFEST}`);
    if (content.length > MANIFEST_LIMIT) throw manifestTooLong(source.name, content.length);
    const manifest = parseManifest(content, source.name);
    const bundle = new Bundle(source, manifest, { hashFiles, progress });
    if (sizes !== undefined) {
        checkSizes(source.name, manifest, sizes);
        for (const file of Object.keys(manifest.files)) await bundle.read(file);
    }
    return bundle;
}

/**
 * A folder holds exactly the files of its manifest.
 * @param {string} name
 * @param {Manifest} manifest
 * @param {Map<string, number>} sizes
 */
function checkSizes(name, { files }, sizes) {
    const missing = Object.keys(files)
        .sort()
        .find((file) => !sizes.has(file));
    if (missing !== undefined) {
        throw new MsCompileError(
            "bundle",
            `${name}: file ${quoted(missing)} is listed in ${MANIFEST} and missing; ${AGAIN}`,
        );
    }
    const stranger = [...sizes.keys()].sort().find((file) => file !== MANIFEST && !(file in files));
    if (stranger !== undefined) {
        const what = `is not listed in ${MANIFEST}; remove it, or ${AGAIN}`;
        throw new MsCompileError("bundle", `${name}: file ${quoted(stranger)} ${what}`);
    }
    for (const [file, { size_bytes }] of Object.entries(files)) {
        const size = /** @type {number} */ (sizes.get(file));
        if (size !== size_bytes) throw wrongSize(`${name}: file ${quoted(file)}`, size, size_bytes);
    }
}

/**
 * @param {string} where
 * @param {number} came
 * @param {number} wanted
 */
function wrongSize(where, came, wanted) {
    const sizes = `has ${came} bytes, and ${MANIFEST} says ${wanted}`;
    return new MsCompileError("bundle", `${where} ${sizes}; the bundle is damaged or was changed, ${AGAIN}`);
}

/**
 * @param {string} name
 * @param {number} size
 */
function manifestTooLong(name, size) {
    return new MsCompileError("bundle", `${name}/${MANIFEST} has ${size} bytes, more than ${MANIFEST_LIMIT}; ${AGAIN}`);
}

/**
 * The sha256 in hexadecimal.
 * @param {Uint8Array<ArrayBuffer>} content
 */
async function hash(content) {
    if (!globalThis.crypto?.subtle) {
        const why = "this page was not loaded by https or from localhost, and elsewhere browsers have no hashes";
        throw new MsCompileError("unavailable", `${why}; serve it in one of these ways`);
    }
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
    return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A bundle in a folder, for Node. */

import { lstat, readFile, readdir } from "node:fs/promises";
import { join, normalize, sep } from "node:path";

import { MsCompileError } from "./error.js";
import { AGAIN } from "./manifest.js";
import { quoted } from "./text.js";

/** @typedef {import("./bundle.js").Source} Source */

/**
 * @param {string} path
 * @returns {Source}
 */
export function folder(path) {
    const name = normalize(path).replace(/(?<=.)[/\\]$/, "");
    return {
        name,
        read: (file) => explained(name, readFrom(join(name, file))),
        list: () => explained(name, list(name)),
    };
}

/** @param {string} path */
async function readFrom(path) {
    try {
        return new Uint8Array(await readFile(path));
    } catch (error) {
        if (/** @type {NodeJS.ErrnoException} */ (error).code === "ENOENT") return null;
        throw error;
    }
}

/**
 * The size of every file below, by relative path with forward slashes.
 * @param {string} root
 */
async function list(root) {
    await checkDirectory(root);
    /** @type {Map<string, number>} */
    const sizes = new Map();
    const folders = [""];
    for (let parent = folders.pop(); parent !== undefined; parent = folders.pop()) {
        for (const entry of await readdir(join(root, parent), { withFileTypes: true })) {
            const name = parent ? `${parent}/${entry.name}` : entry.name;
            if (entry.isDirectory()) folders.push(name);
            else if (entry.isFile()) sizes.set(name, (await lstat(join(root, ...name.split("/")))).size);
            else throw unwanted(root, name, entry.isSymbolicLink());
        }
    }
    return sizes;
}

/** @param {string} root */
async function checkDirectory(root) {
    const facts = await lstat(root + sep).catch(() => lstat(root).catch(() => null));
    if (facts?.isDirectory()) return;
    const wrong = facts ? "it is not a directory" : "no such directory";
    throw new MsCompileError("bundle", `${root} is not a bundle: ${wrong}`);
}

/**
 * @param {string} root
 * @param {string} name
 * @param {boolean} link
 */
function unwanted(root, name, link) {
    if (name === "manifest.json") {
        return new MsCompileError("bundle", `${root} is not a bundle: its manifest.json is not a plain file`);
    }
    const what = link ? "is a symbolic link, which a bundle cannot hold;" : "is not a plain file; remove it, or";
    return new MsCompileError("bundle", `${root}: ${quoted(name)} ${what} ${AGAIN}`);
}

/**
 * @template Result
 * @param {string} name
 * @param {Promise<Result>} reading
 */
async function explained(name, reading) {
    try {
        return await reading;
    } catch (error) {
        if (error instanceof MsCompileError) throw error;
        const { path = name, message } = /** @type {NodeJS.ErrnoException} */ (error);
        throw new MsCompileError("bundle", `cannot read ${path}: ${message}`, { cause: error });
    }
}

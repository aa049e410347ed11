/** A bundle on a web server: its files are fetched when they are needed. */

import { MsCompileError } from "./error.js";

/** @typedef {import("./bundle.js").Source} Source */

/**
 * @param {string | URL} url  of the bundle's directory
 * @returns {Source}
 */
export function site(url) {
    const base = String(url).replace(/\/*$/, "");
    return { name: base, read };

    /** @type {Source["read"]} */
    async function read(file, progress = () => {}) {
        const address = `${base}/${file.split("/").map(encodeURIComponent).join("/")}`;
        try {
            const response = await fetch(address);
            if (response.status === 404) return null;
            if (!response.ok) throw new Error(`the server answered ${response.status} ${response.statusText}`);
            return await whole(response, (loaded) => progress(file, loaded));
        } catch (error) {
            const why = /** @type {Error} */ (error).message;
            throw new MsCompileError("bundle", `cannot read ${address}: ${why}`, { cause: error });
        }
    }
}

/**
 * The content of a response, with the bytes so far told on the way.
 * @param {Response} response
 * @param {(loaded: number) => void} progress
 */
export async function whole(response, progress) {
    const parts = [];
    let loaded = 0;
    const reader = /** @type {ReadableStream<Uint8Array<ArrayBuffer>>} */ (response.body).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
        parts.push(part.value);
        progress((loaded += part.value.length));
    }
    return new Uint8Array(await new Blob(parts).arrayBuffer());
}

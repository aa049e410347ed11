/** Text, one token at a time. */

import { MsCompileError } from "./error.js";
import { Random } from "./random.js";

/**
 * @typedef {import("./session.js").Session} Session
 * @typedef {{ count: number, temperature?: number, seed?: number | bigint | null }} Sampling
 */

/**
 * Token ids that continue `prompt` on a session of one stream: greedy, or sampled with a seed.
 * A seed gives the text that it gives in Python wherever the logits agree.
 * @param {Session} session
 * @param {ArrayLike<number>} prompt
 * @param {Sampling} sampling
 * @returns {AsyncGenerator<number, void>}
 */
export async function* generate(session, prompt, { count, temperature = 0, seed = null }) {
    if (!(temperature >= 0 && Number.isFinite(temperature))) {
        throw new MsCompileError("input", `temperature must be 0 (greedy) or more, not ${temperature}`);
    }
    if (session.batch !== 1) {
        const came = `a text is generated on a session of one stream, not of ${session.batch}`;
        throw new MsCompileError("input", came);
    }
    const random = new Random(seed);
    let logits = await session.step([prompt]);
    for (let number = 0; number < count; number += 1) {
        const last = logits.at(0, logits.tokens - 1);
        const token = temperature === 0 ? highest(last) : sample(last, temperature, random.uniform());
        yield token;
        if (number + 1 < count) logits = await session.step([[token]]);
    }
}

/** @param {Float32Array} logits */
function highest(logits) {
    return logits.reduce((best, value, index) => (value > logits[best] ? index : best), 0);
}

/**
 * Draws from softmax(logits / temperature) by inverting its distribution function.
 * @param {Float32Array} logits
 * @param {number} temperature
 * @param {number} uniform
 */
function sample(logits, temperature, uniform) {
    const scaled = Array.from(logits, (value) => value / temperature);
    const most = scaled.reduce((a, b) => Math.max(a, b));
    let sum = 0;
    const cumulative = scaled.map((value) => (sum += Math.exp(value - most)));
    const found = cumulative.findIndex((value) => value > uniform * sum);
    return found < 0 ? logits.length - 1 : found;
}
